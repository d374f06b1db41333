//! Weights and configurations of models.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use candle_core::quantized::gguf_file::{self, Value as Entry};
use candle_core::{Device, quantized::QTensor};
use peft::model::Pretrained;
use serde_json::{Value, json};

use super::chance::{Chance, mutate_bytes};
use super::containers::{mutate_gguf, mutate_safetensors};
use super::json::{mutate_file, with};
use super::toy::{compute, fixture_files, gguf, gguf_of, read_values, speak};
use super::{Class, Files};
use crate::fixture::ALL;
use crate::weights::gguf::write;

fn open(path: &Path) -> peft::Result<Pretrained> {
    Pretrained::open(path.to_str().unwrap())
}

/// A file of tensors in a model's folder.
pub(super) struct Safetensors;

impl Class for Safetensors {
    fn seeds(&self) -> Vec<Files> {
        let files = |folder| fixture_files(folder, &["config.json", "model.safetensors"]);
        ["llama", "qwen2", "mixtral", "mixtral/fused", "granitemoe"].map(files).into()
    }

    fn mutate(&self, files: &mut Files, chance: &mut Chance) {
        mutate_safetensors(files.get_mut("model.safetensors").unwrap(), chance);
    }

    fn read(&self, folder: &Path) -> peft::Result<()> {
        let model = open(folder)?;
        let values = read_values(&model);
        compute(&model)?;
        values
    }
}

/// The index of a model in several files.
pub(super) struct ShardIndex;

const INDEX: &str = "model.safetensors.index.json";
const SHARDS: [&str; 2] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];

impl Class for ShardIndex {
    fn seeds(&self) -> Vec<Files> {
        vec![fixture_files("llama3", &["config.json", INDEX, SHARDS[0], SHARDS[1]])]
    }

    fn attacks(&self, seeds: &[Files]) -> Vec<Files> {
        let pointer = "/weight_map/model.norm.weight";
        let outside = ["../../etc/passwd", "/etc/passwd", "/dev/zero", "..", ".", "", "config.json", INDEX];
        outside.map(|shard| with(&seeds[0], INDEX, &[(pointer, json!(shard))])).into()
    }

    fn mutate(&self, files: &mut Files, chance: &mut Chance) {
        match chance.below(8) {
            0 => mutate_safetensors(files.get_mut(*chance.pick(&SHARDS)).unwrap(), chance),
            1 => mutate_bytes(files.get_mut(INDEX).unwrap(), chance),
            _ => mutate_file(files, INDEX, chance),
        }
    }

    fn read(&self, folder: &Path) -> peft::Result<()> {
        Safetensors.read(folder)
    }
}

/// A whole model in one file.
pub(super) struct Gguf;

impl Class for Gguf {
    fn seeds(&self) -> Vec<Files> {
        vec![gguf(), gguf_of("qwen2", "qwen2", |_| {}), gguf_of("qwen3", "qwen3", |_| {})]
    }

    fn attacks(&self, _seeds: &[Files]) -> Vec<Files> {
        let with = |key: &str, value: Entry| {
            let key = format!("qwen2.{key}");
            gguf_of("qwen2", "qwen2", |metadata| drop(metadata.insert(key, value)))
        };
        let counts = [1 << 16, 1 << 20, 1 << 31, 1 << 62, (1 << 61) + 4, u64::MAX];
        let keys = [
            "block_count",
            "attention.head_count",
            "attention.head_count_kv",
            "attention.key_length",
            "context_length",
            "embedding_length",
        ];
        keys.iter().flat_map(|key| counts.map(|count| with(key, Entry::U64(count)))).collect()
    }

    fn mutate(&self, files: &mut Files, chance: &mut Chance) {
        let file = files.get_mut("model.gguf").unwrap();
        if chance.one_in(3) && mutate_entries(file, chance).is_some() {
            return;
        }
        mutate_gguf(file, chance);
    }

