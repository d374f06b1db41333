//! An adapter folder of Hugging Face PEFT.

use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::path::{Path, PathBuf};

use candle_core::Device;
use serde::Serialize;

use super::row;
use crate::adapter::{LoraConfig, Targets, hf};
use crate::error::Result;
use crate::run::figures::count;

/// What there is to know of an adapter.
#[derive(Debug, Serialize)]
pub(super) struct Adapter {
    path: PathBuf,
    base_model: Option<String>,
    revision: Option<String>,
    config: LoraConfig,
    scale: f64,
    parameters: u64,
    /// How many layers of each name have a term.
    layers: BTreeMap<String, usize>,
    warnings: Vec<String>,
}

impl Adapter {
    pub(super) fn read(path: &Path) -> Result<Self> {
        let adapter = hf::Adapter::read(path, &Device::Cpu)?;
        let config = adapter.config;
        let mut layers = BTreeMap::new();
        for name in adapter.tensors.keys() {
            if let Some((module, _)) = name.split_once(".lora_A") {
                let name = module.rsplit('.').next().unwrap_or(module);
                *layers.entry(name.to_string()).or_default() += 1;
            }
        }
        Ok(Self {
            path: path.to_path_buf(),
            base_model: adapter.base_model,
            revision: adapter.revision,
            scale: config.scale(config.rank, config.alpha()),
            config,
            parameters: adapter.tensors.values().map(|tensor| tensor.elem_count() as u64).sum(),
            layers,
            warnings: adapter.warnings,
        })
    }
}

impl Display for Adapter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { config, .. } = self;
        row(f, "adapter", self.path.display())?;
        let base = self.base_model.as_deref().unwrap_or("not said");
        match &self.revision {
            Some(revision) => row(f, "base model", format_args!("{base}@{revision}"))?,
            None => row(f, "base model", base)?,
        }
        row(f, "rank", config.rank)?;
        let rslora = if config.rslora { " (over the root of the rank)" } else { "" };
        row(f, "scale", format_args!("{} from alpha {}{rslora}", self.scale, config.alpha()))?;
        row(f, "dropout", config.dropout)?;
        match &config.targets {
            Targets::Names(names) => row(f, "targets", names.join(", "))?,
            Targets::Pattern(pattern) => row(f, "targets", format_args!("what `{pattern}` matches"))?,
            Targets::AllLinear => row(f, "targets", "all linear layers")?,
        }
        row(f, "parameters", count(self.parameters))?;
        for (name, layers) in &self.layers {
            row(f, name, format_args!("{layers} x"))?;
        }
        self.warnings.iter().try_for_each(|warning| row(f, "warning", warning))
    }
}
