//! How well a model predicts data, by mean loss per predicted token, and how a mixture of experts spreads its tokens.

mod heatmap;
mod routing;

use candle_core::Tensor;

use crate::data::Batch;
use crate::error::{Error, Result};
use crate::model::{Decoder, Output, Tally};
use crate::ops::{Documents, cross_entropy};

pub use heatmap::heatmap;
pub use routing::routing;

/// A sum of losses over labelled tokens.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Evaluation {
    /// Natural-log loss, summed.
    pub nll_sum: f64,
    /// Labelled tokens.
    pub tokens: u64,
    /// What the routers of a mixture did.
    pub tally: Tally,
}

impl Evaluation {
    /// Mean natural-log loss per labelled token.
    #[must_use]
    pub fn nll(&self) -> f64 {
        self.nll_sum / self.tokens as f64
    }

    /// `exp(nll)`.
    #[must_use]
    pub fn perplexity(&self) -> f64 {
        self.nll().exp()
    }
}

/// The loss of `model` over all labelled tokens of `batches`, without dropout.
pub fn evaluate(model: &Decoder, batches: &[Batch]) -> Result<Evaluation> {
    // On a thread of the pool, as a step of training.
    let sum = rayon::scope(|_| sums(model, batches))?;
    if sum.tokens == 0 {
        return Err(Error::invalid("no token of the evaluation data carries a label"));
    }
    Ok(sum)
}

fn sums(model: &Decoder, batches: &[Batch]) -> Result<Evaluation> {
    let mut sum = Evaluation::default();
    for batch in batches {
        let (rows, targets) = batch.targets();
        if targets.is_empty() {
            continue;
        }
        let documents = Documents::new(batch.offsets.clone(), batch.documents.clone());
        let Output { hidden, routing } = model.forward(&batch.tokens, &documents)?; // [tokens, hidden]
        sum.tally.add(&routing);
        let rows = Tensor::new(rows, model.device())?;
        let nll = cross_entropy::evaluate(&hidden.index_select(&rows, 0)?, model.head(), &targets)?;
        sum.nll_sum += nll.iter().map(|nll| f64::from(*nll)).sum::<f64>();
        sum.tokens += targets.len() as u64;
    }
    Ok(sum)
}
