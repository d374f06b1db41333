//! Merged weights are those of PEFT, compute what the adapter computes, and are the base's elsewhere.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use peft::Error;
use peft::adapter::hf::Adapter;
use peft::adapter::init::fresh;
use peft::adapter::{Init, LoraConfig, Targets, attach, resolve};
use peft::merge::{RECEIPT_FILE, Receipt, merge};
use peft::model::{Decoder, Pretrained};
use proptest::prelude::*;
use serde_json::json;

use crate::fixture::{ALL, Fixture, MODELS, difference, logits, values};
use crate::place::Place;
use crate::weights::gguf::tokenizers::byte_level;
use crate::weights::gguf::{converted, write};

fn adapter(fixture: &Fixture) -> Adapter {
    Adapter::read(&fixture.folder.join("adapter"), &Device::Cpu).unwrap()
}

fn fold(model: &Pretrained, adapters: &[Adapter], to: &Path, dtype: Option<DType>) -> peft::Result<Receipt> {
    merge(model, adapters, to, dtype, &mut |_| true)
}

fn open(folder: &Path) -> Pretrained {
    Pretrained::open(&folder.to_string_lossy()).unwrap()
}

fn read(model: &Pretrained, name: &str) -> Tensor {
    model.read(name, DType::F32, &Device::Cpu).unwrap()
}

/// A trained-looking adapter: A and B as `nju` begins, every value moved and multiplied by `size`.
fn random(model: &Pretrained, config: LoraConfig, size: f64) -> Adapter {
    let config = LoraConfig { init: Init::Nju, ..config };
    let placements = resolve(&config, model.config()).unwrap().placements;
    let mut tensors = fresh(&config, &placements, model.config(), &Device::Cpu).unwrap();
    for tensor in tensors.values_mut() {
        *tensor = ((&*tensor + 0.01).unwrap() * size).unwrap();
    }
    Adapter {
        source: "made here".into(),
        config,
        base_model: None,
        revision: None,
        tensors,
        copies: BTreeMap::new(),
        parameters: Vec::new(),
        peft_version: None,
        routers: BTreeMap::new(),
        metadata: BTreeMap::new(),
        warnings: Vec::new(),
    }
}

/// An adapter on the head, as PEFT would have it.
fn on_the_head(model: &Pretrained) -> Adapter {
    let config = LoraConfig { rank: 2, targets: Targets::names(["lm_head"]), ..LoraConfig::default() };
    let (vocab, hidden) = (model.config().vocab_size, model.config().hidden_size);
    let tensor = |shape: (usize, usize), first: f32| {
        let count = shape.0 * shape.1;
        let values: Vec<f32> = (0..count).map(|i| first + i as f32 / count as f32).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    };
    Adapter {
        source: "made here".into(),
        config,
        base_model: None,
        revision: None,
        tensors: BTreeMap::from([
            ("lm_head.lora_A.weight".to_string(), tensor((2, hidden), -0.5)),
            ("lm_head.lora_B.weight".to_string(), tensor((vocab, 2), 0.25)),
        ]),
        copies: BTreeMap::new(),
        parameters: Vec::new(),
        peft_version: None,
        routers: BTreeMap::new(),
        metadata: BTreeMap::new(),
        warnings: Vec::new(),
    }
}

#[test]
fn merged_tensors_are_those_of_peft() {
    let mut compared = 0;
    for name in MODELS {
        let fixture = Fixture::open(name);
        let base = fixture.pretrained();
        let folder = tempfile::tempdir().unwrap();
        for (dtype, output) in [(None, "stored"), (Some(DType::F32), "f32")] {
            let output = folder.path().join(output);
            let receipt = fold(&base, &[adapter(&fixture)], &output, dtype).unwrap();
            assert_eq!(receipt.warnings, Vec::<String>::new());
            let merged = open(&output);
            let stored = base.info("model.norm.weight").unwrap().dtype;
            for (golden, expected) in &fixture.tensors {
                let Some(tensor) = golden.strip_prefix("merged.") else { continue };
                let found = read(&merged, tensor);
                if dtype.is_some() || stored.to_string() == "f32" {
                    let difference = difference(&found, expected);
                    assert!(difference <= 1e-6, "{name} {tensor}: {difference}");
                } else {
                    // PEFT's value in f32, rounded; the sum's last bit may fall to the other side of a tie.
                    let narrow = if stored.to_string() == "bf16" { DType::BF16 } else { DType::F16 };
                    let rounded = expected.to_dtype(narrow).unwrap();
                    let other =
                        values(&found).iter().zip(values(&rounded)).filter(|(x, y)| **x != *y).count();
                    assert!(other * 500 <= receipt.values, "{name} {tensor}: {other} differ");
                }
                compared += 1;
            }
        }
    }
    assert_eq!(compared, 20);
}