    fn read(&self, folder: &Path) -> peft::Result<()> {
        let model = open(&folder.join("model.gguf"))?;
        let spoken = speak(&model);
        let values = read_values(&model);
        compute(&model)?;
        spoken.and(values)
    }
}

/// Takes an entry of the metadata out, gives it another's value, or another type; nothing where the file is no GGUF any more.
fn mutate_entries(bytes: &mut Vec<u8>, chance: &mut Chance) -> Option<()> {
    let mut file = std::io::Cursor::new(&bytes[..]);
    let content =
        std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| gguf_file::Content::read(&mut file)));
    let content = content.ok()?.ok()?;
    let mut tensors: BTreeMap<String, QTensor> = BTreeMap::new();
    for name in content.tensor_infos.keys() {
        tensors.insert(name.clone(), content.tensor(&mut file, name, &Device::Cpu).ok()?);
    }
    let mut metadata: BTreeMap<String, Entry> = content.metadata.into_iter().collect();
    let keys: Vec<String> = metadata.keys().cloned().collect();
    let (key, other) = (chance.pick(&keys), chance.pick(&keys));
    let value = match chance.below(5) {
        0 => None,
        1 => metadata.get(other).cloned(),
        2 => Some(Entry::U64(chance.integer(4))),
        3 => Some(Entry::String("a".repeat(1 << chance.below(16)))),
        _ => {
            let list = Entry::Array(vec![Entry::I32(-1); chance.below(9)]);
            Some(chance.pick(&[Entry::F64(f64::NAN), Entry::I64(-1), Entry::Bool(true), list]).clone())
        }
    };
    match value {
        Some(value) => drop(metadata.insert(key.clone(), value)),
        None => drop(metadata.remove(key)),
    }
    let written = tempfile::NamedTempFile::new().unwrap();
    write(written.path(), &metadata, &tensors);
    *bytes = fs::read(written.path()).unwrap();
    Some(())
}

/// The configuration of a model of any family.
pub(super) struct Config;

impl Class for Config {
    fn seeds(&self) -> Vec<Files> {
        let one_file = ALL.iter().filter(|family| **family != "llama3");
        let mut seeds: Vec<Files> =
            one_file.map(|family| fixture_files(family, &["config.json", "model.safetensors"])).collect();
        seeds.extend(ShardIndex.seeds());
        seeds
    }

    fn attacks(&self, seeds: &[Files]) -> Vec<Files> {
        let (llama, mixtral) = (&seeds[0], &seeds[5]);
        let set = |files: &Files, changes: &[(&str, Value)]| with(files, "config.json", changes);
        // The product of heads and width wraps round to the shape that the file has.
        let mut attacks = vec![set(
            llama,
            &[
                ("/num_attention_heads", json!((1u64 << 61) + 4)),
                ("/num_key_value_heads", json!(2)),
                ("/head_dim", json!(8)),
            ],
        )];
        for count in [1u64 << 16, 1 << 20, 1 << 31, 1 << 62, u64::MAX] {
            for key in ["/num_hidden_layers", "/max_position_embeddings", "/vocab_size", "/head_dim"] {
                attacks.push(set(llama, &[(key, json!(count))]));
            }
            for key in ["/num_local_experts", "/num_experts_per_tok", "/num_hidden_layers"] {
                attacks.push(set(mixtral, &[(key, json!(count))]));
            }
        }
        for rope in [
            json!({"rope_type": "linear", "factor": 4.0}),
            json!({"rope_type": "yarn", "factor": 4.0}),
            json!({"rope_type": "linear", "factor": 1e308}),
            json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": 8192}),
        ] {
            attacks.push(set(llama, &[("/rope_scaling", rope.clone())]));
            attacks.push(set(llama, &[("/rope_parameters", rope)]));
        }
        attacks.push(set(llama, &[("/rms_norm_eps", json!(1e308))]));
        attacks
    }

    fn mutate(&self, files: &mut Files, chance: &mut Chance) {
        mutate_file(files, "config.json", chance);
    }

    fn read(&self, folder: &Path) -> peft::Result<()> {
        compute(&open(folder)?)
    }
}
