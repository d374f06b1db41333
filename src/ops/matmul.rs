//! Matrix products of tensors. bf16 operands on the CPU are widened and multiplied in f32, which rounds once and is
//! faster than candle's bf16 product there.

use candle_core::{DType, Tensor};
use half::bf16;

use super::kernel::{Element, Values, for_rows, to_tensor};
use crate::error::Result;

/// `a [m, k]` times `b [k, n]`, in the type of `a`.
pub fn matmul(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    rounded(&working(a)?.matmul(&working(b)?)?, a.dtype())
}

/// `a [m, k]` times `b [k, n]`, in f32.
pub fn matmul_f32(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    Ok(working(a)?.matmul(&working(b)?)?.to_dtype(DType::F32)?)
}

/// `x` as products are computed with it: widened on the CPU, as it is elsewhere.
pub(super) fn working(x: &Tensor) -> Result<Tensor> {
    if x.device().is_cpu() { widen(x) } else { Ok(x.clone()) }
}

/// `x` in the type that activations have.
pub(super) fn rounded(x: &Tensor, dtype: DType) -> Result<Tensor> {
    if x.device().is_cpu() && x.dtype() == DType::F32 && dtype == DType::BF16 {
        return convert::<f32, bf16>(&x.contiguous()?);
    }
    Ok(x.to_dtype(dtype)?)
}

/// The same values in f32. A transposed matrix stays a view of its rows, for products take either.
fn widen(x: &Tensor) -> Result<Tensor> {
    if x.dtype() != DType::BF16 {
        return Ok(x.to_dtype(DType::F32)?);
    }
    if x.is_contiguous() || x.rank() != 2 {
        return convert::<bf16, f32>(&x.contiguous()?);
    }
    Ok(convert::<bf16, f32>(&x.t()?.contiguous()?)?.t()?)
}

/// Values per task.
const CHUNK: usize = 1024;

/// On all threads; candle converts on one.
fn convert<A: Element, B: Element>(x: &Tensor) -> Result<Tensor> {
    let values = Values::<A>::of(x)?;
    let mut out = vec![B::zero(); values.len()];
    for_rows(&mut out, CHUNK, |index, row| {
        for (to, from) in row.iter_mut().zip(&values[index * CHUNK..]) {
            *to = B::narrow(from.widen());
        }
    });
    to_tensor(out, x.dims())
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn bf16_products_are_f32_products_rounded_once() {
        let matrix = |rows, columns| {
            Tensor::rand(-1f32, 1.0, (rows, columns), &Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap()
        };
        for (m, k, n) in [(1, 1, 1), (7, 33, 5), (40, 64, 70)] {
            let (a, b) = (matrix(m, k), matrix(n, k));
            let wide = |x: &Tensor| x.to_dtype(DType::F32).unwrap();
            let expected = wide(&a).matmul(&wide(&b).t().unwrap()).unwrap();
            let found = matmul_f32(&a, &b.t().unwrap()).unwrap();
            assert_eq!(found.to_vec2::<f32>().unwrap(), expected.to_vec2::<f32>().unwrap());
            let rounded = matmul(&a, &b.t().unwrap()).unwrap();
            let expected = expected.to_dtype(DType::BF16).unwrap();
            assert_eq!(rounded.to_vec2::<bf16>().unwrap(), expected.to_vec2::<bf16>().unwrap());
        }
    }
}
