//! Vocabulary projection and cross-entropy by chunks of rows, so that the logits never exist as a whole.
//!
//! `hidden [rows, d]` holds only the rows whose next token carries a label, `weight [vocab, d]`, and
//! `nll[i] = logsumexp(l) - l[target[i]]` with `l = hidden[i] weight^T`.

use std::ops::Range;

use candle_core::{D, DType, Tensor};
use rayon::prelude::*;

use super::kernel::{
    Element, Values, dispatch, exp, into_values, largest, sum as sum_of, to_tensor, vectorized,
};
use super::{Gradients, Op, Weight, differentiate, matmul, matmul_f32};
use crate::error::Result;

/// Logits held at a time, in values: 48 MiB of bf16, 96 MiB of f32. The weight is read once for each chunk, so chunks should
/// have some hundred rows.
const CHUNK_VALUES: usize = 24 << 20;

/// The gradient of `scale * sum(nll)` with respect to `hidden`, computed with the loss while the logits are at hand.
#[derive(Debug)]
pub struct Saved {
    pub(super) d_hidden: Tensor,
}

/// The negative log-likelihood of each row, nothing saved.
pub fn evaluate(hidden: &Tensor, weight: &Weight, targets: &[u32]) -> Result<Vec<f32>> {
    let mut nll = Vec::with_capacity(targets.len());
    for (start, len) in chunks(targets.len(), weight.dims()?.0) {
        let logits = matmul_f32(&hidden.narrow(0, start, len)?, weight.t())?;
        let targets = &targets[start..start + len];
        if logits.device().is_cpu() {
            nll.extend(row_losses(&logits, targets)?);
        } else {
            nll.extend(reference_losses(&logits, targets)?.to_vec1::<f32>()?);
        }
    }
    Ok(nll)
}

/// The rows whose logits are held at a time.
#[must_use]
pub fn chunk_rows(vocab: usize) -> usize {
    (CHUNK_VALUES / vocab.max(1)).clamp(16, 1024)
}

/// The negative log-likelihood of each row, and the gradients of `scale * sum(nll)`: the weight's goes to `gradients`
/// when wanted, that of `hidden` into what is saved.
///
/// `dl = scale (softmax(l) - onehot(target))`, `d_hidden = dl weight`, `d_weight = dl^T hidden`. Logits are rounded to the
/// type of `hidden`, and their gradients take their place.
pub fn forward(
    hidden: &Tensor,
    weight: &Weight,
    targets: &[u32],
    scale: f64,
    gradients: &mut Gradients,
) -> Result<(Vec<f32>, Saved)> {
    let _time = Op::CrossEntropy.begin();
    let (nll, saved) = by_chunks(hidden, weight, gradients, |rows, logits| {
        let targets = &targets[rows];
        if logits.device().is_cpu() {
            return dispatch!(hidden.dtype(), losses_and_gradients(logits, targets, scale as f32));
        }
        let losses = reference_losses(&logits.to_dtype(DType::F32)?, targets)?;
        let dy = losses.ones_like()?.affine(scale, 0.0)?;
        let d_logits =
            differentiate(&[&logits], &dy, |v| reference_losses(&v[0].to_dtype(DType::F32)?, targets))?;
        Ok((losses.to_vec1::<f32>()?, d_logits[0].to_dtype(hidden.dtype())?))
    })?;
    Ok((nll.concat(), saved))
}

/// What `losses(rows, logits)` says of each chunk of rows, and the gradients from those of the logits that it gives, which
/// have the type of `hidden`.
pub(super) fn by_chunks<L>(
    hidden: &Tensor,
    weight: &Weight,
    gradients: &mut Gradients,
    mut losses: impl FnMut(Range<usize>, Tensor) -> Result<(L, Tensor)>,
) -> Result<(Vec<L>, Saved)> {
    let mut of_chunks = Vec::new();
    let mut d_hidden = Vec::new();
    for (start, len) in chunks(hidden.dim(0)?, weight.dims()?.0) {
        let hidden = hidden.narrow(0, start, len)?;
        let (loss, d_logits) = losses(start..start + len, matmul(&hidden, weight.t())?)?;
        of_chunks.push(loss);
        d_hidden.push(matmul(&d_logits, weight)?);
        if let Some(weight) = gradients.wanted(weight) {
            gradients.add(weight, &matmul_f32(&d_logits.t()?, &hidden)?)?;
        }
    }
    let d_hidden = match d_hidden.len() {
        0 => hidden.zeros_like()?,
        1 => d_hidden.remove(0),
        _ => Tensor::cat(&d_hidden, 0)?,
    };
    Ok((of_chunks, Saved { d_hidden }))
}

