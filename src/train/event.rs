//! What a run says while it goes on. The library never prints: a [`Reporter`] decides what becomes of it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;

use crate::model::Spread;

/// One optimizer step; a line of `metrics.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct StepReport {
    /// The step just made, counted from 1.
    pub step: u64,
    /// Steps of the whole run.
    pub steps: u64,
    /// Passes over the training data so far.
    pub epoch: f64,
    /// Mean natural-log loss per supervised token, before the step.
    pub loss: f64,
    /// The rate that the step was made with.
    pub learning_rate: f64,
    /// Norm of all gradients together, before clipping.
    pub grad_norm: f64,
    /// Tokens seen by the step.
    pub tokens: u64,
    /// Of these, the tokens that carry a label.
    pub supervised_tokens: u64,
    /// Tokens per second of the step.
    pub tokens_per_second: f64,
    /// The highest resident memory of the process so far.
    pub peak_rss_bytes: u64,
    /// Mean divergence from the teacher per supervised token, without its coefficient; none where it does not count.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kl: Option<f64>,
    /// Mean relative distance of the hidden states from the teacher's, in the same way.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hidden: Option<f64>,
    /// Losses on routers by name, without their coefficients; none where none counts.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub router_losses: BTreeMap<&'static str, f64>,
    /// How the tokens were spread over the experts of each sparse layer.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub routing: Vec<Spread>,
}

/// A sample before or after training.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Sample {
    /// What the model was asked, as it sees it: after the chat template, special tokens written out.
    pub prompt: String,
    /// What it answered, greedily.
    pub completion: String,
}

/// What happens in a run.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// A fact about the run, a line of text: the plan, counts, where something was written.
    Note {
        /// The line.
        text: String,
    },
    /// Something the user should look at; the run goes on.
    Warning {
        /// The line.
        text: String,
    },
    /// Training begins (again) after `step` steps of `steps`.
    Start {
        /// Steps already made: 0, or where a resumed run goes on.
        step: u64,
        /// Steps of the whole run.
        steps: u64,
    },
    /// A step was made.
    Step(StepReport),
    /// The model was evaluated after `step` steps.
    Evaluation {
        /// Steps made.
        step: u64,
        /// Mean loss per supervised token of the evaluation data.
        eval_loss: f64,
        /// Whether it is the lowest so far.
        best: bool,
    },
    /// What the model says to one prompt of the evaluation data.
    Sample {
        /// Steps made.
        step: u64,
        /// Prompt and answer.
        sample: Sample,
    },
    /// How a mixture spread its tokens at the end, those of the evaluation data where there are any.
    Routing {
        /// Of each sparse layer.
        routing: Vec<Spread>,
    },
    /// A checkpoint was written.
    Checkpoint {
        /// Steps made.
        step: u64,
        /// Its folder.
        path: PathBuf,
    },
    /// The run has ended; its adapter (or model) is in `path`.
    End {
        /// Where the result is.
        path: PathBuf,
        /// Seconds spent in steps and evaluation.
        seconds: f64,
        /// Which weights the run left.
        result: FinalWeights,
    },
}

/// Which weights a run left as its result.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct FinalWeights {
    /// Those after so many steps.
    pub step: u64,
    /// The loss of these weights on the evaluation data.
    pub eval_loss: Option<f64>,
    /// The loss after the last step.
    pub last_eval_loss: Option<f64>,
    /// Whether they are those of an evaluation before the last step.
    pub is_best: bool,
    /// The model that the adapter belongs to; `None`: the result is a model.
    pub base: Option<String>,
}

/// Takes the events of a run.
pub trait Reporter {
    /// Called in order, from one thread.
    fn report(&mut self, event: &Event);
}
