use std::collections::HashMap;
use std::fs;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use peft::adapter::hf::Adapter;
use peft::merge::merge;
use peft::model::Pretrained;
use peft::weights::Checkpoint;

use super::moe::sparse_place_of;
use super::place::{Place, assert_same, refusal, tree};
use super::weights::gguf::tokenizers::byte_level;
use super::weights::gguf::{converted, write};
use crate::fixture::Fixture;

/// A model in `dtype` with an adapter for it.
fn trained(dtype: DType) -> Place {
    let place = Place::with(dtype);
    place.run(&["finetune", "recipe.toml", "--log", "silent", "--set", "train.steps=2"]);
    place
}

fn change(place: &Place, change: impl FnOnce(&mut HashMap<String, Tensor>)) {
    let path = place.path("model/model.safetensors");
    let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    change(&mut tensors);
    candle_core::safetensors::save(&tensors, path).unwrap();
}

/// `tensor` with its last value replaced.
fn ending_in(tensor: &Tensor, value: f64) -> Tensor {
    let mut values: Vec<f64> = tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap();
    *values.last_mut().unwrap() = value;
    Tensor::from_vec(values, tensor.dims(), &Device::Cpu).unwrap().to_dtype(tensor.dtype()).unwrap()
}

const MERGE: [&str; 9] =
    ["merge", "--log", "silent", "--model", "model", "--adapter", "run", "--output", "merged"];

#[test]
fn a_merge_refuses_values_that_are_no_numbers_wherever_they_are() {
    for (dtype, name, value) in [
        (DType::F32, "model.norm.weight", f64::NAN),
        (DType::BF16, "model.norm.weight", f64::INFINITY),
        (DType::F16, "model.layers.3.input_layernorm.weight", f64::NEG_INFINITY),
        (DType::F32, "model.layers.1.self_attn.q_proj.weight", f64::NAN),
    ] {
        let place = trained(dtype);
        change(&place, |tensors| {
            let broken = ending_in(&tensors[name], value);
            tensors.insert(name.to_string(), broken);
        });
        let before = tree(&place.path(""));
        for other in [&[][..], &["--dtype", "f32"], &["--dtype", "bf16"]] {
            assert_eq!(
                refusal(&place, &[&MERGE[..], other].concat()),
                format!(
                    "exit 1\nerror: model/model.safetensors: tensor `{name}`: holds NaN or infinity; these weights are \
                     broken\nhint: fetch the model again, or look for a repaired copy"
                )
            );
            assert_same(&tree(&place.path("")), &before);
        }
    }
}

#[test]
fn tensors_of_odd_types_are_looked_at_and_named() {
    const FREQUENCIES: &str = "model.layers.0.self_attn.rotary_emb.inv_freq";
    let place = trained(DType::F32);
    let with = |value: f64| {
        let frequencies = Tensor::new(&[1.0, value], &Device::Cpu).unwrap();
        change(&place, |tensors| drop(tensors.insert(FREQUENCIES.to_string(), frequencies)));
    };
    with(f64::NAN);
    let refused = refusal(&place, &MERGE);
    assert!(refused.contains(&format!("tensor `{FREQUENCIES}`: holds NaN or infinity")), "{refused}");
    with(0.1);
    let (_, told) = place.run(&[&["merge", "--dtype", "bf16"], &MERGE[3..]].concat());
    assert!(
        told.contains(&format!(
            "warning: `{FREQUENCIES}` (f64): not f32, f16 or bf16, so the bytes are copied and no `--dtype` converts them"
        )),
        "{told}"
    );
    let open = |folder: &str| Checkpoint::open(place.path(folder).to_str().unwrap()).unwrap();
    assert_eq!(open("merged").bytes(FREQUENCIES).unwrap(), open("model").bytes(FREQUENCIES).unwrap());
}

#[test]
fn a_merge_refuses_broken_blocks_of_a_gguf_file() {
    let fixture = Fixture::open("llama");
    let folder = tempfile::tempdir().unwrap();
    for (name, stored) in [("output_norm.weight", GgmlDType::F32), ("token_embd.weight", GgmlDType::Q8_0)] {
        let (mut metadata, mut tensors) = converted("llama", "llama");
        metadata.extend(byte_level("smollm"));
        let whole = tensors[name].dequantize(&Device::Cpu).unwrap();
        tensors
            .insert(name.to_string(), QTensor::quantize(&ending_in(&whole, f64::INFINITY), stored).unwrap());
        let file = folder.path().join("model.gguf");
        write(&file, &metadata, &tensors);
        let base = Pretrained::open(file.to_str().unwrap()).unwrap();
        let adapter = Adapter::read(&fixture.folder.join("adapter"), &Device::Cpu).unwrap();
        let output = folder.path().join("merged");
        let error = merge(&base, &[adapter], &output, None, &mut |_| true).unwrap_err();
        assert!(error.to_string().contains(&format!("tensor `{name}`: holds NaN or infinity")), "{error}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "only the model is there");
    }
}

#[test]
fn an_expansion_refuses_values_that_are_no_numbers() {
    const FREQUENCIES: &str = "model.layers.0.self_attn.rotary_emb.inv_freq";
    let place = sparse_place_of("qwen2_moe", "Qwen2MoeForCausalLM");
    change(&place, |tensors| {
        let frequencies = Tensor::new(&[1.0, f32::INFINITY], &Device::Cpu).unwrap();
        tensors.insert(FREQUENCIES.to_string(), frequencies);
    });
    fs::write(
        place.path("expand.toml"),
        r#"
task = "upcycle"
output = "more"
model = { source = "model" }
upcycle = { method = "expand", experts = 2 }
calibration = { data = [{ path = "data.jsonl" }], tokens = 256, held_out = 64 }
"#,
    )
    .unwrap();
    let before = tree(&place.path(""));
    let refused = refusal(&place, &["upcycle", "expand.toml", "--log", "silent"]);
    assert!(refused.contains(&format!("tensor `{FREQUENCIES}`: holds NaN or infinity")), "{refused}");
    assert_same(&tree(&place.path("")), &before);
}
