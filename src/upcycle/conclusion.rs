//! Says in words what the losses of an account mean. Other text decides, because held-out text resembles the text that
//! was fitted to.

use super::compare::Comparison;
use super::paired::{Difference, Loss};
use super::settings::Method;
use super::windows::Origin;

/// Differences smaller than this, in nats per token, count as none.
const SMALL: f64 = 1e-3;
/// A model that has lost more than this, in nats per token, is to be trained before it is used.
const LARGE: f64 = 0.05;
/// The cost on other text is called larger if it is more than this many times the cost on held-out text.
const TIMES: f64 = 1.5;

/// Says whether a difference of losses makes a model better, equal or worse.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Better,
    Equal,
    Worse,
}

impl Verdict {
    /// A difference of less than two standard errors is none.
    fn of(difference: &Difference) -> Self {
        let within = 2.0 * difference.standard_error.unwrap_or(0.0);
        match difference.mean {
            mean if mean.abs() <= within.max(SMALL) => Self::Equal,
            mean if mean < 0.0 => Self::Better,
            _ => Self::Worse,
        }
    }

    fn than(self) -> &'static str {
        match self {
            Self::Better => "better than",
            Self::Equal => "as good as",
            Self::Worse => "worse than",
        }
    }
}

/// The losses of a conversion with the facts that are needed to explain them.
pub(super) struct Conclusion<'a> {
    pub(super) method: Method,
    /// Whether anything was fitted to text.
    pub(super) is_calibrated: bool,
    /// Tokens that the model knows.
    pub(super) vocab: usize,
    pub(super) comparisons: &'a [Comparison],
}

impl Conclusion<'_> {
    /// The conclusion in sentences, a line each.
    pub(super) fn lines(&self) -> Vec<String> {
        let measured = |text: &Comparison| result(text).map(|loss| Verdict::of(&loss.above_dense));
        let guessing = (self.vocab as f64).ln();
        let measurements = self.comparisons.iter().filter(|text| measured(text).is_some());
        // Where the dense model does not know the kind of text at all, nothing can be lost.
        let (known, unknown): (Vec<_>, Vec<_>) = measurements.partition(|text| text.dense.nll < guessing);
        let (held_out, others): (Vec<_>, Vec<_>) =
            known.into_iter().partition(|text| text.origin == Origin::HeldOut);
        let mut lines: Vec<String> = others.iter().filter_map(|text| self.sentence(text)).collect();
        lines.extend(unknown.iter().map(|text| {
            format!(
                "{} says nothing of what was lost: {} is no better there than guessing (nll {:.3}, guessing {guessing:.3})",
                place(text),
                self.reference(),
                text.dense.nll
            )
        }));
        let above = |text: &Comparison| result(text).map_or(0.0, |loss| loss.above_dense.mean);
        let worst = others.iter().map(|text| above(text)).fold(f64::NEG_INFINITY, f64::max);
        if let Some(text) = held_out.first() {
            let is_better = measured(text) == Some(Verdict::Better);
            let is_better_elsewhere =
                !others.is_empty() && others.iter().all(|text| measured(text) == Some(Verdict::Better));
            if is_better && !is_better_elsewhere {
                lines.insert(0, self.beaten_by_fitting(text, others.is_empty()));
            } else if others.is_empty() {
                lines.extend(self.sentence(text));
            } else if worst > SMALL.max(TIMES * above(text)) {
                lines.push(format!(
                    "on text held out of the calibration data, which is like what was fitted to, the difference is only \
                     {}: expect the larger one on text of other kinds",
                    result(text).map_or(String::new(), |loss| loss.above_dense.to_string())
                ));
            }
            if others.is_empty() {
                lines.push(
                    "no text unlike the calibration text was measured, so nothing is known of other text; name files in \
                     `calibration.eval`"
                        .to_string(),
                );
            }
        }
        if worst > LARGE && self.method != Method::Expand {
            lines.push(
                "train it before you use it, with `peft finetune` on text of all the kinds that it is for; `[distill]` takes \
                 the dense model as its teacher"
                    .to_string(),
            );
        }
        lines
    }

    /// Describes in a sentence the losses of the new model on a text; `None` where it was not measured.
    fn sentence(&self, text: &Comparison) -> Option<String> {
        let found = result(text)?;
        let unlike = match text.origin {
            Origin::Neutral if self.is_calibrated => ", which is unlike the calibration text,",
            _ => "",
        };
        let beside = match text.mixture_less_pruned_refit.as_ref().or(text.mixture_less_pruned.as_ref()) {
            None => String::new(),
            Some(difference) => {
                let than = Verdict::of(difference).than();
                format!("; it is {than} static pruning to as many neurons ({difference})")
            }
        };
        Some(format!(
            "on {}{unlike} {} is {} {}: nll {:.3} for {:.3}, perplexity {:.2} for {:.2} ({} nats per token){beside}",
            place(text),
            self.subject(),
            Verdict::of(&found.above_dense).than(),
            self.reference(),
            found.nll,
            text.dense.nll,
            found.perplexity,
            text.dense.perplexity,
            found.above_dense
        ))
    }

    /// Explains that a gain on held-out text alone is no gain in general.
    fn beaten_by_fitting(&self, held_out: &Comparison, is_all: bool) -> String {
        let elsewhere = if is_all { "which is all that it was measured on" } else { "and not on other text" };
        let difference = result(held_out).map_or(String::new(), |loss| loss.above_dense.to_string());
        format!(
            "{} is better than {} ({difference} nats per token) on text like what it was fitted to, {elsewhere}: this is \
             no gain in general",
            self.subject(),
            self.reference()
        )
    }

    fn subject(&self) -> &'static str {
        match self.method {
            Method::Prune => "the pruned model",
            Method::Expand => "the mixture with its new experts",
            _ => "the mixture",
        }
    }

    fn reference(&self) -> &'static str {
        if self.method == Method::Expand { "the mixture before" } else { "the dense model" }
    }
}

