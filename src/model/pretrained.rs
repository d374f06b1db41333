//! A pretrained model on disk: its checkpoint, its configuration, and its tensors under the names Hugging Face gives
//! them, whatever the file calls them.

use candle_core::{DType, Device, Tensor};
use serde_json::Value;

use super::config::DecoderConfig;
use super::family;
use crate::error::{Context, Error, Result};
use crate::weights::{Checkpoint, StoredType, TextFiles};

/// A pretrained model, opened but not loaded.
#[derive(Debug)]
pub struct Pretrained {
    checkpoint: Checkpoint,
    config: DecoderConfig,
    config_json: Value,
}

impl Pretrained {
    /// Opens a folder, a `.gguf` file or a Hub id (`org/name[@revision]`). Reads no weight values.
    pub fn open(source: &str) -> Result<Self> {
        Self::new(Checkpoint::open(source)?)
    }

    /// The model in an open checkpoint.
    pub fn new(checkpoint: Checkpoint) -> Result<Self> {
        let config_json = checkpoint.config_json()?;
        let config = family::read(&config_json).at(checkpoint.name())?;
        Ok(Self { checkpoint, config, config_json })
    }

    /// What it was opened from.
    #[must_use]
    pub fn name(&self) -> &str {
        self.checkpoint.name()
    }

    /// The decoder this model is.
    #[must_use]
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// The `config.json` a copy of this model needs.
    #[must_use]
    pub fn config_json(&self) -> &Value {
        &self.config_json
    }

    /// The files.
    #[must_use]
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// Tokenizer, chat template and special tokens.
    pub fn text(&self) -> Result<TextFiles> {
        self.checkpoint.text()
    }

    /// The names of all tensors on disk, sorted.
    #[must_use]
    pub fn names(&self) -> Vec<&str> {
        self.checkpoint.tensors().keys().map(String::as_str).collect()
    }

    /// How a tensor is stored.
    pub fn stored_dtype(&self, name: &str) -> Result<StoredType> {
        Ok(self.checkpoint.info(name)?.dtype)
    }

    /// The values of a tensor. NaN and infinity are errors.
    pub fn read(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        self.checkpoint.read(name, dtype, device)
    }

    /// Every tensor of the configuration is on disk in its shape, and nothing is that would be left out silently.
    pub fn check(&self) -> Result<()> {
        let wanted = self.config.tensors();
        let missing: Vec<&str> = wanted
            .iter()
            .filter(|(name, _)| !self.checkpoint.tensors().contains_key(name))
            .map(|(name, _)| name.as_str())
            .collect();
        if !missing.is_empty() {
            return Err(Error::invalid(format!("misses {} tensors: {missing:?}", missing.len())))
                .at(self.name());
        }
        Ok(())
    }

    /// The type to compute in when none is asked for: the one most weights are stored in, f32 for f16 and for
    /// quantized weights.
    #[must_use]
    pub fn compute_dtype(&self) -> DType {
        let stored_as = |wanted: DType| -> usize {
            let tensors = self.checkpoint.tensors().values();
            tensors.filter(|info| info.dtype == StoredType::Float(wanted)).map(|info| info.num_values()).sum()
        };
        let all: usize = self.checkpoint.tensors().values().map(|info| info.num_values()).sum();
        if stored_as(DType::BF16) * 2 > all { DType::BF16 } else { DType::F32 }
    }
}