/// `d_hidden [rows, d]`.
#[must_use]
pub fn backward(saved: Saved) -> Tensor {
    saved.d_hidden
}

/// The negative log-likelihood of each row, composed of candle primitives on the whole matrix of logits.
pub fn reference(hidden: &Tensor, weight: &Tensor, targets: &[u32]) -> Result<Tensor> {
    reference_losses(&hidden.matmul(&weight.t()?)?.to_dtype(DType::F32)?, targets)
}

pub(super) fn reference_losses(logits: &Tensor, targets: &[u32]) -> Result<Tensor> {
    let index = Tensor::new(targets, logits.device())?.unsqueeze(1)?;
    let max = logits.max_keepdim(D::Minus1)?.detach();
    let sum = logits.broadcast_sub(&max)?.exp()?.sum_keepdim(D::Minus1)?;
    let logsumexp = (sum.log()? + max)?;
    Ok((logsumexp - logits.gather(&index, D::Minus1)?)?.squeeze(1)?)
}

fn chunks(rows: usize, vocab: usize) -> impl Iterator<Item = (usize, usize)> {
    let most = chunk_rows(vocab);
    (0..rows).step_by(most).map(move |start| (start, most.min(rows - start)))
}

/// The loss of each row.
fn row_losses(logits: &Tensor, targets: &[u32]) -> Result<Vec<f32>> {
    let (values, vocab) = (Values::<f32>::of(logits)?, logits.dim(1)?);
    let values: &[f32] = &values;
    let row_loss = |(row, &target): (&[f32], &u32)| {
        let max = maximum(row);
        max + sum_of_powers(row, max).ln() as f32 - row[target as usize]
    };
    Ok(values.par_chunks(vocab).zip(targets).map(row_loss).collect())
}

/// The loss of each row, and the gradients of the logits in their place.
fn losses_and_gradients<T: Element>(
    logits: Tensor,
    targets: &[u32],
    scale: f32,
) -> Result<(Vec<f32>, Tensor)> {
    let (shape, vocab) = (logits.dims().to_vec(), logits.dim(1)?);
    let mut values = into_values::<T>(logits)?;
    let losses = values
        .par_chunks_mut(vocab)
        .zip(targets)
        .map_init(
            || vec![0.0f32; vocab],
            |powers, (row, &target)| {
                let max = maximum(row);
                let sum = powers_and_sum(powers, row, max, 1.0);
                let loss = max + sum.ln() as f32 - row[target as usize].widen();
                let share = (f64::from(scale) / sum) as f32;
                scaled(row, powers, share);
                row[target as usize] = T::narrow(powers[target as usize] * share - scale);
                loss
            },
        )
        .collect();
    Ok((losses, to_tensor(values, &shape)?))
}

vectorized! {
    pub(super) fn maximum<T: Element>(row: &[T]) -> f32 {
        largest(row)
    }
}

/// Values whose sum is taken in f32 before it is added in f64.
pub(super) const STRETCH: usize = 1024;

vectorized! {
    /// The sum of `exp(row - max)`.
    fn sum_of_powers<T: Element>(row: &[T], max: f32) -> f64 {
        let mut sum = 0.0f64;
        for part in row.chunks(STRETCH) {
            sum += f64::from(sum_of(part, |l| exp(l - max)));
        }
        sum
    }
}

vectorized! {
    /// Writes `exp((row - max) * inverse)`, `inverse` that of a temperature, and gives their sum.
    pub(super) fn powers_and_sum<T: Element>(powers: &mut [f32], row: &[T], max: f32, inverse: f32) -> f64 {
        let mut sum = 0.0f64;
        for (powers, row) in powers.chunks_mut(STRETCH).zip(row.chunks(STRETCH)) {
            for (power, l) in powers.iter_mut().zip(row) {
                *power = exp((l.widen() - max) * inverse);
            }
            sum += f64::from(sum_of(powers, |power| power));
        }
        sum
    }
}

vectorized! {
    fn scaled<T: Element>(row: &mut [T], powers: &[f32], share: f32) {
        for (value, power) in row.iter_mut().zip(powers) {
            *value = T::narrow(power * share);
        }
    }
}
