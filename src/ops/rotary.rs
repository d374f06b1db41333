//! Rotary position embedding, the half-split form of Hugging Face: column `i` of a head is rotated with column
//! `i + d/2` by the angle `position * frequency[i]`.
//!
//! `x` is `[tokens, heads * d]`; `cos` and `sin` are `[tokens, r/2]` in f32, one row per token. Where `r` is less than `d`,
//! the columns of a head from `r` on stay as they are.

use candle_core::{DType, Tensor};

use super::Op;
use super::kernel::{Element, Values, dispatch, for_rows, into_values, to_tensor, vectorized};
use crate::error::{Error, Result};

/// The angles of a batch.
#[derive(Debug, Clone)]
pub struct Angles {
    /// `[tokens, r/2]`, f32.
    pub cos: Tensor,
    /// `[tokens, r/2]`, f32.
    pub sin: Tensor,
    /// Columns of a head, of which the first `r` are rotated.
    pub head_dim: usize,
}

/// Every head of `x` rotated. Nothing is saved: the backward needs the angles only.
pub fn forward(x: &Tensor, angles: &Angles) -> Result<Tensor> {
    rotate(x.copy()?, angles, 1.0)
}

/// A rotation's transpose is the rotation back: `dx` is `dy` rotated by the negative angles.
pub fn backward(dy: &Tensor, angles: &Angles) -> Result<Tensor> {
    rotate(dy.copy()?, angles, -1.0)
}

/// Rotates like [`forward`], but overwrites `x`; no other tensor may share its storage.
pub(crate) fn forward_in_place(x: Tensor, angles: &Angles) -> Result<Tensor> {
    rotate(x, angles, 1.0)
}

/// Rotates back like [`backward`], but overwrites `dy`; no other tensor may share its storage.
pub(crate) fn backward_in_place(dy: Tensor, angles: &Angles) -> Result<Tensor> {
    rotate(dy, angles, -1.0)
}

fn rotate(x: Tensor, angles: &Angles, direction: f32) -> Result<Tensor> {
    let _time = Op::Rotary.begin();
    if x.device().is_cpu() {
        dispatch!(x.dtype(), rotate_rows(x, angles, direction))
    } else {
        let sin = (&angles.sin * f64::from(direction))?;
        reference(&x, &Angles { cos: angles.cos.clone(), sin, head_dim: angles.head_dim })
    }
}

/// The same composed of candle primitives, in f32.
pub fn reference(x: &Tensor, angles: &Angles) -> Result<Tensor> {
    let (tokens, half) = angles.cos.dims2()?;
    let heads = x.dim(1)? / angles.head_dim;
    let all = x.to_dtype(DType::F32)?.reshape((tokens, heads, angles.head_dim))?;
    let rest = all.narrow(2, 2 * half, angles.head_dim - 2 * half)?;
    let wide = all.narrow(2, 0, 2 * half)?.reshape((tokens, heads, 2, half))?;
    let (low, high) = (wide.narrow(2, 0, 1)?, wide.narrow(2, 1, 1)?);
    let cos = angles.cos.reshape((tokens, 1, 1, half))?;
    let sin = angles.sin.reshape((tokens, 1, 1, half))?;
    let new_low = (low.broadcast_mul(&cos)? - high.broadcast_mul(&sin)?)?;
    let new_high = (high.broadcast_mul(&cos)? + low.broadcast_mul(&sin)?)?;
    let rotated = Tensor::cat(&[new_low, new_high], 2)?.reshape((tokens, heads, 2 * half))?;
    Ok(Tensor::cat(&[rotated, rest], 2)?.reshape((tokens, ()))?.to_dtype(x.dtype())?)
}

vectorized! {
    fn rotate_row<T: Element>(row: &mut [T], cos: &[f32], sin: &[f32], head_dim: usize, direction: f32) {
        let half = cos.len();
        let sin = &sin[..half];
        for head in row.chunks_exact_mut(head_dim) {
            let (low, high) = head[..2 * half].split_at_mut(half);
            for i in 0..half {
                let (a, b, s) = (low[i].widen(), high[i].widen(), direction * sin[i]);
                low[i] = T::narrow(a * cos[i] - b * s);
                high[i] = T::narrow(b * cos[i] + a * s);
            }
        }
    }
}

fn rotate_rows<T: Element>(x: Tensor, angles: &Angles, direction: f32) -> Result<Tensor> {
    let (tokens, half) = angles.cos.dims2()?;
    let (rows, width) = x.dims2()?;
    let d = angles.head_dim;
    if rows != tokens || angles.sin.dims() != [tokens, half] || d == 0 || width % d != 0 || half > d / 2 {
        return Err(Error::invalid(format!(
            "angles of {tokens} tokens and {half} pairs of columns, in heads of width {d}, for {rows} rows of {width} values"
        )));
    }
    let (cos, sin) = (Values::<f32>::of(&angles.cos)?, Values::<f32>::of(&angles.sin)?);
    let (cos, sin): (&[f32], &[f32]) = (&cos, &sin);
    let shape = x.dims().to_vec();
    let mut values = into_values::<T>(x)?;
    for_rows(&mut values, width, |token, row| {
        rotate_row(
            row,
            &cos[token * half..][..half],
            &sin[token * half..][..half],
            angles.head_dim,
            direction,
        );
    });
    to_tensor(values, &shape)
}
