//! One optimizer step's worth of gradients: forward and backward over its batches, weighted by supervised tokens.

use crate::data::Batch;
use crate::error::Result;
use crate::model::{Decoder, Recompute, RouterLosses, Tally, Terms};
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
    /// The losses on routers, which `loss` leaves out.
    pub router: Terms,
    /// How routers spread the tokens.
    pub tally: Tally,
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
    balanced_step_gradients(model, trainables, batches, dropout_step, recompute, &RouterLosses::default())
}

/// As [`step_gradients`], with losses on routers beside the mean. These are taken over the tokens that are computed at once,
/// and summed by their number.
pub fn balanced_step_gradients(
    model: &Decoder,
    trainables: &Trainables,
    batches: &[Batch],
    dropout_step: Option<u64>,
    recompute: Recompute,
    losses: &RouterLosses,
) -> Result<StepGradients> {
    let learned = batches.iter().filter(|batch| batch.num_supervised() > 0);
    let tokens: usize = learned.map(|batch| batch.tokens.len()).sum();
    let (mut router, mut tally) = (Terms::default(), Tally::default());
    let supervised: usize = batches.iter().map(Batch::num_supervised).sum();
    let scale = 1.0 / supervised.max(1) as f64;
    let mut gradients = Gradients::of(trainables);
    let mut nll_sum = 0.0;
    for batch in batches {
        let share = batch.tokens.len() as f64 / tokens.max(1) as f64;
        let piece = Piece { batch, scale, share, dropout_step, recompute, losses };
        let (nll, terms) = piece.accumulate(model, &mut gradients, &mut tally)?;
        nll_sum += nll;
        router.total += share * terms.total;
        for (name, value) in terms.values {
            *router.values.entry(name).or_default() += share * value;
        }
    }
    let norm = gradients.norm()?;
    Ok(StepGradients { loss: nll_sum * scale, norm, gradients, router, tally })
}

/// Tokens that are computed at once.
struct Piece<'a> {
    batch: &'a Batch,
    /// What losses of tokens are multiplied with.
    scale: f64,
    /// Its share of the step's tokens.
    share: f64,
    dropout_step: Option<u64>,
    recompute: Recompute,
    losses: &'a RouterLosses,
}

impl Piece<'_> {
    /// Adds the gradients of `scale * sum(nll)` and of the losses on routers; gives the sum and these.
    fn accumulate(
        &self,
        model: &Decoder,
        gradients: &mut Gradients,
        tally: &mut Tally,
    ) -> Result<(f64, Terms)> {
        let Self { batch, scale, share, dropout_step, recompute, losses } = *self;
        let (rows, targets) = batch.targets();
        if targets.is_empty() {
            return Ok((0.0, Terms::default()));
        }
        let documents = Documents::new(batch.offsets.clone(), batch.documents.clone());
        let pass = Pass::training(&documents, dropout_step);
        let (output, saved) = model.forward_training(&batch.tokens, &pass, recompute, gradients)?;
        tally.add(&output.routing);
        let (terms, d_logits) = losses.of(&output.routing, share)?;
        let predicting = rows::gather(&output.hidden, &rows)?; // [supervised, hidden]
        let (nll, loss) = cross_entropy::forward(&predicting, model.head(), &targets, scale, gradients)?;
        let d_hidden = rows::scatter(&cross_entropy::backward(loss), &rows, batch.tokens.len())?;
        drop((output, predicting));
        model.backward_with_routing(saved, &pass, &d_hidden, &d_logits, gradients)?;
        Ok((nll.iter().map(|nll| f64::from(*nll)).sum(), terms))
    }
}
