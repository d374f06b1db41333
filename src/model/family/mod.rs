//! Families: `config.json` to [`DecoderConfig`], one file each, and the names and layout that GGUF
//! files use. Nothing else in this crate names a vendor.

mod capacity;
mod fields;
pub(super) mod gguf;
mod glm4_moe;
mod granitemoe;
mod llama;
mod mistral;
mod mixtral;
mod mixture;
mod olmoe;
mod qwen2;
mod qwen2_moe;
mod qwen3;
mod qwen3_moe;
mod rotary;
mod sparse;

use serde_json::Value;

use crate::error::{Error, Result};
use crate::model::config::DecoderConfig;
pub(super) use capacity::{Capacity, layer_of};
use fields::{Fields, unsupported};
pub use mixture::{Layout, MixtureFormat, MixtureShape};
pub(super) use sparse::ACTIVE;

/// The values of `model_type` that there is a reader for.
pub const SUPPORTED: [&str; 11] = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "olmoe",
    "glm4_moe",
    "granitemoe",
    "granitemoeshared",
];

/// Reads a `config.json`; the only place that looks at `model_type`.
pub fn read(config: &Value) -> Result<DecoderConfig> {
    read_within(config, &Capacity::MOST)
}

/// Reads the `config.json` of files that can hold no more than `capacity`.
pub(super) fn read_within(config: &Value, capacity: &Capacity) -> Result<DecoderConfig> {
    let Some(model_type) = config.get("model_type") else {
        return Err(Error::invalid("`model_type` is missing")
            .with_hint("give the folder of a causal language model as transformers saves it"));
    };
    let name = model_type.as_str().unwrap_or_default();
    let fields = Fields::new(config, name, *capacity)?;
    let mut config = match name {
        "llama" => llama::read(&fields),
        "mistral" => mistral::read(&fields),
        "qwen2" => qwen2::read(&fields),
        "qwen3" => qwen3::read(&fields),
        "mixtral" => mixtral::read(&fields),
        "qwen2_moe" => qwen2_moe::read(&fields),
        "qwen3_moe" => qwen3_moe::read(&fields),
        "olmoe" => olmoe::read(&fields),
        "glm4_moe" => glm4_moe::read(&fields),
        "granitemoe" => granitemoe::read(&fields, false),
        "granitemoeshared" => granitemoe::read(&fields, true),
        _ => Err(unsupported("model_type", model_type, &SUPPORTED)),
    }?;
    capacity.refuse_all_experts(&config)?;
    config.refuse_excess()?;
    sparse::read_exponents(&fields, &mut config)?;
    Ok(config)
}

/// Warns of settings that `config.json` states twice with different values, and says which value counts.
pub(super) fn warnings(config: &Value) -> Vec<String> {
    rotary::warnings(config)
}
