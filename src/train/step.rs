//! One optimizer step's worth of gradients: forward and backward over its batches, weighted by supervised tokens.

use crate::data::Batch;
use crate::error::Result;
use crate::model::{Decoder, Recompute};
use crate::ops::{Documents, Gradients, Pass, Trainables, cross_entropy, rows};

/// The gradients of the mean loss over all supervised tokens of a step.
#[derive(Debug)]
pub struct StepGradients {
    /// Mean natural-log loss per supervised token.
    pub loss: f64,
    /// The norm of all gradients together.
    pub norm: f64,
    /// By name.
    pub gradients: Gradients,
}

/// Runs forward and backward over `batches`, each by itself. The mean is over the supervised tokens of all of them, so
/// that the way a step is cut does not change what it learns.
pub fn step_gradients(
    model: &Decoder,
    trainables: &Trainables,
    batches: &[Batch],
    dropout_step: Option<u64>,
    recompute: Recompute,
) -> Result<StepGradients> {
    let supervised: usize = batches.iter().map(Batch::num_supervised).sum();
    let scale = 1.0 / supervised.max(1) as f64;
    let mut gradients = Gradients::of(trainables);
    let mut nll_sum = 0.0;
    for batch in batches {
        nll_sum += accumulate(model, batch, scale, dropout_step, recompute, &mut gradients)?;
    }
    let norm = gradients.norm()?;
    Ok(StepGradients { loss: nll_sum * scale, norm, gradients })
}

/// Adds the gradients of `scale * sum(nll)` and returns the sum.
fn accumulate(
    model: &Decoder,
    batch: &Batch,
    scale: f64,
    dropout_step: Option<u64>,
    recompute: Recompute,
    gradients: &mut Gradients,
) -> Result<f64> {
    let (rows, targets) = batch.targets();
    if targets.is_empty() {
        return Ok(0.0);
    }
    let documents = Documents::new(batch.offsets.clone(), batch.documents.clone());
    let pass = Pass::training(&documents, dropout_step);
    let (output, saved) = model.forward_training(&batch.tokens, &pass, recompute, gradients)?;
    let predicting = rows::gather(&output.hidden, &rows)?; // [supervised, hidden]
    let (nll, loss) = cross_entropy::forward(&predicting, model.head(), &targets, scale, gradients)?;
    let d_hidden = rows::scatter(&cross_entropy::backward(loss), &rows, batch.tokens.len())?;
    drop((output, predicting));
    model.backward(saved, &pass, &d_hidden, gradients)?;
    Ok(nll.iter().map(|nll| f64::from(*nll)).sum())
}
