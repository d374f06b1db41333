//! The account of a conversion: what was promised and kept, and what it cost beside static pruning.

use std::collections::BTreeMap;
use std::fmt::Write;

use serde::Serialize;

use super::compare::{Comparison, LayerReport};
use super::paired::{Difference, Loss};
use super::settings::{Method, Partition, Refit, RouterKind, Settings, SplitShape};
use super::split::Split;
use crate::error::{Error, Result};
use crate::model::Pretrained;
use crate::model::config::MoeConfig;
use crate::model::family::{MixtureFormat, MixtureShape};

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

impl Refitted {
    fn line(&self) -> String {
        let Self { tensors, untouched, compared, changes } = self;
        if *tensors == 0 {
            return "no fit of down projections left less error, so none was changed".to_string();
        }
        let percent = 100.0 * changes.values().sum::<f64>() / changes.len().max(1) as f64;
        let others = if *compared { "compared and the same to the byte" } else { "not compared" };
        format!(
            "then down projections were fitted to few experts being on: {tensors} tensors written again, changed by \
             {percent:.1}% in the mean of layers, {untouched} others {others}; with all experts on it is no longer the dense \
             model (`refit = \"none\"` keeps that)"
        )
    }
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
    /// Slices, copies, or all experts of a mixture that got some more.
    pub experts: usize,
    /// Those always on.
    pub shared: usize,
    /// Those routed to, of a token.
    pub active: usize,
    /// Neurons of an expert.
    pub expert_width: usize,
    /// The share of the neurons of a converted layer that a token goes through.
    pub active_share: f64,
    /// Of a mixture that got experts more, those that the new ones of each layer are copies of.
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
    /// Losses on held-out text, then on that of further files.
    pub comparisons: Vec<Comparison>,
    /// Each converted layer.
    pub layers: Vec<LayerReport>,
}

