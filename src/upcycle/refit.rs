//! Down projections fitted once more, so that the active neurons make up for the others.
//!
//! With active neurons `A [tokens, n]`, what is missing `R [tokens, hidden]` and token weights `w`, the change of the
//! down projection is `(A^T w A + l I)^-1 A^T w R`: ridge regression with a pull towards the dense model's weights.
//! `l` is the one with the least error on tokens that were not fitted to; where none helps, nothing changes.

use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;

use super::slices::masked;
use super::solve::{factor, matrix, mean_diagonal, solve, values};
use super::statistics::{Observed, Scores, observe};
use super::windows::{Sample, Windows};
use crate::error::Result;
use crate::model::{Decoder, FeedForward, Stream};
use crate::ops::{matmul, matmul_f32};

/// The candidates for `l`, as shares of the mean of the diagonal.
const RIDGES: [f64; 5] = [3.0, 1.0, 0.3, 0.1, 0.03];

/// Collects the tokens that a down projection is fitted to.
pub(super) struct Fit {
    /// The neurons whose columns may change.
    free: Tensor,
    gram: Option<Tensor>,
    cross: Option<Tensor>,
    /// Active neurons and the missing output, both times the root of the token's weight, on tokens that judge the fits.
    judged: Vec<(Tensor, Tensor)>,
}

/// The result of a fit.
#[derive(Debug, Clone)]
pub(super) struct Fitted {
    /// `[hidden, neurons]`
    pub(super) down: Tensor,
    /// The share of the error on judged tokens that the fit left; `None` where no fit made it smaller.
    pub(super) left: Option<f64>,
}

impl Fit {
    pub(super) fn new(free: &[usize]) -> Result<Self> {
        let free: Vec<u32> = free.iter().map(|neuron| *neuron as u32).collect();
        Ok(Self { free: Tensor::new(free, &Device::Cpu)?, gram: None, cross: None, judged: Vec::new() })
    }

    /// Adds tokens: `active [tokens, neurons]`, `missing [tokens, hidden]`. Those that are `judged` are not fitted to.
    pub(super) fn add(
        &mut self,
        active: &Tensor,
        missing: &Tensor,
        weights: &[f32],
        judged: bool,
    ) -> Result<()> {
        // With every active neuron guarded there is nothing to fit.
        if self.free.elem_count() == 0 {
            return Ok(());
        }
        let roots: Vec<f32> = weights.iter().map(|weight| weight.sqrt()).collect();
        let roots = matrix(roots, 1)?;
        let active = active.index_select(&self.free, 1)?.broadcast_mul(&roots)?;
        let missing = missing.broadcast_mul(&roots)?;
        if judged {
            self.judged.push((active, missing));
            return Ok(());
        }
        let transposed = active.t()?;
        add_to(&mut self.gram, matmul(&transposed, &active)?)?;
        add_to(&mut self.cross, matmul(&transposed, &missing)?)
    }

    /// The best down projection, beginning with `down [hidden, neurons]`.
    pub(super) fn finish(self, down: &Tensor) -> Result<Fitted> {
        let unchanged = Fitted { down: down.clone(), left: None };
        let (Some(gram), Some(cross)) = (&self.gram, &self.cross) else { return Ok(unchanged) };
        let (n, hidden) = cross.dims2()?;
        if n == 0 || self.judged.is_empty() {
            return Ok(unchanged);
        }
        let (gram, cross) = (values(gram)?, values(cross)?);
        let mean = mean_diagonal(&gram, n);
        if mean <= 0.0 {
            return Ok(unchanged);
        }
        let changes = RIDGES.par_iter().map(|ridge| {
            let factor = factor(&gram, n, ridge * mean)?;
            matrix(solve(&factor, &cross, hidden), hidden) // [n, hidden]
        });
        let changes: Vec<Tensor> = changes.collect::<Result<_>>()?;
        let before = self.error(None)?;
        let mut best: Option<(f64, &Tensor)> = None;
        for change in &changes {
            let error = self.error(Some(change))?;
            if best.is_none_or(|(least, _)| error < least) {
                best = Some((error, change));
            }
        }
        match best {
            Some((error, change)) if error < before => {
                let down = down.t()?.contiguous()?.index_add(&self.free, change, 0)?.t()?.contiguous()?;
                Ok(Fitted { down, left: Some(error / before) })
            }
            _ => Ok(unchanged),
        }
    }

