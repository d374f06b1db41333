//! Sums of activations: of two, and of all rows with one. Both are computed in f32 and rounded once.

use candle_core::Tensor;

use super::Op;
use super::kernel::{Element, Values, dispatch, for_rows, to_tensor, vectorized, written};
use crate::error::Result;

/// `x + y`, of one shape, in the type of `x`; `y` may be of another type.
pub fn add(x: &Tensor, y: &Tensor) -> Result<Tensor> {
    let _time = Op::Norm.begin();
    if !x.device().is_cpu() {
        return Ok((x + y.to_dtype(x.dtype())?)?);
    }
    let (x, y) = (x.contiguous()?, y.contiguous()?);
    dispatch!(x.dtype(), add_of(&x, &y, y.elem_count()))
}

/// `x [rows, d]` with `row [d]` added to each row, in the type of `x`; `row` may be of another type.
pub fn add_to_rows(x: &Tensor, row: &Tensor) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return Ok(x.broadcast_add(&row.to_dtype(x.dtype())?)?);
    }
    let (x, row) = (x.contiguous()?, row.contiguous()?);
    dispatch!(x.dtype(), add_of(&x, &row, row.elem_count()))
}

vectorized! {
    fn add_row<T: Element, U: Element>(sum: &mut [T], x: &[T], y: &[U]) {
        for ((sum, x), y) in sum.iter_mut().zip(x).zip(y) {
            *sum = T::narrow(x.widen() + y.widen());
        }
    }
}

fn add_of<T: Element>(x: &Tensor, y: &Tensor, period: usize) -> Result<Tensor> {
    dispatch!(y.dtype(), add_typed::<T>(x, y, period))
}

/// `y` has `period` values and begins anew when they end.
fn add_typed<U: Element, T: Element>(x: &Tensor, y: &Tensor, period: usize) -> Result<Tensor> {
    let (values, others) = (Values::<T>::of(x)?, Values::<U>::of(y)?);
    let (values, others): (&[T], &[U]) = (&values, &others);
    let width = x.dims().last().copied().unwrap_or(1);
    let sum = written(values.len(), |sum| {
        for_rows(sum, width, |index, row| {
            let start = index * width % period.max(1);
            add_row(row, &values[index * width..][..width], &others[start..][..width]);
        });
    });
    to_tensor(sum, x.dims())
}
