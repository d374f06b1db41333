//! Reports a finished conversion: its guarantees, and its losses compared with static pruning.

use std::collections::BTreeMap;

use serde::Serialize;

use super::compare::{Comparison, LayerReport};
use super::load::{idle, idle_warning};
use super::settings::{Method, Partition, Refit, RouterKind, Settings, SplitShape};
use super::split::Split;
use crate::error::{Error, Result};
use crate::model::config::MoeConfig;
use crate::model::family::{MixtureFormat, MixtureShape};
use crate::model::{DecoderConfig, Pretrained};

/// What follows where text that a router was made from sends nothing to an expert, and what to do.
pub(super) const NEEDLESS: &str = "so they take memory and do nothing; give more or more varied text in `calibration.data`, \
ask for fewer `upcycle.experts`, or choose another `upcycle.router`";

/// A promise about the written model, and whether it was found to hold.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Guarantee {
    /// What should be so.
    pub what: String,
    /// Whether it is promised here; otherwise it was only measured.
    pub promised: bool,
    /// Whether it is so.
    pub holds: bool,
    /// The largest difference between two logits.
    pub max_logit_difference: Option<f64>,
    /// The largest logit there is.
    pub largest_logit: Option<f64>,
    /// The difference between the mean losses.
    pub nll_difference: f64,
}

/// A head that the dense model shares with its embedding and the mixture stores as a tensor of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Untied {
    /// Rows of the new tensor.
    pub vocab: usize,
    /// Columns of the new tensor.
    pub hidden: usize,
    /// The new tensor makes the result larger by this many bytes.
    pub bytes: usize,
}

impl Untied {
    /// Compares the dense model with the configuration `config` of the mixture.
    pub(super) fn of(base: &Pretrained, config: &DecoderConfig) -> Option<Self> {
        let (vocab, hidden) = (config.vocab_size, config.hidden_size);
        let bytes = vocab * hidden * base.compute_dtype().size_in_bytes();
        let is_new = base.config().tie_word_embeddings && !config.tie_word_embeddings;
        is_new.then_some(Self { vocab, hidden, bytes })
    }
}

/// What fitting the down projections once more changed in files that had been verified without it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Refitted {
    /// Tensors that were written again.
    pub tensors: usize,
    /// All other tensors.
    pub untouched: usize,
    /// Whether these were read before and after, and found to be the same to the byte.
    pub compared: bool,
    /// `|new - old| / |old|` of the down projection of each converted layer.
    pub changes: BTreeMap<usize, f64>,
}

/// What a conversion did.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// The program and its version.
    pub tool: String,
    /// The dense model.
    pub base: String,
    /// What was done.
    pub method: Method,
    /// The family that was written; `None`: the dense model's own.
    pub format: Option<MixtureFormat>,
    /// Slices, copies, or all experts of an expanded mixture.
    pub experts: usize,
    /// The number of these experts that are always on.
    pub shared: usize,
    /// The number of routed experts that a token uses.
    pub active: usize,
    /// Neurons of an expert.
    pub expert_width: usize,
    /// The share of the neurons of a converted layer that a token goes through.
    pub active_share: f64,
    /// The experts that the new ones of each layer are copies of, in an expanded mixture.
    pub copied: BTreeMap<usize, Vec<usize>>,
    /// Layers that stay dense.
    pub dense_layers: Vec<usize>,
    /// How neurons were shared out.
    pub partition: Option<Partition>,
    /// How the router came to be.
    pub router: Option<RouterKind>,
    /// What the down projections were fitted to.
    pub refit: Refit,
    /// Tokens that were learned from.
    pub calibration_tokens: usize,
    /// Tokens that were measured on.
    pub held_out_tokens: usize,
    /// Seconds of the conversion, with the rivals measured on the way, without reading back.
    pub seconds: f64,
    /// What was promised, and whether it holds.
    pub guarantees: Vec<Guarantee>,
    /// What the fit changed.
    pub refitted: Option<Refitted>,
    /// Losses on held-out text, then on that of further files, then on the built-in text.
    pub comparisons: Vec<Comparison>,
    /// Each converted layer.
    pub layers: Vec<LayerReport>,
    /// The head, where it became a tensor of its own.
    pub untied: Option<Untied>,
    /// States in words what the losses mean.
    pub conclusion: Vec<String>,
    /// Warns of what the user should look at before using the result.
    pub warnings: Vec<String>,
}