    /// The squared error on judged tokens.
    fn error(&self, change: Option<&Tensor>) -> Result<f64> {
        let mut sum = 0.0;
        for (active, missing) in &self.judged {
            let left = match change {
                Some(change) => (missing - matmul(active, change)?)?,
                None => missing.clone(),
            };
            sum += f64::from(left.sqr()?.sum_all()?.to_scalar::<f32>()?);
        }
        Ok(sum)
    }
}

fn add_to(sum: &mut Option<Tensor>, term: Tensor) -> Result<()> {
    *sum = Some(match sum.take() {
        Some(sum) => (sum + term)?,
        None => term,
    });
    Ok(())
}

/// The streams of the mixture, or of the pruned model, at one layer.
pub(super) struct Walk<'a> {
    pub(super) model: &'a Decoder,
    pub(super) layer: usize,
    pub(super) network: &'a FeedForward,
    pub(super) down: &'a Tensor,
    pub(super) scores: &'a Scores,
    /// The streams of the dense model after this layer, if the fit aims at them instead of the network's own output.
    pub(super) goal: Option<&'a [Stream]>,
    pub(super) text: &'a [Windows],
    pub(super) sample: &'a Sample,
    pub(super) stored: DType,
}

impl Walk<'_> {
    /// Fits the columns of `active` neurons, but for guarded ones, on streams of one for each batch of the sample, and takes these
    /// behind the layer. `mask` says which neurons are on for which tokens.
    pub(super) fn refit(
        &self,
        mask: &dyn Fn(&Observed) -> Result<Vec<f32>>,
        active: &[usize],
        streams: &mut [Stream],
    ) -> Result<Fitted> {
        let free: Vec<usize> =
            active.iter().copied().filter(|neuron| !self.scores.guarded[*neuron]).collect();
        let mut fit = Fit::new(&free)?;
        let mut actives = Vec::new();
        for (stream, batch) in streams.iter_mut().zip(self.sample.batches()) {
            let seen = observe(self.model, self.layer, self.network, self.down, stream, &self.text[batch])?;
            let (active, rest) = masked(&seen.h, &mask(&seen)?)?;
            let missing = match self.goal {
                None => matmul_f32(&rest, &self.down.t()?)?,
                Some(goal) => {
                    let given = matmul_f32(&active, &self.down.t()?)?;
                    let residual = (goal[batch].residual() - stream.residual())?.to_dtype(DType::F32)?;
                    let multiplier = self.model.config().multipliers.residual;
                    ((residual / multiplier)? - given)?
                }
            };
            fit.add(
                &active,
                &missing,
                &self.scores.weights(&seen.norms),
                self.sample.judged.contains(&batch),
            )?;
            actives.push(active);
        }
        let Fitted { down, left } = fit
            .finish(self.down)
            .map_err(|error| error.with_hint("`upcycle.refit = \"none\"` goes without"))?;
        // Later layers are fitted to the weights as they are stored, not to the exact ones.
        let down = down.to_dtype(self.stored)?.to_dtype(DType::F32)?;
        for (stream, active) in streams.iter_mut().zip(actives) {
            let y = matmul_f32(&active, &down.t()?)?;
            self.model.add_to_stream(self.layer, stream, &y)?;
        }
        Ok(Fitted { down, left })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn with_no_free_neuron_the_projection_stays() {
        let mut fit = Fit::new(&[]).unwrap();
        let ones = |rows: usize, columns: usize| matrix(vec![1.0; rows * columns], columns).unwrap();
        for judged in [false, true] {
            fit.add(&ones(4, 3), &ones(4, 2), &[1.0; 4], judged).unwrap();
        }
        assert!(fit.finish(&ones(2, 3)).unwrap().left.is_none());
    }
}
