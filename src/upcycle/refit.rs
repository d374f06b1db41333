//! Down projections fitted once more, so that the active neurons make up for the others.
//!
//! With active neurons `A [tokens, n]`, what is missing `R [tokens, hidden]` and token weights `w`, the change of the
//! down projection is `(A^T w A + l I)^-1 A^T w R`: ridge regression with a pull towards the dense model's weights.
//! `l` is the one with the least error on tokens that were not fitted to; where none helps, nothing changes.

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use super::solve::{factor, matrix, mean_diagonal, solve, values};
use crate::error::Result;
use crate::ops::matmul;

/// The candidates for `l`, as shares of the mean of the diagonal.
const RIDGES: [f64; 5] = [3.0, 1.0, 0.3, 0.1, 0.03];

/// Tokens of a fit, as they come.
pub(super) struct Fit {
    /// The neurons whose columns may change.
    free: Tensor,
    gram: Option<Tensor>,
    cross: Option<Tensor>,
    /// Active neurons and what is missing, times the roots of the weights, of tokens that choices are made by.
    judged: Vec<(Tensor, Tensor)>,
}

/// What a fit came to.
#[derive(Debug, Clone)]
pub(super) struct Fitted {
    /// `[hidden, neurons]`
    pub(super) down: Tensor,
    /// The share of the judged error that is left; `None` where no fit helped.
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