impl Report {
    /// Begins a report with the model and the method; all results are still empty.
    fn begun(base: &Pretrained, settings: &Settings) -> Self {
        Self {
            tool: concat!("peft ", env!("CARGO_PKG_VERSION")).to_string(),
            base: base.name().to_string(),
            method: settings.method,
            format: None,
            experts: 0,
            shared: 0,
            active: 0,
            expert_width: 0,
            active_share: 0.0,
            copied: BTreeMap::new(),
            dense_layers: Vec::new(),
            partition: None,
            router: None,
            refit: Refit::None,
            calibration_tokens: 0,
            held_out_tokens: 0,
            seconds: 0.0,
            guarantees: Vec::new(),
            refitted: None,
            comparisons: Vec::new(),
            layers: Vec::new(),
            untied: None,
            conclusion: Vec::new(),
            warnings: Vec::new(),
        }
    }

    /// Begins the report of a split that is not verified yet.
    pub(super) fn new(
        base: &Pretrained,
        settings: &Settings,
        shape: &SplitShape,
        format: Option<MixtureFormat>,
        (calibration_tokens, held_out_tokens): (usize, usize),
        split: &Split,
    ) -> Self {
        let is_split = settings.method == Method::Split;
        Self {
            format,
            experts: shape.shared + shape.routed,
            shared: shape.shared,
            active: shape.active,
            expert_width: shape.width,
            active_share: shape.active_width() as f64 / shape.neurons as f64,
            dense_layers: numbers_of(&shape.dense),
            partition: is_split.then_some(settings.partition),
            router: is_split.then_some(settings.router),
            refit: settings.refit,
            calibration_tokens,
            held_out_tokens,
            comparisons: split.comparisons.clone(),
            layers: split.reports.clone(),
            ..Self::begun(base, settings)
        }
    }

    /// Begins the report of a mixture of copies that is not verified yet.
    pub(super) fn of_copies(
        base: &Pretrained,
        settings: &Settings,
        shape: &MixtureShape,
        format: MixtureFormat,
    ) -> Self {
        Self {
            format: Some(format),
            experts: shape.experts,
            active: shape.active,
            expert_width: shape.width,
            active_share: settings.active as f64,
            dense_layers: numbers_of(&shape.dense),
            router: Some(settings.router),
            ..Self::begun(base, settings)
        }
    }

    /// Begins the report of an expanded mixture that is not verified yet.
    pub(super) fn of_expansion(
        base: &Pretrained,
        settings: &Settings,
        moe: &MoeConfig,
        (calibration_tokens, held_out_tokens): (usize, usize),
        copied: BTreeMap<usize, Vec<usize>>,
    ) -> Self {
        let experts = moe.experts + settings.experts;
        let is_dense = |layer: &usize| !copied.contains_key(layer);
        Self {
            experts,
            shared: moe.shared.map_or(0, |shared| shared.width / moe.width),
            active: moe.active,
            expert_width: moe.width,
            active_share: moe.active as f64 / experts as f64,
            dense_layers: (0..base.config().layers.len()).filter(is_dense).collect(),
            copied,
            calibration_tokens,
            held_out_tokens,
            ..Self::begun(base, settings)
        }
    }

    /// Warns of experts that the router sends no token of the calibration text to.
    pub(super) fn idle_experts(&self) -> Option<String> {
        let layers = self.layers.iter().map(|layer| (layer.layer, layer.calibration_load.as_slice()));
        let tokens = self.layers.first()?.calibration_load.iter().sum::<usize>() / self.active.max(1);
        idle_warning(&idle(layers), &format!("{tokens} calibration tokens"), NEEDLESS)
    }

    /// An error if a promise is broken.
    pub(super) fn refuse_broken(&self) -> Result<()> {
        match self.guarantees.iter().find(|guarantee| guarantee.promised && !guarantee.holds) {
            None => Ok(()),
            Some(Guarantee { what, max_logit_difference, nll_difference, .. }) => {
                let logits = max_logit_difference
                    .map_or(String::new(), |d| format!("logits differ by up to {d:.2e}, "));
                Err(Error::invalid(format!(
                    "the written model fails the check \"{what}\": {logits}the loss differs by {nll_difference:.2e}; \
                     nothing was kept"
                ))
                .with_hint("this is a fault of the program or of the machine; `upcycle.verify = false` writes all the same"))
            }
        }
    }
}

/// Lists the numbers of the layers for which `dense` is true.
fn numbers_of(dense: &[bool]) -> Vec<usize> {
    (0..dense.len()).filter(|layer| dense[*layer]).collect()
}