#[test]
fn a_merged_model_computes_what_the_adapter_computes() {
    for name in ALL {
        let fixture = Fixture::open(name);
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().join("merged");
        fold(&fixture.pretrained(), &[adapter(&fixture)], &output, Some(DType::F32)).unwrap();
        let model = Decoder::open(&open(&output), DType::F32, &Device::Cpu).unwrap();
        let found = logits(&model, &fixture.batch());
        let difference = difference(&found, &fixture.tensors["logits_adapter"]);
        assert!(difference <= 1e-4, "{name}: {difference}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn merging_equals_the_forward(rank in 1usize..9, alpha in 0.1f64..20.0, rslora: bool, lora_bias: bool, seed: u64) {
        let fixture = Fixture::open("llama_bias");
        let base = fixture.pretrained();
        let config = LoraConfig { rank, alpha: Some(alpha), rslora, lora_bias, seed, ..LoraConfig::default() };
        let size = (0.1 / config.scale(rank, alpha)).sqrt();
        let adapter = random(&base, config, size);
        let mut model = fixture.model();
        let placements = adapter.placements(model.config()).unwrap().placements;
        attach(model.linears_mut(), &placements, &adapter.tensors, 0.0, 0).unwrap();
        let beside = logits(&model, &fixture.batch());

        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().join("merged");
        fold(&base, &[adapter], &output, None).unwrap();
        let merged = logits(&Decoder::open(&open(&output), DType::F32, &Device::Cpu).unwrap(), &fixture.batch());
        let difference = difference(&merged, &beside);
        prop_assert!(difference <= 1e-4, "{difference}");
    }
}

#[test]
fn everything_else_is_the_base_byte_for_byte() {
    // Granite has many layers of an adapter in one tensor.
    for name in ALL.into_iter().filter(|name| !name.starts_with("granite")) {
        let fixture = Fixture::open(name);
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().join("merged");
        let adapter = adapter(&fixture);
        let targeted = adapter.tensors.keys().filter(|name| !name.contains("lora_A")).count();
        let mut calls = 0;
        let receipt = merge(&fixture.pretrained(), &[adapter], &output, None, &mut |progress| {
            calls += 1;
            assert_eq!(progress.done, calls);
            true
        })
        .unwrap();
        let (base, merged) = (fixture.pretrained(), open(&output));
        assert_eq!(calls, 2 * base.names().count());
        assert_eq!(receipt.tensors.len(), targeted);
        assert_eq!(receipt.identical, base.names().count() - targeted);
        let changed: Vec<&str> = base
            .names()
            .filter(|name| merged.checkpoint().bytes(name).unwrap() != base.checkpoint().bytes(name).unwrap())
            .collect();
        assert_eq!(changed, receipt.tensors.iter().map(|tensor| tensor.name.as_str()).collect::<Vec<_>>());
        for entry in std::fs::read_dir(&fixture.folder).unwrap() {
            let path = entry.unwrap().path();
            let file = path.file_name().unwrap().to_str().unwrap();
            if file.starts_with("model") && file.ends_with(".safetensors") {
                let (theirs, ours) =
                    (std::fs::read(&path).unwrap(), std::fs::read(output.join(file)).unwrap());
                let header = 8 + u64::from_le_bytes(theirs[..8].try_into().unwrap()) as usize;
                assert_eq!(theirs.len(), ours.len());
                assert_eq!(theirs[..header], ours[..header]);
            } else if ["config.json", "generation_config.json", "model.safetensors.index.json"]
                .contains(&file)
            {
                assert_eq!(
                    std::fs::read(&path).unwrap(),
                    std::fs::read(output.join(file)).unwrap(),
                    "{file}"
                );
            }
        }
        let written = std::fs::read_to_string(output.join(RECEIPT_FILE)).unwrap();
        assert_eq!(written, serde_json::to_string_pretty(&receipt).unwrap() + "\n");
        for tensor in &receipt.tensors {
            assert!(tensor.changed > tensor.values / 2, "{}", tensor.name);
            assert!(
                (tensor.kept - 1.0).abs() < 0.01 && (tensor.written - 1.0).abs() < 0.01 && tensor.lost < 0.05,
                "{tensor:?}"
            );
        }
    }
}

/// The delta is made a quarter as large as the distance of neighbours in bf16, so that rounding takes most of it.
#[test]
fn a_delta_that_rounding_loses_is_warned_of() {
    let place = Place::with(DType::BF16);
    let base = open(&place.path("model"));
    let config = LoraConfig { targets: Targets::names(["up_proj", "down_proj"]), ..LoraConfig::default() };
    let folder = tempfile::tempdir().unwrap();
    let fold = |size: f64, dtype: Option<DType>, name: &str| {
        fold(&base, &[random(&base, config.clone(), size)], &folder.path().join(name), dtype).unwrap()
    };
    let whole = fold(1.0, None, "whole");
    let rms = whole.tensors[0].delta_norm / (whole.tensors[0].values as f64).sqrt();
    assert!(rms > 1e-3 && whole.survived > 0.99 && whole.warnings.is_empty(), "{rms} {whole:?}");
    // A weight is about 0.06, and the values around it in bf16 are 2.4e-4 apart.
    let size = (6e-5 / rms).sqrt();
    let lost = fold(size, None, "lost");
    assert!(lost.survived < 0.7, "{}", lost.survived);
    assert_eq!(lost.warnings.len(), 1);
    let percent = format!("{:.0}", 100.0 * (1.0 - lost.survived));
    assert_eq!(
        lost.warnings[0],
        format!(
            "rounding to bf16 lost {percent}% of what the adapter adds; `--dtype f32` keeps all of it, as the \
             unmerged adapter does"
        )
    );
    let kept = fold(size, Some(DType::F32), "kept");
    assert!(kept.survived > 0.9999 && kept.warnings.is_empty(), "{kept:?}");
}

#[test]
fn a_merge_that_is_ended_leaves_nothing() {
    let fixture = Fixture::open("llama");
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("merged");
    let adapters = [adapter(&fixture)];
    let all = 2 * fixture.pretrained().names().count();
    for last in [1, all / 2, all - 1] {
        let mut go_on = |progress: peft::merge::Progress| progress.done < last;
        let error = merge(&fixture.pretrained(), &adapters, &output, None, &mut go_on).unwrap_err();
        assert_eq!(
            (error.exit_code(), error.to_string().as_str()),
            (130, "interrupted; nothing was written")
        );
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}

#[test]
fn several_adapters_add_up() {
    let fixture = Fixture::open("llama");
    let base = fixture.pretrained();
    let first = adapter(&fixture);
    let second = random(
        &base,
        LoraConfig { rank: 3, targets: Targets::names(["up_proj"]), ..LoraConfig::default() },
        0.3,
    );
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let receipt = fold(&base, &[first.clone(), second.clone()], &at("both"), None).unwrap();
    fold(&base, &[first], &at("first"), None).unwrap();
    fold(&open(&at("first")), &[second], &at("second"), None).unwrap();
    let (both, one_by_one) = (open(&at("both")), open(&at("second")));
    for name in base.names() {
        assert!(difference(&read(&both, name), &read(&one_by_one, name)) <= 1e-6, "{name}");
    }
    let up =
        receipt.tensors.iter().find(|tensor| tensor.name == "model.layers.0.mlp.up_proj.weight").unwrap();
    assert_eq!(up.scales, [1.5, 1.0]);
    assert_eq!(receipt.adapters.iter().map(|adapter| adapter.layers).collect::<Vec<_>>(), [14, 2]);
}

#[test]
fn another_type_is_rounded_once() {
    let fixture = Fixture::open("llama");
    let base = fixture.pretrained();
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let receipt = fold(&base, &[adapter(&fixture)], &at("bf16"), Some(DType::BF16)).unwrap();
    fold(&base, &[adapter(&fixture)], &at("f32"), Some(DType::F32)).unwrap();
    let (narrow, wide) = (open(&at("bf16")), open(&at("f32")));
    for name in base.names() {
        let rounded = read(&wide, name).to_dtype(DType::BF16).unwrap();
        assert_eq!(values(&rounded), values(&read(&narrow, name)), "{name}");
    }
    assert_eq!((receipt.identical, receipt.converted), (0, base.names().count() - 14));
    assert!(receipt.lost > 1e-4 && receipt.lost < 0.1, "{}", receipt.lost);
    assert_eq!(narrow.config_json()["dtype"], json!("bfloat16"));
    assert_eq!(
        std::fs::read(at("f32").join("config.json")).unwrap(),
        std::fs::read(fixture.folder.join("config.json")).unwrap()
    );
}

#[test]
fn a_tied_head_gets_a_tensor_of_its_own() {
    let fixture = Fixture::open("llama3");
    let base = fixture.pretrained();
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("merged");
    let head = on_the_head(&base);
    let receipt = fold(&base, std::slice::from_ref(&head), &output, None).unwrap();
    assert!(receipt.untied && receipt.warnings[0].contains("`tie_word_embeddings` is false"));
    assert_eq!(receipt.identical, base.names().count());
    let merged = open(&output);
    assert!(!merged.config().tie_word_embeddings);
    assert_eq!(merged.config_json()["tie_word_embeddings"], json!(false));
    let embedding = read(&base, "model.embed_tokens.weight");
    assert_eq!(values(&embedding), values(&read(&merged, "model.embed_tokens.weight")));
    let delta = head.tensors["lm_head.lora_B.weight"].matmul(&head.tensors["lm_head.lora_A.weight"]).unwrap();
    let expected = (embedding + delta).unwrap().to_dtype(DType::BF16).unwrap();
    assert_eq!(values(&expected), values(&read(&merged, "lm_head.weight")));
    Decoder::open(&merged, DType::F32, &Device::Cpu).unwrap();

    let untied = Fixture::open("llama").pretrained();
    let receipt = fold(&untied, &[on_the_head(&untied)], &folder.path().join("untied"), None).unwrap();
    assert!(!receipt.untied);
    assert_eq!(receipt.tensors.len(), 1);
}

#[test]
fn copies_of_the_head_have_to_be_copies() {
    let base = Fixture::open("llama3").pretrained();
    let folder = tempfile::tempdir().unwrap();
    let mut head = on_the_head(&base);
    let embedding = read(&base, "model.embed_tokens.weight");
    head.copies.insert("lm_head.weight".into(), embedding.clone());
    fold(&base, &[head.clone()], &folder.path().join("copy"), None).unwrap();
    head.copies.insert("model.embed_tokens.weight".into(), (embedding + 0.5).unwrap());
    let error = fold(&base, &[head], &folder.path().join("trained"), None).unwrap_err().to_string();
    assert!(error.contains("`model.embed_tokens.weight` differs from the model's by up to 0.5"), "{error}");
}

#[test]
fn a_zero_adapter_is_called_one() {
    let fixture = Fixture::open("llama");
    let base = fixture.pretrained();
    let mut zero = adapter(&fixture);
    for (name, tensor) in &mut zero.tensors {
        if name.contains("lora_B") {
            *tensor = tensor.zeros_like().unwrap();
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let receipt = fold(&base, &[zero], &folder.path().join("merged"), None).unwrap();
    assert!(receipt.adapters[0].zero && receipt.tensors.iter().all(|tensor| tensor.zero));
    assert_eq!(receipt.changed, 0);
    assert_eq!(receipt.warnings.len(), 1);
    assert!(receipt.warnings[0].ends_with("is zero: it changes nothing"), "{:?}", receipt.warnings);
    let file = "model.safetensors";
    assert_eq!(
        std::fs::read(folder.path().join("merged").join(file)).unwrap(),
        std::fs::read(fixture.folder.join(file)).unwrap()
    );
}

#[test]
fn a_gguf_file_becomes_a_folder() {
    let fixture = Fixture::open("llama");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("model.gguf");
    let (mut metadata, mut tensors) = converted("llama", "llama");
    metadata.extend(byte_level("smollm"));
    let quantized = |tensor: &QTensor| {
        QTensor::quantize(&tensor.dequantize(&Device::Cpu).unwrap(), GgmlDType::Q8_0).unwrap()
    };
    let up = quantized(&tensors["blk.0.ffn_up.weight"]);
    tensors.insert("blk.0.ffn_up.weight".into(), up);
    write(&file, &metadata, &tensors);
    let base = open(&file);
    let output = folder.path().join("merged");
    let receipt = fold(&base, &[adapter(&fixture)], &output, None).unwrap();
    assert_eq!((receipt.identical, receipt.converted), (7, 0));
    let merged = open(&output);
    assert_eq!(merged.config(), base.config());
    assert_eq!(merged.text().unwrap().chat_template.as_deref(), Some("T"));
    let plain = folder.path().join("plain");
    fold(&fixture.pretrained(), &[adapter(&fixture)], &plain, None).unwrap();
    let plain = open(&plain);
    for name in plain.names() {
        let difference = difference(&read(&merged, name), &read(&plain, name));
        let most = if name == "model.layers.0.mlp.up_proj.weight" { 5e-3 } else { 0.0 };
        assert!(difference <= most, "{name}: {difference}");
    }
    let receipt = fold(&base, &[adapter(&fixture)], &folder.path().join("bf16"), Some(DType::BF16)).unwrap();
    assert_eq!((receipt.identical, receipt.converted), (0, 7));
    assert_eq!(open(&folder.path().join("bf16")).config_json()["torch_dtype"], json!("bfloat16"));
}

/// What a refusal leaves behind must be nothing.
fn refused(model: &Pretrained, adapters: &[Adapter], dtype: Option<DType>) -> Error {
    let folder = tempfile::tempdir().unwrap();
    let error = fold(model, adapters, &folder.path().join("merged"), dtype).unwrap_err();
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    error
}

#[test]
fn a_delta_that_vanishes_is_an_error() {
    let base = Fixture::open("llama3").pretrained();
    let adapter =
        random(&base, LoraConfig { targets: Targets::names(["q_proj"]), ..LoraConfig::default() }, 3e-5);
    let error = refused(&base, std::slice::from_ref(&adapter), None);
    assert!(
        error.to_string().starts_with("tensor `model.layers.0.self_attn.q_proj.weight`: the delta, at most"),
        "{error}"
    );
    assert!(error.to_string().ends_with("vanishes in bf16: no value of the tensor changes"), "{error}");
    assert_eq!(error.hint(), Some("write the merged model with `--dtype f32`"));
    let folder = tempfile::tempdir().unwrap();
    let receipt = fold(&base, &[adapter], &folder.path().join("merged"), Some(DType::F32)).unwrap();
    assert!(receipt.changed > 0);
}

#[test]
fn what_cannot_be_merged_is_refused() {
    let fixture = Fixture::open("llama");
    let base = fixture.pretrained();
    let config = LoraConfig { lora_bias: true, targets: Targets::names(["q_proj"]), ..LoraConfig::default() };
    let error = refused(&base, &[random(&base, config, 1.0)], None);
    assert_eq!(error.to_string(), "the model has no tensor `model.layers.0.self_attn.q_proj.bias`");
    assert!(error.hint().unwrap().contains("`lora_bias`"));

    let large =
        random(&base, LoraConfig { targets: Targets::names(["q_proj"]), ..LoraConfig::default() }, 1e3);
    let error = refused(&base, &[large], Some(DType::F16));
    assert!(error.to_string().contains("cannot be written as f16"), "{error}");

    let other = adapter(&Fixture::open("llama3"));
    assert!(refused(&base, &[other], None).to_string().contains("does not fit the model"));
    assert_eq!(refused(&base, &[], None).exit_code(), 2);
    assert!(
        refused(&base, &[adapter(&fixture)], Some(DType::I64))
            .to_string()
            .contains("expected f32, f16 or bf16")
    );
}

#[test]
fn the_output_is_a_new_folder() {
    let fixture = Fixture::open("llama");
    let base = fixture.pretrained();
    let error = fold(&base, &[adapter(&fixture)], &fixture.folder, None).unwrap_err();
    assert!(error.to_string().contains("is the model that is merged into"), "{error}");
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("note"), "mine").unwrap();
    let error = fold(&base, &[adapter(&fixture)], folder.path(), None).unwrap_err();
    assert!(error.to_string().contains("exists and is not empty"), "{error}");
    assert_eq!(error.exit_code(), 2);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn another_base_is_warned_of() {
    let fixture = Fixture::open("llama");
    let mut adapter = adapter(&fixture);
    adapter.base_model = Some("org/other".into());
    let folder = tempfile::tempdir().unwrap();
    let receipt = fold(&fixture.pretrained(), &[adapter], &folder.path().join("merged"), None).unwrap();
    assert_eq!(receipt.warnings.len(), 1);
    assert!(receipt.warnings[0].contains("was made for `org/other`"), "{:?}", receipt.warnings);
}
