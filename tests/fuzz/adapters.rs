//! Adapter folders, on the models that they were made for.

use std::path::Path;

use candle_core::{DType, Device};
use peft::adapter::attach;
use peft::merge::merge;
use peft::model::{Decoder, Pretrained};
use peft::run::read_adapter;
use serde_json::json;

use super::chance::{Chance, mutate_bytes};
use super::containers::mutate_safetensors;
use super::json::{mutate_file, with};
use super::toy::{compute_with, fixture, fixture_files};
use super::{Class, Files};

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";

/// An adapter; the file `base` names the fixture that it belongs to.
pub(super) struct Adapter;

impl Class for Adapter {
    fn seeds(&self) -> Vec<Files> {
        let seed = |(base, folder): (&str, &str)| {
            let mut files = fixture_files(&format!("{base}/{folder}"), &[CONFIG, TENSORS]);
            files.insert("base".to_string(), base.into());
            files
        };
        [
            ("llama", "adapter"),
            ("llama3", "adapter"),
            ("llama_bias", "adapter"),
            ("qwen2", "adapter"),
            ("mixtral", "adapter"),
            ("mixtral", "adapter_fused"),
            ("qwen3_moe", "adapter"),
            ("glm4_moe", "adapter"),
            ("granitemoe", "adapter"),
        ]
        .map(seed)
        .into()
    }

    fn attacks(&self, seeds: &[Files]) -> Vec<Files> {
        let mut attacks = Vec::new();
        for rank in [0u64, 1 << 31, 1 << 62, u64::MAX] {
            attacks.push(with(&seeds[0], CONFIG, &[("/r", json!(rank))]));
            attacks.push(with(&seeds[0], CONFIG, &[("/rank_pattern", json!({"q_proj": rank}))]));
        }
        // A pattern of exponential time, and one that is no pattern.
        for pattern in
            ["(.*)*(.*)*(.*)*x", "(((((((((((((((((a)+)+)+)+)+)+)+)+)+", "(?R)", "[", "a{1000000000}"]
        {
            attacks.push(with(&seeds[0], CONFIG, &[("/target_modules", json!(pattern))]));
            attacks.push(with(&seeds[0], CONFIG, &[("/alpha_pattern", json!({pattern: 8}))]));
        }
        attacks
    }

    fn mutate(&self, files: &mut Files, chance: &mut Chance) {
        match chance.below(8) {
            0 => mutate_bytes(files.get_mut(CONFIG).unwrap(), chance),
            1..4 => mutate_safetensors(files.get_mut(TENSORS).unwrap(), chance),
            _ => mutate_file(files, CONFIG, chance),
        }
    }

    fn read(&self, folder: &Path) -> peft::Result<()> {
        let base = std::fs::read_to_string(folder.join("base")).unwrap();
        let model = Pretrained::open(fixture(&base).to_str().unwrap())?;
        let adapter = read_adapter(folder)?.for_model(model.config())?;
        let placements = adapter.fit(&model)?.placements;
        let mut decoder = Decoder::open(&model, DType::F32, &Device::Cpu)?;
        attach(decoder.linears_mut(), &placements, &adapter.tensors, 0.0, 0)?;
        decoder.set_routers(&adapter.routers)?;
        let computed = compute_with(&decoder);
        let merged = folder.join("merged");
        merge(&model, &[adapter], &merged, None, &mut |_| true)?;
        let checked = Pretrained::open(merged.to_str().unwrap()).and_then(|model| model.check());
        assert!(checked.is_ok(), "the merged model is refused: {checked:?}");
        // The values may be too large to compute with, which is an error after a merge that succeeded.
        std::fs::remove_dir_all(merged)?;
        computed
    }
}
