//! The tools whose configurations are converted: how each is recognised, and what it does with keys that are left out.

use std::path::Path;

use super::yaml::{self, Entry, Value, find};
use crate::error::{Context, Error, Result};

/// A tool whose configurations are converted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tool {
    /// axolotl
    Axolotl,
    /// LLaMA-Factory
    LlamaFactory,
    /// mlx-lm, `mlx_lm.lora`
    MlxLm,
}

impl Tool {
    const ALL: [Self; 3] = [Self::Axolotl, Self::LlamaFactory, Self::MlxLm];

    /// The name that people know it by.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Axolotl => "axolotl",
            Self::LlamaFactory => "LLaMA-Factory",
            Self::MlxLm => "mlx-lm",
        }
    }

    /// Keys that its configurations have, and those of the others have not.
    fn telltales(self) -> &'static [&'static str] {
        match self {
            Self::Axolotl => &[
                "base_model",
                "datasets",
                "micro_batch_size",
                "sequence_len",
                "lora_r",
                "num_epochs",
                "val_set_size",
                "sample_packing",
                "lora_target_linear",
                "train_on_inputs",
                "dataset_prepared_path",
            ],
            Self::LlamaFactory => &[
                "finetuning_type",
                "stage",
                "cutoff_len",
                "lora_target",
                "lora_rank",
                "template",
                "dataset_dir",
                "val_size",
                "neat_packing",
                "train_on_prompt",
                "model_name_or_path",
            ],
            Self::MlxLm => &[
                "iters",
                "lora_parameters",
                "fine_tune_type",
                "num_layers",
                "lora_layers",
                "steps_per_eval",
                "steps_per_report",
                "grad_checkpoint",
                "adapter_path",
                "val_batches",
                "model",
                "data",
            ],
        }
    }

    /// The tool that has the most of these keys, and two of them at least.
    pub(super) fn of(entries: &[Entry]) -> Option<Self> {
        let has = |tool: Self| {
            tool.telltales().iter().filter(|key| entries.iter().any(|entry| entry.key == **key)).count()
        };
        Self::ALL.into_iter().filter(|tool| has(*tool) >= 2).max_by_key(|tool| has(*tool))
    }

    /// The tool that a text is a configuration of; `None` where it is of none of them.
    #[must_use]
    pub fn of_text(text: &str) -> Option<Self> {
        Self::of(&yaml::parse(Path::new(""), text).ok()?)
    }

    /// What it does where a key is left out, as our key says it, wherever we do otherwise.
    pub(super) fn defaults(self) -> &'static [(&'static str, &'static str)] {
        match self {
            Self::Axolotl => &[
                ("data.max_length", "512"),
                ("data.pack", "false"),
                ("train.epochs", "1.0"),
                ("train.batch_size", "1"),
                ("train.warmup", "0.03"),
            ],
            Self::LlamaFactory => &[
                ("adapter.rank", "8"),
                ("adapter.targets", "\"all-linear\""),
                ("data.max_length", "2048"),
                ("data.pack", "false"),
                ("train.batch_size", "8"),
                ("train.learning_rate", "5e-5"),
                ("train.schedule", "\"linear\""),
                ("train.warmup", "0.0"),
                ("train.save_every", "500"),
            ],
            Self::MlxLm => &[
                ("adapter.rank", "8"),
                ("adapter.targets", "\"all-linear\""),
                ("data.max_length", "2048"),
                ("data.pack", "false"),
                ("data.train_on", "\"all\""),
                ("train.steps", "1000"),
                ("train.learning_rate", "1e-5"),
                ("train.schedule", "\"constant\""),
                ("train.warmup", "0.0"),
                ("train.max_grad_norm", "0.0"),
                ("train.eval_every", "200"),
                ("train.save_every", "100"),
                ("seed", "0"),
            ],
        }
    }

    /// Alpha of a rank where the configuration leaves it out.
    pub(super) fn alpha(self, rank: i64) -> Option<f64> {
        match self {
            Self::Axolotl => None,
            Self::LlamaFactory => Some(2.0 * rank as f64),
            Self::MlxLm => Some(20.0 * rank as f64),
        }
    }

    /// Refuses a configuration of which a recipe would train something else.
    pub(super) fn refuse_other_work(self, path: &Path, entries: &[Entry]) -> Result<()> {
        let keys: &[(&str, &[&str])] = match self {
            Self::Axolotl => &[
                ("adapter", &["lora", "qlora"]),
                ("rl", &[]),
                ("reward_model", &["false"]),
                ("relora", &["false"]),
            ],
            Self::LlamaFactory => &[("stage", &["sft", "pt"]), ("finetuning_type", &["lora", "full"])],
            Self::MlxLm => &[
                ("fine_tune_type", &["lora", "dora", "full"]),
                ("training_mode", &["normal", "sft"]),
                ("train_mode", &["normal", "sft"]),
            ],
        };
        for (key, values) in keys {
            let Some(Entry { line, value, .. }) = find(entries, key) else { continue };
            if !values.contains(&value.text().as_str()) {
                let error = Error::request(format!("`{key}: {}` is not built", value.text()));
                let hint = "recipes train low-rank adapters, or all weights, on texts and answers";
                return Err(error.with_hint(hint)).at_line(path, *line);
            }
        }
        Ok(())
    }

    /// Whether all weights are trained.
    pub(super) fn is_full(self, entries: &[Entry]) -> bool {
        let is =
            |key, kind: &str| matches!(find(entries, key), Some(Entry { value, .. }) if value.text() == kind);
        match self {
            Self::Axolotl => find(entries, "adapter").is_none(),
            Self::LlamaFactory => is("finetuning_type", "full"),
            Self::MlxLm => is("fine_tune_type", "full"),
        }
    }

    /// Whether it evaluates, as far as the configuration says.
    pub(super) fn evaluates(self, entries: &[Entry]) -> bool {
        let keys: &[&str] = match self {
            Self::Axolotl => &["val_set_size", "test_datasets"],
            Self::LlamaFactory => &["val_size", "eval_dataset"],
            Self::MlxLm => return true,
        };
        let says = |key: &&str| find(entries, key).is_some_and(|entry| entry.value != Value::Integer(0));
        keys.iter().any(says)
    }
}