impl Report {
    /// Nothing but what is converted and how.
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
        }
    }

    /// Of a split, before it is verified.
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

    /// Of copies, before it is verified.
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

    /// Of a mixture with experts more, before it is verified.
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

    /// An error if a promise is broken.
    pub(super) fn refuse_broken(&self) -> Result<()> {
        match self.guarantees.iter().find(|guarantee| guarantee.promised && !guarantee.holds) {
            None => Ok(()),
            Some(Guarantee { what, max_logit_difference, nll_difference, .. }) => {
                let logits = max_logit_difference
                    .map_or(String::new(), |d| format!("logits differ by up to {d:.2e}, "));
                Err(Error::invalid(format!(
                    "the written model does not keep its promise \"{what}\": {logits}the loss by {nll_difference:.2e}; nothing was kept"
                ))
                .with_hint("this is a fault of the program or of the machine; `upcycle.verify = false` writes all the same"))
            }
        }
    }

    /// The account in lines, Markdown.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = format!("# {} -> {}\n\n", self.base, self.form());
        for line in self.lines() {
            let _ = writeln!(text, "- {line}");
        }
        for comparison in &self.comparisons {
            let Comparison { tokens, window_tokens, .. } = comparison;
            let windows = window_tokens.len();
            let _ = write!(text, "\n## Loss on {tokens} tokens {}, {windows} windows\n\n", place(comparison));
            text += "| | nll | perplexity | above dense |\n|---|---|---|---|\n";
            for (name, Loss { nll, perplexity, above_dense, .. }) in rows(comparison) {
                let _ = writeln!(text, "| {name} | {nll:.4} | {perplexity:.2} | {above_dense} |");
            }
            if comparison.mixture_less_pruned.is_some() {
                text += "\nPaired by window, ± the standard error over windows:\n\n";
            }
            for (name, difference) in pairs(comparison) {
                let _ = writeln!(text, "- {name}: {difference}");
            }
        }
        if !self.layers.is_empty() {
            text += "\n## Layers, on held-out text of the dense model\n\n";
            text += "| layer | relative error | energy recalled | hit rate | load variation | least, most load | always on | refit leaves | refit changes |\n";
            text += "|---|---|---|---|---|---|---|---|---|\n";
            for layer in &self.layers {
                let least = layer.load.iter().copied().fold(f64::INFINITY, f64::min);
                let most = layer.load.iter().copied().fold(0.0, f64::max);
                let left = layer.refit_left.map_or("-".to_string(), |left| format!("{left:.3}"));
                let change = self.refitted.as_ref().and_then(|refitted| refitted.changes.get(&layer.layer));
                let change = change.map_or("-".to_string(), |change| format!("{change:.3}"));
                let _ = writeln!(
                    text,
                    "| {} | {:.4} | {:.3} | {:.3} | {:.2} | {least:.2}, {most:.2} | {} | {left} | {change} |",
                    layer.layer,
                    layer.relative_error,
                    layer.recall,
                    layer.hit_rate,
                    layer.load_variation,
                    layer.guarded
                );
            }
        }
        text
    }

    fn form(&self) -> String {
        match self.format {
            Some(format) => format!("`{}`", format.name()),
            None => "the same family".to_string(),
        }
    }

    /// What one has to know, a line each.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        let mut lines = vec![format!(
            "{} of {} slices of {} neurons: {} shared, {} of {} routed per token ({:.0}% of the neurons), {} layers dense",
            self.shared + self.active,
            self.experts,
            self.expert_width,
            self.shared,
            self.active,
            self.experts - self.shared,
            100.0 * self.active_share,
            self.dense_layers.len()
        )];
        if self.method != Method::Split {
            lines.clear();
        }
        if let Some(new) = self.copied.values().map(Vec::len).next() {
            lines.push(format!(
                "{} experts in each of {} layers, {new} more than before",
                self.experts,
                self.copied.len()
            ));
        }
        for guarantee in &self.guarantees {
            let state = match (guarantee.holds, guarantee.promised) {
                (true, _) => "holds",
                (false, true) => "BROKEN",
                (false, false) => "does not hold, and is not promised",
            };
            let logits =
                guarantee.max_logit_difference.map_or(String::new(), |d| format!("logits within {d:.1e}, "));
            lines.push(format!(
                "{}: {state} ({logits}loss {:+.1e})",
                guarantee.what, guarantee.nll_difference
            ));
        }
        lines.extend(self.refitted.as_ref().map(Refitted::line));
        for comparison in &self.comparisons {
            if comparison.file.is_some() {
                lines.push(format!("{} tokens {}:", comparison.tokens, place(comparison)));
            }
            for (name, Loss { nll, perplexity, .. }) in rows(comparison) {
                lines.push(format!("{name}: nll {nll:.4}, perplexity {perplexity:.2}"));
            }
            for (name, difference) in pairs(comparison) {
                lines.push(format!("{name}: {difference} nats per token, paired by window"));
            }
        }
        lines
    }
}

/// The layers that are.
fn numbers_of(dense: &[bool]) -> Vec<usize> {
    (0..dense.len()).filter(|layer| dense[*layer]).collect()
}

fn place(comparison: &Comparison) -> String {
    match &comparison.file {
        None => "held out of the calibration data".to_string(),
        Some(file) => format!("of `{file}`"),
    }
}

fn rows(comparison: &Comparison) -> Vec<(&'static str, &Loss)> {
    let Comparison { dense, pruned, pruned_refit, mixture, oracle, .. } = comparison;
    let mut rows = vec![("dense", dense)];
    rows.extend(pruned.iter().map(|loss| ("static pruning, as many neurons", loss)));
    rows.extend(pruned_refit.iter().map(|loss| ("static pruning, refitted", loss)));
    rows.extend(mixture.iter().map(|loss| ("mixture of experts", loss)));
    rows.extend(oracle.iter().map(|loss| ("mixture, oracle router", loss)));
    rows
}

fn pairs(comparison: &Comparison) -> Vec<(&'static str, Difference)> {
    let Comparison { mixture_less_pruned, mixture_less_pruned_refit, .. } = comparison;
    let of = |name, difference: &Option<Difference>| difference.map(|difference| (name, difference));
    [
        of("mixture less static pruning", mixture_less_pruned),
        of("mixture less static pruning, refitted", mixture_less_pruned_refit),
    ]
    .into_iter()
    .flatten()
    .collect()
}
