//! Sums of activations: of two, and of all rows with one, computed in f32 and rounded once. And activations in another type.

use candle_core::{DType, Tensor};

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

/// `x [rows, d]` in another type.
pub fn cast(x: &Tensor, dtype: DType) -> Result<Tensor> {
    if !x.device().is_cpu() || x.dtype() == dtype {
        return Ok(x.to_dtype(dtype)?);
    }
    let x = x.contiguous()?;
    dispatch!(x.dtype(), cast_of(&x, dtype))
}

fn cast_of<T: Element>(x: &Tensor, dtype: DType) -> Result<Tensor> {
    dispatch!(dtype, cast_typed::<T>(x))
}

fn cast_typed<U: Element, T: Element>(x: &Tensor) -> Result<Tensor> {
    let values = Values::<T>::of(x)?;
    let values: &[T] = &values;
    let width = x.dims().last().copied().unwrap_or(1);
    let cast = written(values.len(), |cast: &mut [U]| {
        for_rows(cast, width, |index, row| cast_row(row, &values[index * width..][..width]));
    });
    to_tensor(cast, x.dims())
}

vectorized! {
    pub(super) fn cast_row<T: Element, U: Element>(cast: &mut [U], x: &[T]) {
        for (cast, x) in cast.iter_mut().zip(x) {
            *cast = U::narrow(x.widen());
        }
    }
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
