//! Root-mean-square norm: `y = x / sqrt(mean(x^2) + eps) * weight`, over the last dimension; with the addition before it in
//! the forward (the residual stream) and the one behind it in the backward, which would read the same rows again.
//!
//! `x` and `y` are `[rows, d]`, `weight` is `[d]`. Heads are normalised as rows of their own.

use candle_core::{D, DType, Tensor};

use super::kernel::{
    Element, Values, chunked_sum, dispatch, for_row_pairs, for_rows, sum, sum_of_triples, to_tensor,
    vectorized, written,
};
use super::{Gradients, Op, Parameter, differentiate};
use crate::error::Result;

/// What the backward needs.
#[derive(Debug, Clone)]
pub struct Saved {
    x: Tensor,
}

/// `y`, and what the backward needs.
pub fn forward(x: &Tensor, weight: &Parameter, eps: f64) -> Result<(Tensor, Saved)> {
    let _time = Op::Norm.begin();
    let x = x.contiguous()?;
    let y = if x.device().is_cpu() {
        dispatch!(x.dtype(), forward_rows(&x, weight.tensor(), eps as f32))?
    } else {
        reference(&x, weight.tensor(), eps)?
    };
    Ok((y, Saved { x }))
}

/// `y` again, from what the backward needs.
pub fn value(saved: &Saved, weight: &Parameter, eps: f64) -> Result<Tensor> {
    Ok(forward(&saved.x, weight, eps)?.0)
}

/// The norm of `x + delta`: the sum, `y`, and what the backward needs.
pub fn forward_of_sum(
    x: &Tensor,
    delta: &Tensor,
    weight: &Parameter,
    eps: f64,
) -> Result<(Tensor, Tensor, Saved)> {
    let _time = Op::Norm.begin();
    let (sum, y) = if x.device().is_cpu() {
        dispatch!(x.dtype(), forward_rows_of_sum(x, delta, weight.tensor(), eps as f32))?
    } else {
        let sum = (x + delta)?;
        let y = reference(&sum, weight.tensor(), eps)?;
        (sum, y)
    };
    Ok((sum.clone(), y, Saved { x: sum }))
}

/// `residual + dx`, or `dx` alone; the weight's gradient goes to `gradients` when wanted.
///
/// With `r = 1 / sqrt(mean(x^2) + eps)`, `n = x r` and `g = dy * weight`: `dx = r (g - n mean(g n))` and
/// `dweight = sum over rows of dy n`.
pub fn backward(
    saved: &Saved,
    weight: &Parameter,
    eps: f64,
    dy: &Tensor,
    residual: Option<&Tensor>,
    gradients: &mut Gradients,
) -> Result<Tensor> {
    let _time = Op::Norm.begin();
    let (x, dy) = (&saved.x, dy.contiguous()?);
    if !x.device().is_cpu() {
        let mut both = differentiate(&[x, weight.tensor()], &dy, |v| reference(&v[0], &v[1], eps))?;
        if let Some(d_weight) = both.pop() {
            gradients.add(weight, &d_weight)?;
        }
        let dx = both.remove(0);
        return Ok(residual.map_or_else(|| Ok(dx.clone()), |residual| residual + &dx)?);
    }
    if gradients.wants(weight) {
        gradients.add(weight, &dispatch!(x.dtype(), backward_weight(x, &dy, eps as f32))?)?;
    }
    dispatch!(x.dtype(), backward_rows(x, weight.tensor(), &dy, residual, eps as f32))
}

/// The same composed of candle primitives, in f32.
pub fn reference(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let wide = x.to_dtype(DType::F32)?;
    let mean = wide.sqr()?.mean_keepdim(D::Minus1)?;
    let normalised = wide.broadcast_div(&(mean + eps)?.sqrt()?)?;
    Ok(normalised.broadcast_mul(&weight.to_dtype(DType::F32)?)?.to_dtype(x.dtype())?)
}

#[inline(always)]
fn inverse_rms<T: Element>(row: &[T], eps: f32) -> f32 {
    let squares = sum(row, |x| x * x);
    1.0 / (squares / row.len() as f32 + eps).sqrt()
}

vectorized! {
    fn normalise<T: Element>(y: &mut [T], x: &[T], weight: &[T], eps: f32) {
        let r = inverse_rms(x, eps);
        for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
            *y = T::narrow(x.widen() * r * w.widen());
        }
    }
}

vectorized! {
    fn add<T: Element>(sum: &mut [T], x: &[T], delta: &[T]) {
        for ((sum, x), delta) in sum.iter_mut().zip(x).zip(delta) {
            *sum = T::narrow(x.widen() + delta.widen());
        }
    }
}

