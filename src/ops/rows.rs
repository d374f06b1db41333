//! Rows of a matrix picked out and put back: the hidden states whose next token carries a label.

use candle_core::Tensor;

use super::kernel::{Element, Values, dispatch, to_tensor};
use crate::error::Result;

/// `y[i] = x[rows[i]]`, `[rows, d]`.
pub fn gather(x: &Tensor, rows: &[u32]) -> Result<Tensor> {
    Ok(x.index_select(&Tensor::new(rows, x.device())?, 0)?)
}

/// The backward of [`gather`], `[len, d]`: row `rows[i]` is `dy[i]`, the others are zero. No row is named twice.
pub fn scatter(dy: &Tensor, rows: &[u32], len: usize) -> Result<Tensor> {
    if dy.device().is_cpu() {
        let dy = dy.contiguous()?;
        return dispatch!(dy.dtype(), scatter_rows(&dy, rows, len));
    }
    let zeros = Tensor::zeros((len, dy.dim(1)?), dy.dtype(), dy.device())?;
    Ok(zeros.index_add(&Tensor::new(rows, dy.device())?, dy, 0)?)
}

fn scatter_rows<T: Element>(dy: &Tensor, rows: &[u32], len: usize) -> Result<Tensor> {
    let (values, d) = (Values::<T>::of(dy)?, dy.dim(1)?);
    let mut dx = vec![T::zero(); len * d];
    for (row, dy) in rows.iter().zip(values.chunks_exact(d.max(1))) {
        dx[*row as usize * d..][..d].copy_from_slice(dy);
    }
    to_tensor(dx, &[len, d])
}
