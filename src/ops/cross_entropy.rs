//! Vocabulary projection and cross-entropy by chunks of rows, so that the logits never exist as a whole.
//!
//! `hidden [rows, d]` holds only the rows whose next token carries a label, `weight [vocab, d]`, and
//! `nll[i] = logsumexp(l) - l[target[i]]` with `l = hidden[i] weight^T`.

use candle_core::{D, DType, Tensor};
use rayon::prelude::*;

use super::kernel::{Element, Values, dispatch, to_tensor};
use super::{Gradients, Weight, differentiate, matmul, matmul_f32};
use crate::error::Result;

/// Logits held at a time, in values: 32 MiB of f32.
const CHUNK_VALUES: usize = 8 << 20;

/// The gradient of `scale * sum(nll)` with respect to `hidden`, computed with the loss while the logits are at hand.
#[derive(Debug)]
pub struct Saved {
    d_hidden: Tensor,
}

/// The negative log-likelihood of each row, nothing saved.
pub fn evaluate(hidden: &Tensor, weight: &Weight, targets: &[u32]) -> Result<Vec<f32>> {
    let mut nll = Vec::with_capacity(targets.len());
    for (start, len) in chunks(targets.len(), weight.dims()?.0) {
        let logits = matmul_f32(&hidden.narrow(0, start, len)?, weight.t())?;
        let targets = &targets[start..start + len];
        if logits.device().is_cpu() {
            nll.extend(row_losses(&logits, targets)?.into_iter().map(|(nll, _)| nll));
        } else {
            nll.extend(reference_losses(&logits, targets)?.to_vec1::<f32>()?);
        }
    }
    Ok(nll)
}

/// The negative log-likelihood of each row, and the gradients of `scale * sum(nll)`: the weight's goes to `gradients`
/// when wanted, that of `hidden` into what is saved.
///
/// `dl = scale (softmax(l) - onehot(target))`, `d_hidden = dl weight`, `d_weight = dl^T hidden`.
pub fn forward(
    hidden: &Tensor,
    weight: &Weight,
    targets: &[u32],
    scale: f64,
    gradients: &mut Gradients,
) -> Result<(Vec<f32>, Saved)> {
    let mut nll = Vec::with_capacity(targets.len());
    let mut d_hidden = Vec::new();
    for (start, len) in chunks(targets.len(), weight.dims()?.0) {
        let (hidden, targets) = (hidden.narrow(0, start, len)?, &targets[start..start + len]);
        let logits = matmul_f32(&hidden, weight.t())?;
        let d_logits = if logits.device().is_cpu() {
            let losses = row_losses(&logits, targets)?;
            nll.extend(losses.iter().map(|(nll, _)| nll));
            dispatch!(hidden.dtype(), logit_gradients(&logits, targets, &losses, scale as f32))?
        } else {
            let rows = reference_losses(&logits, targets)?;
            nll.extend(rows.to_vec1::<f32>()?);
            let dy = rows.ones_like()?.affine(scale, 0.0)?;
            differentiate(&[&logits], &dy, |v| reference_losses(&v[0], targets))?
                .remove(0)
                .to_dtype(hidden.dtype())?
        };
        d_hidden.push(matmul(&d_logits, weight)?);
        if let Some(weight) = gradients.wanted(weight) {
            gradients.add(weight, &matmul_f32(&d_logits.t()?, &hidden)?)?;
        }
    }
    let d_hidden = if d_hidden.is_empty() { hidden.zeros_like()? } else { Tensor::cat(&d_hidden, 0)? };
    Ok((nll, Saved { d_hidden }))
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

fn reference_losses(logits: &Tensor, targets: &[u32]) -> Result<Tensor> {
    let index = Tensor::new(targets, logits.device())?.unsqueeze(1)?;
    let max = logits.max_keepdim(D::Minus1)?.detach();
    let sum = logits.broadcast_sub(&max)?.exp()?.sum_keepdim(D::Minus1)?;
    let logsumexp = (sum.log()? + max)?;
    Ok((logsumexp - logits.gather(&index, D::Minus1)?)?.squeeze(1)?)
}

fn chunks(rows: usize, vocab: usize) -> impl Iterator<Item = (usize, usize)> {
    let most = (CHUNK_VALUES / vocab.max(1)).clamp(16, 1024);
    (0..rows).step_by(most).map(move |start| (start, most.min(rows - start)))
}

/// For each row its loss and its logsumexp.
fn row_losses(logits: &Tensor, targets: &[u32]) -> Result<Vec<(f32, f32)>> {
    let (values, vocab) = (Values::<f32>::of(logits)?, logits.dim(1)?);
    let values: &[f32] = &values;
    Ok(values
        .par_chunks(vocab)
        .zip(targets)
        .map(|(row, &target)| {
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f64 = row.iter().map(|l| f64::from((l - max).exp())).sum();
            let logsumexp = max + sum.ln() as f32;
            (logsumexp - row[target as usize], logsumexp)
        })
        .collect())
}

fn logit_gradients<T: Element>(
    logits: &Tensor,
    targets: &[u32],
    losses: &[(f32, f32)],
    scale: f32,
) -> Result<Tensor> {
    let (values, vocab) = (Values::<f32>::of(logits)?, logits.dim(1)?);
    let mut gradients = vec![T::zero(); values.len()];
    gradients.par_chunks_mut(vocab).enumerate().for_each(|(i, row)| {
        let logsumexp = losses[i].1;
        for (gradient, l) in row.iter_mut().zip(&values[i * vocab..][..vocab]) {
            *gradient = T::narrow(scale * (l - logsumexp).exp());
        }
        let target = targets[i] as usize;
        row[target] = T::narrow(scale * ((values[i * vocab + target] - logsumexp).exp() - 1.0));
    });
    to_tensor(gradients, logits.dims())
}