vectorized! {
    fn backward_row<T: Element>(dx: &mut [T], x: &[T], weight: &[T], dy: &[T], residual: &[T], eps: f32) {
        let d = dx.len();
        let (x, weight, dy) = (&x[..d], &weight[..d], &dy[..d]);
        let r = inverse_rms(x, eps);
        let mean = sum_of_triples(dy, weight, x, |dy, w, x| dy * w * x) * r / d as f32;
        if residual.is_empty() {
            for (((dx, x), w), dy) in dx.iter_mut().zip(x).zip(weight).zip(dy) {
                *dx = T::narrow(slope(x.widen(), w.widen(), dy.widen(), r, mean));
            }
        } else {
            for ((((dx, x), w), dy), residual) in dx.iter_mut().zip(x).zip(weight).zip(dy).zip(residual) {
                *dx = T::narrow(residual.widen() + slope(x.widen(), w.widen(), dy.widen(), r, mean));
            }
        }
    }
}

/// `r (g - n mean(g n))` with `mean(g n) = mean`.
#[inline(always)]
fn slope(x: f32, weight: f32, dy: f32, r: f32, mean: f32) -> f32 {
    r * (dy * weight - x * r * mean)
}

vectorized! {
    fn backward_weight_row<T: Element>(sum: &mut [f32], x: &[T], dy: &[T], eps: f32) {
        let r = inverse_rms(x, eps);
        for ((sum, x), dy) in sum.iter_mut().zip(x).zip(dy) {
            *sum += dy.widen() * x.widen() * r;
        }
    }
}

fn forward_rows<T: Element>(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    let (values, weights) = (Values::<T>::of(x)?, Values::<T>::of(weight)?);
    let (values, weights): (&[T], &[T]) = (&values, &weights);
    let d = weights.len();
    let y = written(values.len(), |y| {
        for_rows(y, d, |index, row| normalise(row, &values[index * d..][..d], weights, eps));
    });
    to_tensor(y, x.dims())
}

fn forward_rows_of_sum<T: Element>(
    x: &Tensor,
    delta: &Tensor,
    weight: &Tensor,
    eps: f32,
) -> Result<(Tensor, Tensor)> {
    let (values, deltas, weights) = (Values::<T>::of(x)?, Values::<T>::of(delta)?, Values::<T>::of(weight)?);
    let (values, deltas, weights): (&[T], &[T], &[T]) = (&values, &deltas, &weights);
    let d = weights.len();
    let mut y = Vec::new();
    let sum = written(values.len(), |sum| {
        y = written(values.len(), |y| {
            for_row_pairs(sum, y, d, |index, sum, y| {
                add(sum, &values[index * d..][..d], &deltas[index * d..][..d]);
                normalise(y, sum, weights, eps);
            });
        });
    });
    Ok((to_tensor(sum, x.dims())?, to_tensor(y, x.dims())?))
}

fn backward_rows<T: Element>(
    x: &Tensor,
    weight: &Tensor,
    dy: &Tensor,
    residual: Option<&Tensor>,
    eps: f32,
) -> Result<Tensor> {
    let (values, weights, dys) = (Values::<T>::of(x)?, Values::<T>::of(weight)?, Values::<T>::of(dy)?);
    let residuals = residual.map(Values::<T>::of).transpose()?;
    let (values, weights, dys): (&[T], &[T], &[T]) = (&values, &weights, &dys);
    let residuals: Option<&[T]> = residuals.as_deref();
    let d = weights.len();
    let dx = written(values.len(), |dx| {
        for_rows(dx, d, |index, row| {
            let part = index * d..(index + 1) * d;
            let residual = residuals.map_or(&[][..], |values| &values[part.clone()]);
            backward_row(row, &values[part.clone()], weights, &dys[part], residual, eps);
        });
    });
    to_tensor(dx, x.dims())
}

fn backward_weight<T: Element>(x: &Tensor, dy: &Tensor, eps: f32) -> Result<Tensor> {
    let d = x.dim(D::Minus1)?;
    let (values, dy) = (Values::<T>::of(x)?, Values::<T>::of(dy)?);
    let (values, dy): (&[T], &[T]) = (&values, &dy);
    let sum = chunked_sum(values.len() / d.max(1), d, |index, sum| {
        backward_weight_row(sum, &values[index * d..][..d], &dy[index * d..][..d], eps);
    });
    to_tensor(sum, &[d])
}
