//! Mixtures of experts against transformers: choices, layouts on disk, the balance loss and its gradients.

use std::collections::BTreeMap;

use candle_core::{DType, Device, Tensor};
use peft::model::{Decoder, Pretrained, Recompute};
use peft::train::step_gradients;

use crate::fixture::{Fixture, SPARSE, difference, logits, values};

#[test]
fn choices_are_those_of_transformers() {
    let mut layers = 0;
    for name in SPARSE {
        let fixture = Fixture::open(name);
        let (model, _) = fixture.with_adapter();
        let batch = fixture.batch();
        let documents = peft::ops::Documents::new(batch.offsets.clone(), batch.documents.clone());
        for routing in model.forward(&batch.tokens, &documents).unwrap().routing {
            let mut found: Vec<Vec<i64>> = routing
                .chosen
                .chunks(routing.active)
                .map(|row| row.iter().map(|e| i64::from(*e)).collect())
                .collect();
            found.iter_mut().for_each(|row| row.sort_unstable());
            let expected = fixture.tensors[&format!("chosen.{}", routing.layer)].to_vec2::<i64>().unwrap();
            assert_eq!(found, expected, "{name}, layer {}", routing.layer);
            layers += 1;
        }
    }
    assert_eq!(layers, 12);
}

#[test]
fn every_layout_gives_the_same_weights() {
    let mut layouts = 0;
    for name in SPARSE {
        let fixture = Fixture::open(name);
        let folder = fixture.folder.join("fused");
        if !folder.exists() {
            continue;
        }
        layouts += 1;
        let fused = Pretrained::open(&folder.to_string_lossy()).unwrap();
        let model = Decoder::open(&fused, DType::F32, &Device::Cpu).unwrap();
        assert_eq!(
            difference(&logits(&model, &fixture.batch()), &logits(&fixture.model(), &fixture.batch())),
            0.0
        );
        let own = fixture.pretrained();
        assert_eq!(own.config(), fused.config(), "{name}");
        for (tensor, _) in own.config().tensors() {
            let read = |from: &Pretrained| from.read(&tensor, DType::F32, &Device::Cpu).unwrap();
            assert_eq!(difference(&read(&own), &read(&fused)), 0.0, "{name}: {tensor}");
        }
    }
    assert_eq!(layouts, 4);
}

/// The bias of `glm4_moe` keeps expert 3 from being chosen.
#[test]
fn an_expert_without_tokens_has_a_gradient_of_zero() {
    let fixture = Fixture::open("glm4_moe");
    let (model, trainables) = fixture.with_adapter();
    let step = step_gradients(&model, &trainables, &[fixture.batch()], None, Recompute::None).unwrap();
    let largest =
        |name: &str| values(step.gradients.of_name(name).unwrap()).iter().fold(0.0f32, |m, x| m.max(x.abs()));
    let by_expert: BTreeMap<usize, f32> = (0..5)
        .map(|expert| {
            (expert, largest(&format!("model.layers.1.mlp.experts.{expert}.up_proj.lora_B.weight")))
        })
        .collect();
    assert_eq!(by_expert[&3], 0.0);
    assert!((0..5).filter(|expert| *expert != 3).all(|expert| by_expert[&expert] > 0.0), "{by_expert:?}");
}

/// In bf16 products are rounded, but what decides on experts is not.
#[test]
fn logits_in_bf16_stay_near_those_in_f32() {
    for name in SPARSE {
        let fixture = Fixture::open(name);
        let model = Decoder::open(&fixture.pretrained(), DType::BF16, &Device::Cpu).unwrap();
        let found = logits(&model, &fixture.batch());
        let expected = &fixture.tensors["logits"];
        let norm = |x: &Tensor| values(x).iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        let error = norm(&(found.to_dtype(DType::F32).unwrap() - expected).unwrap()) / norm(expected);
        assert!(error < 0.05, "{name}: {error}");
    }
}
