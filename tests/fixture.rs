//! A fixture folder made by transformers and PEFT: see `fixtures/make.py` for what each key means.

use std::collections::BTreeMap;
use std::path::PathBuf;

use candle_core::{DType, Device, Tensor};
use peft::adapter::{attach, hf};
use peft::data::Batch;
use peft::model::{Decoder, Pretrained};
use peft::ops::{Documents, Trainables};
use serde_json::Value;

pub(crate) const MODELS: [&str; 6] = ["llama", "llama3", "mistral", "qwen2", "qwen3", "llama_bias"];

/// Mixtures of experts, made by `fixtures/make_sparse.py`.
pub(crate) const SPARSE: [&str; 7] =
    ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe", "granitemoe", "granitemoeshared"];

/// Every model that there is a fixture of.
pub(crate) const ALL: [&str; 13] = [
    "llama",
    "llama3",
    "mistral",
    "qwen2",
    "qwen3",
    "llama_bias",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "glm4_moe",
    "granitemoe",
    "granitemoeshared",
];

pub(crate) struct Fixture {
    pub(crate) folder: PathBuf,
    pub(crate) tensors: BTreeMap<String, Tensor>,
    pub(crate) golden: Value,
}

impl Fixture {
    pub(crate) fn open(name: &str) -> Self {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
        let load = |file: &str| candle_core::safetensors::load(folder.join(file), &Device::Cpu).unwrap();
        let mut tensors: BTreeMap<String, Tensor> = load("golden.safetensors").into_iter().collect();
        if folder.join("full.safetensors").exists() {
            tensors.extend(load("full.safetensors"));
        }
        let text = std::fs::read_to_string(folder.join("golden.json")).unwrap();
        Self { golden: serde_json::from_str(&text).unwrap(), folder, tensors }
    }

    pub(crate) fn pretrained(&self) -> Pretrained {
        Pretrained::open(&self.folder.to_string_lossy()).unwrap()
    }

    pub(crate) fn model(&self) -> Decoder {
        Decoder::open(&self.pretrained(), DType::F32, &Device::Cpu).unwrap()
    }

    pub(crate) fn with_adapter(&self) -> (Decoder, Trainables) {
        let mut model = self.model();
        let adapter = hf::Adapter::read(&self.folder.join("adapter"), &Device::Cpu).unwrap();
        let placements = adapter.placements(model.config()).unwrap().placements;
        let trainables = attach(model.linears_mut(), &placements, &adapter.tensors, 0.0, 0).unwrap();
        (model, trainables)
    }

    /// The three documents, flat, with their labels; the first token of each is never predicted.
    pub(crate) fn batch(&self) -> Batch {
        let list = |key: &str| self.tensors[key].to_vec1::<i64>().unwrap();
        let offsets: Vec<usize> = list("offsets").into_iter().map(|offset| offset as usize).collect();
        let labels = list("labels");
        Batch {
            tokens: list("input_ids").into_iter().map(|id| id as u32).collect(),
            supervised: (0..labels.len()).map(|i| labels[i] >= 0 && !offsets.contains(&i)).collect(),
            documents: (0..offsets.len() as u64 - 1).collect(),
            offsets,
        }
    }

    pub(crate) fn number(&self, key: &str) -> f64 {
        self.golden[key].as_f64().unwrap()
    }

    pub(crate) fn numbers(&self, key: &str) -> Vec<f64> {
        self.golden[key].as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
    }
}

pub(crate) fn logits(model: &Decoder, batch: &Batch) -> Tensor {
    let documents = Documents::new(batch.offsets.clone(), batch.documents.clone());
    model.logits(&model.forward(&batch.tokens, &documents).unwrap().hidden).unwrap()
}

pub(crate) fn values(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// The largest absolute difference.
pub(crate) fn difference(found: &Tensor, expected: &Tensor) -> f32 {
    assert_eq!(found.dims(), expected.dims());
    values(found).iter().zip(values(expected)).fold(0.0, |most, (x, y)| {
        assert!(!x.is_nan());
        most.max((x - y).abs())
    })
}

/// The largest absolute difference as a share of the largest expected value.
pub(crate) fn relative(found: &Tensor, expected: &Tensor) -> f32 {
    let largest = values(expected).iter().fold(0.0f32, |most, x| most.max(x.abs()));
    difference(found, expected) / largest
}
