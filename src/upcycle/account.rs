//! The account of a conversion as people read it: `upcycle.md`, and the lines on the terminal.

use std::fmt::Write;

use super::compare::Comparison;
use super::conclusion::place;
use super::paired::{Difference, Loss};
use super::report::{Guarantee, Refitted, Report, Untied};
use super::settings::Method;

/// Explains the columns of the table of layers.
const COLUMNS: &str = "Inputs are the dense model's. Relative error: squared error of the layer's output, as a share of the \
output. Energy recalled: energy of the chosen experts, as a share of the best choice's. Hit rate: chosen experts that \
the best choice has too. Load: share of the tokens that an expert gets. Always on: neurons with massive activations. \
Refit leaves: the share of the error that the fit of down projections left.";

impl Report {
    /// The account as Markdown.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = format!("# {} -> {}\n", self.base, self.form());
        let mut facts = self.facts();
        facts.extend(self.untied.as_ref().map(Untied::line));
        for (title, lines) in
            [("Conclusion", &self.conclusion), ("Warnings", &self.warnings), ("Facts", &facts)]
        {
            if !lines.is_empty() {
                let _ = write!(text, "\n## {title}\n\n");
                for line in lines {
                    let _ = writeln!(text, "- {line}");
                }
            }
        }
        for comparison in &self.comparisons {
            self.write_comparison(&mut text, comparison);
        }
        if !self.layers.is_empty() {
            self.write_layers(&mut text);
        }
        text
    }

    fn write_comparison(&self, text: &mut String, comparison: &Comparison) {
        let Comparison { tokens, window_tokens, repeated_windows, .. } = comparison;
        let windows = window_tokens.len();
        let _ = write!(text, "\n## Loss on {tokens} tokens of {}, {windows} windows\n\n", place(comparison));
        if *repeated_windows > 0 {
            let _ = writeln!(
                text,
                "{repeated_windows} of these windows are for the most part in the text that was fitted to, too.\n"
            );
        }
        *text += "| | nll | perplexity | above dense |\n|---|---|---|---|\n";
        for (name, Loss { nll, perplexity, above_dense, .. }) in self.rows(comparison) {
            let _ = writeln!(text, "| {name} | {nll:.4} | {perplexity:.2} | {above_dense} |");
        }
        if comparison.mixture_less_pruned.is_some() {
            *text += "\nPaired by window, ± the standard error over windows:\n\n";
        }
        for (name, difference) in pairs(comparison) {
            let _ = writeln!(text, "- {name}: {difference}");
        }
    }

    fn write_layers(&self, text: &mut String) {
        let _ = write!(text, "\n## Layers, measured on the held-out text\n\n{COLUMNS}\n\n");
        *text += "| layer | relative error | energy recalled | hit rate | load variation | least, most load | always on | refit leaves | refit changes |\n";
        *text += "|---|---|---|---|---|---|---|---|---|\n";
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

    fn form(&self) -> String {
        match self.format {
            Some(format) => format!("`{}`", format.name()),
            None => "the same family".to_string(),
        }
    }

    /// Returns the result as lines: what was made, whether its guarantees hold, all losses, and the conclusion. Lines
    /// of the plan are not repeated.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        let mut lines = self.facts();
        for comparison in &self.comparisons {
            lines.push(format!("{} tokens of {}:", comparison.tokens, place(comparison)));
            for (name, Loss { nll, perplexity, .. }) in self.rows(comparison) {
                lines.push(format!("{name}: nll {nll:.4}, perplexity {perplexity:.2}"));
            }
            for (name, difference) in pairs(comparison) {
                lines.push(format!("{name}: {difference} nats per token, paired by window"));
            }
        }
        lines.extend(self.conclusion.iter().cloned());
        lines
    }

    fn facts(&self) -> Vec<String> {
        let mut lines = Vec::new();
        if self.method == Method::Split {
            lines.push(format!(
                "{} of {} slices of {} neurons: {} shared, {} of {} routed per token ({:.0}% of the neurons), {} layers dense",
                self.shared + self.active,
                self.experts,
                self.expert_width,
                self.shared,
                self.active,
                self.experts - self.shared,
                100.0 * self.active_share,
                self.dense_layers.len()
            ));
        }
        if let Some(new) = self.copied.values().map(Vec::len).next() {
            let layers = match self.copied.len() {
                1 => "1 layer has".to_string(),
                many => format!("{many} layers have"),
            };
            lines.push(format!("{layers} {} experts now, {new} of them new", self.experts));
        }
        lines.extend(self.guarantees.iter().map(Guarantee::line));
        lines.extend(self.refitted.as_ref().map(Refitted::line));
        lines
    }

    fn rows<'a>(&self, comparison: &'a Comparison) -> Vec<(&'static str, &'a Loss)> {
        let Comparison { dense, pruned, pruned_refit, mixture, oracle, .. } = comparison;
        let (before, after) = match self.method {
            Method::Expand => ("mixture before", "mixture with its new experts"),
            _ => ("dense", "mixture of experts"),
        };
        let mut rows = vec![(before, dense)];
        rows.extend(pruned.iter().map(|loss| ("static pruning to as many neurons", loss)));
        rows.extend(pruned_refit.iter().map(|loss| ("static pruning, refitted", loss)));
        rows.extend(mixture.iter().map(|loss| (after, loss)));
        rows.extend(oracle.iter().map(|loss| ("mixture, oracle router", loss)));
        rows
    }
}

impl Guarantee {
    fn line(&self) -> String {
        let state = match (self.holds, self.promised) {
            (true, _) => "true",
            (false, true) => "FALSE",
            (false, false) => "not true, and not promised for this method, family or type",
        };
        let logits = self.max_logit_difference.map_or(String::new(), |d| format!("logits within {d:.1e}, "));
        format!("{}: {state} ({logits}loss {:+.1e})", self.what, self.nll_difference)
    }
}

impl Refitted {
    fn line(&self) -> String {
        let Self { tensors, untouched, compared, changes } = self;
        if *tensors == 0 {
            return "no fit of down projections left less error, so the dense model's stay".to_string();
        }
        let percent = 100.0 * changes.values().sum::<f64>() / changes.len().max(1) as f64;
        let others = if *compared { "were compared and are byte-identical" } else { "were not compared" };
        format!(
            "down projections were then fitted to make up for the experts that are off: {tensors} tensors changed, by \
             {percent:.1}% in the mean of layers; the {untouched} others {others}. With all experts on, the result is \
             therefore no longer the dense model (`refit = \"none\"` keeps that)"
        )
    }
}

impl Untied {
    /// A sentence for the account and the plan.
    #[must_use]
    pub fn line(&self) -> String {
        let Self { vocab, hidden, bytes } = self;
        format!(
            "the embedding, which is the dense model's head too, is stored twice, for some programs do not tie the heads of \
             mixtures (`tie_word_embeddings = false`): {vocab} x {hidden} values more, {:.1} MiB",
            *bytes as f64 / f64::from(1 << 20)
        )
    }
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
