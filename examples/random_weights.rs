//! A model with random weights, to be trained from the beginning:
//!
//!     cargo run --release --example random_weights -- CONFIG_FOLDER OUTPUT_FOLDER [SEED]
//!
//! Takes `config.json` and the tokenizer's files of one folder and writes them to another, with a `model.safetensors`
//! whose matrices are normal with the configuration's `initializer_range` and whose norms are one. The numbers are those
//! of torch's CPU generator, so a seed says all.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use peft::adapter::torch_random::Generator;
use peft::error::{Context, Error, Result};
use peft::model::family;
use peft::weights::{Staged, write_safetensors};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (from, to, seed) = match arguments.as_slice() {
        [from, to] => (from, to, 42),
        [from, to, seed] => match seed.parse() {
            Ok(seed) => (from, to, seed),
            Err(_) => return Err(Error::request(format!("`{seed}` is no seed; expected a whole number"))),
        },
        _ => return Err(Error::request("expected CONFIG_FOLDER OUTPUT_FOLDER [SEED]")),
    };
    let from = Path::new(from);
    let path = from.join("config.json");
    let json: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).at(&path)?).at(&path)?;
    let config = family::read(&json).at(&path)?;
    // Stored in the type that the configuration names, so that what is trained from it is written in that type too.
    let named = json["torch_dtype"].as_str().or(json["dtype"].as_str());
    let dtype = if named == Some("bfloat16") { DType::BF16 } else { DType::F32 };
    let deviation = json["initializer_range"].as_f64().unwrap_or(0.02);

    let mut random = Generator::new(seed);
    let mut tensors = BTreeMap::new();
    for (name, shape) in config.tensors() {
        let tensor = match shape.as_slice() {
            [_] if name.ends_with(".bias") => Tensor::zeros(shape, DType::F32, &Device::Cpu)?,
            [_] => Tensor::ones(shape, DType::F32, &Device::Cpu)?,
            _ => {
                let mut values = vec![0.0; shape.iter().product()];
                random.normal(&mut values, 0.0, deviation);
                Tensor::from_vec(values, shape, &Device::Cpu)?
            }
        };
        tensors.insert(name, tensor.to_dtype(dtype)?);
    }

    let staged = Staged::replacing(to)?;
    for entry in std::fs::read_dir(from).at(from)? {
        let path = entry.at(from)?.path();
        let Some(name) = path.file_name().filter(|_| path.extension().is_some_and(|e| e != "safetensors"))
        else {
            continue;
        };
        std::fs::copy(&path, staged.path().join(name)).at(&path)?;
    }
    write_safetensors(staged.path().join("model.safetensors"), &tensors, &BTreeMap::new())?;
    staged.commit()
}
