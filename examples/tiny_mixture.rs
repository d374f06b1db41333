//! A small mixture of experts, to try fine-tuning on:
//!
//!     cargo run --release --example tiny_mixture [OUTPUT_FOLDER]     # default: datasets/generated/tiny-mixture
//!
//! Takes the bundled tiny model and makes a Mixtral of it: of each feed-forward network four copies, of which a router
//! with random weights chooses two. Weights of the chosen sum to one, so the mixture says what the model says, until
//! training makes the copies differ.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use peft::adapter::torch_random::Generator;
use peft::error::{Context, Error, Result};
use peft::model::{Pretrained, family};
use peft::weights::{Staged, write_safetensors};
use serde_json::json;

const EXPERTS: usize = 4;
const ACTIVE: usize = 2;
const SEED: u64 = 42;
/// As in sparse upcycling (Komatsuzaki et al. 2023).
const DEVIATION: f64 = 0.02;

fn main() -> Result<()> {
    let output = std::env::args().nth(1).unwrap_or_else(|| "datasets/generated/tiny-mixture".to_string());
    let dense = Pretrained::open("examples/tiny-llama")?;
    let mut config = dense.config_json().clone();
    for (key, value) in [
        ("architectures", json!(["MixtralForCausalLM"])),
        ("model_type", json!("mixtral")),
        ("num_local_experts", json!(EXPERTS)),
        ("num_experts_per_tok", json!(ACTIVE)),
        ("router_aux_loss_coef", json!(0.001)),
        ("sliding_window", json!(null)),
    ] {
        config[key] = value;
    }

    let mut random = Generator::new(SEED);
    let mut tensors = BTreeMap::new();
    for (name, shape) in family::read(&config)?.tensors() {
        let tensor = if name.ends_with("block_sparse_moe.gate.weight") {
            let mut values = vec![0.0; shape.iter().product()];
            random.normal(&mut values, 0.0, DEVIATION);
            Tensor::from_vec(values, shape, &Device::Cpu)?
        } else {
            dense.read(&original(&name), DType::F32, &Device::Cpu)?
        };
        tensors.insert(name, tensor.to_dtype(DType::BF16)?);
    }

    let output = Path::new(&output);
    if let Some(parent) = output.parent() {
        std::fs::create_dir_all(parent).at(parent)?;
    }
    let staged = Staged::replacing(output)?;
    dense.write_companions(staged.path())?;
    let path = staged.path().join("config.json");
    std::fs::write(&path, serde_json::to_string_pretty(&config).map_err(Error::from)? + "\n").at(&path)?;
    write_safetensors(staged.path().join("model.safetensors"), &tensors, &BTreeMap::new())?;
    staged.commit()
}

/// `model.layers.0.block_sparse_moe.experts.3.w1.weight` is a copy of `model.layers.0.mlp.gate_proj.weight`.
fn original(name: &str) -> String {
    const PROJECTIONS: [(&str, &str); 3] = [("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")];
    let Some((layer, expert)) = name.split_once(".block_sparse_moe.experts.") else {
        return name.to_string();
    };
    let projection = PROJECTIONS.iter().find(|(own, _)| expert.ends_with(&format!(".{own}.weight")));
    projection.map_or_else(|| name.to_string(), |(_, dense)| format!("{layer}.mlp.{dense}.weight"))
}
