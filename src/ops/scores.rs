//! A product of few outputs, in f32 whatever its input is: what a router scores its experts with.

use candle_core::{DType, Tensor};
use half::bf16;
use rayon::prelude::*;

use super::groups::dot;
use super::kernel::{Element, Values, dispatch, to_tensor, written};
use super::sum::cast_row;
use super::{Op, matmul_f32};
use crate::error::Result;

/// Rows of a task: wide enough that they stay in the L2 cache while experts go by.
const ROWS: usize = 32;

/// From so many tokens in bf16 on a product of matrices is worth that the weight is split for it.
const MANY: usize = 64;

/// `x W^T`, `[tokens, experts]` in f32, for `x [tokens, d]` of any type and `weight [experts, d]`; nothing is rounded
/// before it is summed.
pub fn scores(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let _time = Op::Experts.begin();
    let weight = weight.to_dtype(DType::F32)?.contiguous()?;
    if !x.device().is_cpu() {
        return Ok(x.to_dtype(DType::F32)?.matmul(&weight.t()?)?);
    }
    let x = x.contiguous()?;
    match x.dtype() {
        DType::F32 => scored::<f32>(&x, &weight, |x, of_rows| of_rows(x)),
        DType::BF16 if x.dim(0)? >= MANY => scored_in_thirds(&x, &weight),
        _ => dispatch!(x.dtype(), scored_widened(&x, &weight)),
    }
}

/// The weight as the sum of three in bf16, which have all its bits: so the products with `x` in bf16 are exact.
fn scored_in_thirds(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (experts, d) = weight.dims2()?;
    let mut rest = Values::<f32>::of(weight)?.to_vec();
    let mut thirds = Vec::with_capacity(3 * rest.len());
    for _ in 0..3 {
        thirds.extend(rest.iter_mut().map(|rest| {
            let third = bf16::from_f32(*rest);
            *rest -= third.to_f32();
            third
        }));
    }
    let thirds = matmul_f32(x, &to_tensor(thirds, &[3 * experts, d])?.t()?)?; // [tokens, 3 * experts]
    let thirds = Values::<f32>::of(&thirds)?;
    let mut sums = Vec::with_capacity(x.dim(0)? * experts);
    for thirds in thirds.chunks_exact(3 * experts.max(1)) {
        sums.extend((0..experts).map(|e| thirds[e] + (thirds[experts + e] + thirds[2 * experts + e])));
    }
    to_tensor(sums, &[x.dim(0)?, experts])
}

fn scored_widened<T: Element>(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    scored::<T>(x, weight, |x, of_rows| {
        let mut wide = vec![0f32; x.len()];
        cast_row(&mut wide, x);
        of_rows(&wide);
    })
}

/// `in_f32` gives a task's rows in f32 to what it is called with.
fn scored<T: Element>(
    x: &Tensor,
    weight: &Tensor,
    in_f32: impl Fn(&[T], &mut dyn FnMut(&[f32])) + Sync,
) -> Result<Tensor> {
    let (experts, d) = weight.dims2()?;
    let tokens = x.dim(0)?;
    let (values, weight) = (Values::<T>::of(x)?, Values::<f32>::of(weight)?);
    let (values, weight): (&[T], &[f32]) = (&values, &weight);
    let (width, count) = (d.max(1), experts.max(1));
    let scores = written(tokens * experts, |scores| {
        scores.par_chunks_mut(ROWS * count).zip(values.par_chunks(ROWS * width)).for_each(|(scores, x)| {
            in_f32(x, &mut |x| {
                for (expert, weight) in weight.chunks_exact(width).enumerate() {
                    for (scores, x) in scores.chunks_exact_mut(count).zip(x.chunks_exact(width)) {
                        scores[expert] = dot(x, weight);
                    }
                }
            });
        });
    });
    to_tensor(scores, &[tokens, experts])
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn scores_are_a_product_in_f32() {
        let weight = Tensor::rand(-1f32, 1.0, (5, 133), &Device::Cpu).unwrap();
        for (tokens, dtype) in [(70, DType::F32), (MANY - 1, DType::BF16), (MANY, DType::BF16)] {
            let x = Tensor::rand(-1f32, 1.0, (tokens, 133), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            let wide = x.to_dtype(DType::F64).unwrap();
            let expected = wide.matmul(&weight.to_dtype(DType::F64).unwrap().t().unwrap()).unwrap();
            let found = scores(&x, &weight).unwrap().to_dtype(DType::F64).unwrap();
            let most = (found - expected).unwrap().abs().unwrap().max_all().unwrap();
            assert!(most.to_scalar::<f64>().unwrap() < 1e-5);
        }
    }
}
