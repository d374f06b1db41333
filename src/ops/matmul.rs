//! Matrix products of tensors. bf16 operands on the CPU are widened and multiplied in f32, which rounds once and is
//! faster than candle's bf16 product there.

use candle_core::{DType, Tensor};

use crate::error::Result;

/// `a [m, k]` times `b [k, n]`, in the type of `a`.
pub fn matmul(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if a.dtype() == DType::F32 || !a.device().is_cpu() {
        return Ok(a.matmul(b)?);
    }
    Ok(matmul_f32(a, b)?.to_dtype(a.dtype())?)
}

/// `a [m, k]` times `b [k, n]`, in f32.
pub fn matmul_f32(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    if a.device().is_cpu() {
        return Ok(a.to_dtype(DType::F32)?.matmul(&b.to_dtype(DType::F32)?)?);
    }
    Ok(a.matmul(b)?.to_dtype(DType::F32)?)
}
