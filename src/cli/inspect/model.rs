//! A model: its decoder, and how its weights are stored.

use std::collections::BTreeMap;
use std::fmt::{self, Display};

use serde::Serialize;

use super::row;
use crate::error::Result;
use crate::model::Pretrained;
use crate::model::config::{DecoderConfig, FeedForwardConfig, LayerConfig};
use crate::run::figures::{bytes, count};

/// What there is to know of a model.
#[derive(Debug, Serialize)]
pub(super) struct Model {
    source: String,
    model_type: String,
    parameters: u64,
    vocab_size: usize,
    hidden_size: usize,
    max_position_embeddings: usize,
    tie_word_embeddings: bool,
    layers: Vec<LayerGroup>,
    linears: Vec<LinearGroup>,
    tensors: usize,
    /// Bytes on disk by the type they are stored as.
    stored: BTreeMap<String, u64>,
    chat_template: bool,
    /// Warns of contradictions in the model's files and of tensors that are left aside.
    warnings: Vec<String>,
    /// Why it cannot be used as it is.
    problems: Vec<String>,
}

/// Layers of the same make.
#[derive(Debug, Serialize)]
struct LayerGroup {
    layers: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    window: Option<usize>,
    qk_norm: bool,
    width: usize,
    activation: String,
    experts: Option<ExpertGroup>,
}

/// What a sparse layer has beside.
#[derive(Debug, Serialize)]
struct ExpertGroup {
    experts: usize,
    active: usize,
    shared_width: Option<usize>,
}

/// Linear layers of the same name and shape.
#[derive(Debug, Serialize)]
struct LinearGroup {
    name: String,
    out_features: usize,
    in_features: usize,
    bias: bool,
    layers: usize,
}

impl Model {
    pub(super) fn read(source: &str) -> Result<Self> {
        let pretrained = Pretrained::open(source)?;
        let config = pretrained.config();
        let mut stored = BTreeMap::new();
        for info in pretrained.checkpoint().tensors().values() {
            *stored.entry(info.dtype.to_string()).or_default() += info.size_in_bytes() as u64;
        }
        let text = pretrained.text();
        let chat_template = text.as_ref().is_ok_and(|text| text.chat_template.is_some());
        let problems = [pretrained.check().err(), text.err()].into_iter().flatten();
        Ok(Self {
            source: pretrained.name().to_string(),
            model_type: pretrained.config_json()["model_type"].as_str().unwrap_or_default().to_string(),
            parameters: config.num_parameters() as u64,
            vocab_size: config.vocab_size,
            hidden_size: config.hidden_size,
            max_position_embeddings: config.max_position_embeddings,
            tie_word_embeddings: config.tie_word_embeddings,
            layers: layer_groups(&config.layers),
            linears: linear_groups(config),
            tensors: pretrained.checkpoint().tensors().len(),
            stored,
            chat_template,
            warnings: pretrained.warnings().to_vec(),
            problems: problems.map(|error| error.to_string()).collect(),
        })
    }
}

/// Layers that follow each other and are the same.
fn layer_groups(layers: &[LayerConfig]) -> Vec<LayerGroup> {
    layers
        .chunk_by(|one, next| one == next)
        .map(|same| {
            let LayerConfig { attention, feed_forward } = &same[0];
            let (width, activation, experts) = match feed_forward {
                FeedForwardConfig::Dense { width, activation, .. } => (*width, *activation, None),
                FeedForwardConfig::Sparse(moe) => {
                    let shared_width = moe.shared.map(|shared| shared.width);
                    let group = ExpertGroup { experts: moe.experts, active: moe.active, shared_width };
                    (moe.width, moe.activation, Some(group))
                }
            };
            LayerGroup {
                layers: same.len(),
                heads: attention.num_heads,
                kv_heads: attention.num_kv_heads,
                head_dim: attention.head_dim,
                window: attention.window,
                qk_norm: attention.qk_norm.is_some(),
                width,
                activation: format!("{activation:?}").to_lowercase(),
                experts,
            }
        })
        .collect()
}

fn linear_groups(config: &DecoderConfig) -> Vec<LinearGroup> {
    let mut groups: Vec<LinearGroup> = Vec::new();
    for linear in config.linears() {
        let key = (linear.name(), linear.out_features, linear.in_features, linear.bias);
        match groups.iter_mut().find(|g| (g.name.as_str(), g.out_features, g.in_features, g.bias) == key) {
            Some(group) => group.layers += 1,
            None => {
                let (name, out_features, in_features, bias) = key;
                groups.push(LinearGroup {
                    name: name.to_string(),
                    out_features,
                    in_features,
                    bias,
                    layers: 1,
                });
            }
        }
    }
    groups
}

impl Display for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        row(f, "model", &self.source)?;
        row(f, "family", &self.model_type)?;
        row(f, "parameters", count(self.parameters))?;
        row(f, "vocabulary", count(self.vocab_size as u64))?;
        row(f, "hidden size", self.hidden_size)?;
        row(f, "positions", self.max_position_embeddings)?;
        row(f, "head", if self.tie_word_embeddings { "tied to the embedding" } else { "its own weight" })?;
        row(f, "chat template", if self.chat_template { "yes" } else { "none" })?;
        let stored: Vec<String> =
            self.stored.iter().map(|(t, size)| format!("{} of {t}", bytes(*size))).collect();
        row(f, "weights", format_args!("{} tensors, {}", self.tensors, stored.join(", ")))?;
        for group in &self.layers {
            row(f, "layers", group)?;
        }
        for group in &self.linears {
            row(f, &group.name, group)?;
        }
        self.warnings.iter().try_for_each(|warning| row(f, "warning", warning))?;
        self.problems.iter().try_for_each(|problem| row(f, "problem", problem))
    }
}

impl Display for LayerGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { layers, heads, kv_heads, head_dim, window, qk_norm, width, activation, experts } = self;
        write!(f, "{layers} x {heads} heads of {head_dim} ({kv_heads} for keys and values)")?;
        if let Some(window) = window {
            write!(f, ", window {window}")?;
        }
        if *qk_norm {
            f.write_str(", normalised queries and keys")?;
        }
        let Some(ExpertGroup { experts, active, shared_width }) = experts else {
            return write!(f, ", feed-forward {width} ({activation})");
        };
        write!(f, ", {active} of {experts} experts of {width} ({activation})")?;
        match shared_width {
            Some(shared) => write!(f, ", shared {shared}"),
            None => Ok(()),
        }
    }
}

impl Display for LinearGroup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { out_features, in_features, bias, layers, .. } = self;
        let bias = if *bias { " with bias" } else { "" };
        write!(f, "{layers} x [{out_features}, {in_features}]{bias}")
    }
}
