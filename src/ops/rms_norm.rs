//! Root-mean-square norm: `y = x / sqrt(mean(x^2) + eps) * weight`, over the last dimension.
//!
//! `x` and `y` are `[rows, d]`, `weight` is `[d]`. Heads are normalised as rows of their own.

use candle_core::{D, DType, Tensor};

use super::kernel::{Element, Values, chunked_sum, dispatch, for_rows, to_tensor};
use super::{Gradients, Parameter, differentiate};
use crate::error::Result;

/// What the backward needs.
#[derive(Debug, Clone)]
pub struct Saved {
    x: Tensor,
}

/// `y`, and what the backward needs.
pub fn forward(x: &Tensor, weight: &Parameter, eps: f64) -> Result<(Tensor, Saved)> {
    let x = x.contiguous()?;
    let y = if x.device().is_cpu() {
        dispatch!(x.dtype(), forward_rows(&x, weight.tensor(), eps as f32))?
    } else {
        reference(&x, weight.tensor(), eps)?
    };
    Ok((y, Saved { x }))
}

/// `dx`; the weight's gradient goes to `gradients` when wanted.
///
/// With `r = 1 / sqrt(mean(x^2) + eps)`, `n = x r` and `g = dy * weight`: `dx = r (g - n mean(g n))` and
/// `dweight = sum over rows of dy n`.
pub fn backward(
    saved: &Saved,
    weight: &Parameter,
    eps: f64,
    dy: &Tensor,
    gradients: &mut Gradients,
) -> Result<Tensor> {
    let (x, dy) = (&saved.x, dy.contiguous()?);
    if !x.device().is_cpu() {
        let mut both = differentiate(&[x, weight.tensor()], &dy, |v| reference(&v[0], &v[1], eps))?;
        if let Some(d_weight) = both.pop() {
            gradients.add(weight, &d_weight)?;
        }
        return Ok(both.remove(0));
    }
    if gradients.wants(weight) {
        gradients.add(weight, &dispatch!(x.dtype(), backward_weight(x, &dy, eps as f32))?)?;
    }
    dispatch!(x.dtype(), backward_rows(x, weight.tensor(), &dy, eps as f32))
}

/// The same composed of candle primitives, in f32.
pub fn reference(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let wide = x.to_dtype(DType::F32)?;
    let mean = wide.sqr()?.mean_keepdim(D::Minus1)?;
    let normalised = wide.broadcast_div(&(mean + eps)?.sqrt()?)?;
    Ok(normalised.broadcast_mul(&weight.to_dtype(DType::F32)?)?.to_dtype(x.dtype())?)
}

fn inverse_rms<T: Element>(row: &[T], eps: f32) -> f32 {
    let squares: f32 = sum(row.len(), |i| {
        let value = row[i].widen();
        value * value
    });
    1.0 / (squares / row.len() as f32 + eps).sqrt()
}

/// A sum over `0..len` in 16 lanes, so that it vectorises and does not depend on the machine.
fn sum(len: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0f32; 16];
    let whole = len / 16 * 16;
    for start in (0..whole).step_by(16) {
        for (lane, value) in lanes.iter_mut().enumerate() {
            *value += f(start + lane);
        }
    }
    (whole..len).map(f).sum::<f32>() + lanes.iter().sum::<f32>()
}

fn forward_rows<T: Element>(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    let (values, weights) = (Values::<T>::of(x)?, Values::<T>::of(weight)?);
    let d = weights.len();
    let mut y = vec![T::zero(); values.len()];
    for_rows(&mut y, d, |index, row| {
        let x = &values[index * d..][..d];
        let r = inverse_rms(x, eps);
        for ((y, x), w) in row.iter_mut().zip(x).zip(weights.iter()) {
            *y = T::narrow(x.widen() * r * w.widen());
        }
    });
    to_tensor(y, x.dims())
}

fn backward_rows<T: Element>(x: &Tensor, weight: &Tensor, dy: &Tensor, eps: f32) -> Result<Tensor> {
    let (values, weights, dy) = (Values::<T>::of(x)?, Values::<T>::of(weight)?, Values::<T>::of(dy)?);
    let d = weights.len();
    let mut dx = vec![T::zero(); values.len()];
    for_rows(&mut dx, d, |index, row| {
        let (x, dy) = (&values[index * d..][..d], &dy[index * d..][..d]);
        let r = inverse_rms(x, eps);
        let mean = sum(d, |i| dy[i].widen() * weights[i].widen() * x[i].widen()) * r / d as f32;
        for (i, dx) in row.iter_mut().enumerate() {
            let g = dy[i].widen() * weights[i].widen();
            *dx = T::narrow(r * (g - x[i].widen() * r * mean));
        }
    });
    to_tensor(dx, x.dims())
}

fn backward_weight<T: Element>(x: &Tensor, dy: &Tensor, eps: f32) -> Result<Tensor> {
    let d = x.dim(D::Minus1)?;
    let (values, dy) = (Values::<T>::of(x)?, Values::<T>::of(dy)?);
    let sum = chunked_sum(values.len() / d.max(1), d, |index, sum| {
        let (x, dy) = (&values[index * d..][..d], &dy[index * d..][..d]);
        let r = inverse_rms(x, eps);
        for ((sum, x), dy) in sum.iter_mut().zip(x).zip(dy) {
            *sum += dy.widen() * x.widen() * r;
        }
    });
    to_tensor(sum, &[d])
}