/// The loss of what was made.
fn result(comparison: &Comparison) -> Option<&Loss> {
    let Comparison { mixture, pruned_refit, pruned, .. } = comparison;
    mixture.as_ref().or(pruned_refit.as_ref()).or(pruned.as_ref())
}

/// Names the text of a comparison within a sentence.
pub(super) fn place(comparison: &Comparison) -> String {
    match (comparison.origin, &comparison.file) {
        (Origin::HeldOut, _) => "text held out of the calibration data".to_string(),
        (Origin::Neutral, _) => "the built-in neutral text".to_string(),
        (Origin::File, file) => format!("`{}`", file.as_deref().unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::upcycle::windows::{Text, Windows};

    /// A text of two windows on which the dense model has a loss of 3 a token.
    fn text(origin: Origin, file: Option<&str>, mixture: [f64; 2]) -> Comparison {
        let windows = vec![Windows { tokens: vec![0; 22], offsets: vec![0, 11, 22] }];
        let text = Text { origin, file: file.map(str::to_string), windows, repeated: 0 };
        Comparison::of_whole(&text, vec![30.0, 30.0], mixture.map(|loss| 10.0 * loss).to_vec())
    }

    fn lines(method: Method, comparisons: &[Comparison]) -> String {
        Conclusion { method, is_calibrated: true, vocab: 1024, comparisons }.lines().join("\n")
    }

    #[test]
    fn text_that_the_dense_model_does_not_know_decides_nothing() {
        let texts = [text(Origin::HeldOut, None, [2.8, 2.9]), text(Origin::Neutral, None, [2.0, 2.0])];
        let conclusion =
            Conclusion { method: Method::Split, is_calibrated: true, vocab: 20, comparisons: &texts[1..] };
        insta::assert_snapshot!(
            conclusion.lines().join("\n"),
            @"the built-in neutral text says nothing of what was lost: the dense model is no better there than guessing (nll 3.000, guessing 2.996)"
        );
    }

    #[test]
    fn a_gain_on_text_like_the_fitted_one_alone_is_called_that() {
        let texts = [text(Origin::HeldOut, None, [2.8, 2.9]), text(Origin::Neutral, None, [4.8, 4.96])];
        insta::assert_snapshot!(lines(Method::Split, &texts), @"
        the mixture is better than the dense model (-0.1500 ± 0.0500 nats per token) on text like what it was fitted to, and not on other text: this is no gain in general
        on the built-in neutral text, which is unlike the calibration text, the mixture is worse than the dense model: nll 4.880 for 3.000, perplexity 131.63 for 20.09 (+1.8800 ± 0.0800 nats per token)
        train it before you use it, with `peft finetune` on text of all the kinds that it is for; `[distill]` takes the dense model as its teacher
        ");
    }

    #[test]
    fn a_gain_on_all_text_is_a_gain() {
        let texts = [
            text(Origin::HeldOut, None, [2.8, 2.9]),
            text(Origin::File, Some("chats.jsonl"), [2.8, 2.7]),
            text(Origin::Neutral, None, [2.9, 2.95]),
        ];
        let told = lines(Method::Split, &texts);
        assert!(!told.contains("no gain"), "{told}");
        assert_eq!(told.matches("is better than the dense model").count(), 2, "{told}");
        // One other text on which it is not is enough.
        let texts = [&texts[..2], &[text(Origin::Neutral, None, [3.1, 2.9])]].concat();
        let told = lines(Method::Split, &texts);
        assert!(
            told.contains("is as good as the dense model") && told.contains("no gain in general"),
            "{told}"
        );
    }

    #[test]
    fn held_out_text_that_flatters_is_told() {
        let texts = [text(Origin::HeldOut, None, [3.1, 3.1]), text(Origin::Neutral, None, [3.4, 3.5])];
        insta::assert_snapshot!(lines(Method::Prune, &texts), @"
        on the built-in neutral text, which is unlike the calibration text, the pruned model is worse than the dense model: nll 3.450 for 3.000, perplexity 31.50 for 20.09 (+0.4500 ± 0.0500 nats per token)
        on text held out of the calibration data, which is like what was fitted to, the difference is only +0.1000 ± 0.0000: expect the larger one on text of other kinds
        train it before you use it, with `peft finetune` on text of all the kinds that it is for; `[distill]` takes the dense model as its teacher
        ");
        let even = [text(Origin::HeldOut, None, [3.4, 3.5]), text(Origin::Neutral, None, [3.4, 3.5])];
        assert!(!lines(Method::Split, &even).contains("held out"));
    }

    #[test]
    fn without_other_text_nothing_is_said_of_it() {
        let told = lines(Method::Split, &[text(Origin::HeldOut, None, [2.8, 2.9])]);
        assert!(
            told.contains("no gain in general") && told.contains("nothing is known of other text"),
            "{told}"
        );
        assert_eq!(lines(Method::Copy, &[]), "");
    }
}
