//! What a router scores its experts with, a product of few outputs in f32 whatever its input is, and the largest of the scores.

use candle_core::{DType, Tensor};
use half::bf16;
use rayon::prelude::*;

use super::groups::dot;
use super::kernel::{Element, Values, dispatch, to_tensor, vectorized, written};
use super::sum::cast_row;
use super::{Op, matmul_f32};
use crate::error::{Error, Result};

/// Rows of a task: wide enough that they stay in the L2 cache while experts go by.
const ROWS: usize = 32;

/// From so many tokens in bf16 on a product of matrices is worth that the weight is split for it.
const MANY: usize = 64;

/// `x W^T`, `[tokens, experts]` in f32, for `x [tokens, d]` of any type and `weight [experts, d]`; nothing is rounded
/// before it is summed.
pub fn scores(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let _time = Op::Experts.begin();
    let ((tokens, width), (experts, d)) = (x.dims2()?, weight.dims2()?);
    if width != d {
        return Err(Error::invalid(format!(
            "{tokens} rows of width {width} for a router of {experts} experts and width {d}"
        )));
    }
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

/// The indices of the largest of `values`, as many as there is room for, the largest first; of equal ones the first.
pub fn largest(values: &[f32], chosen: &mut [u32]) {
    if values.len() <= SIDE_BY_SIDE {
        return largest_of_few(values, chosen);
    }
    let mut count = 0;
    for (index, value) in values.iter().enumerate() {
        let mut place = count;
        while place > 0 && *value > values[chosen[place - 1] as usize] {
            place -= 1;
        }
        if place < chosen.len() {
            count = chosen.len().min(count + 1);
            chosen.copy_within(place..count - 1, place + 1);
            chosen[place] = index as u32;
        }
    }
}

/// Values of which each is compared with each: more comparisons, but 16 at once and without a branch.
const SIDE_BY_SIDE: usize = 16;

vectorized! {
    fn largest_of_few(values: &[f32], chosen: &mut [u32]) {
        // In an order in which a NaN has a place too, and zeros are one.
        let mut keys = [i32::MIN; SIDE_BY_SIDE];
        for (key, value) in keys.iter_mut().zip(values) {
            let bits = (value + 0.0).to_bits() as i32;
            *key = bits ^ ((bits >> 31) as u32 >> 1) as i32;
        }
        let mut places = [0i32; SIDE_BY_SIDE];
        for (index, key) in keys.iter().enumerate().take(values.len()) {
            for (other, place) in places.iter_mut().enumerate() {
                let is_before = (*key > keys[other]) | ((*key == keys[other]) & (index < other));
                *place += i32::from(is_before);
            }
        }
        for (index, place) in places.iter().enumerate().take(values.len()) {
            if let Some(chosen) = chosen.get_mut(*place as usize) {
                *chosen = index as u32;
            }
        }
    }
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

    #[test]
    fn the_largest_are_those_of_a_stable_sort() {
        let mut state = 7u32;
        for experts in 1..2 * SIDE_BY_SIDE {
            let row: Vec<f32> = (0..experts)
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (state >> 29) as f32
                })
                .collect();
            let mut sorted: Vec<u32> = (0..experts as u32).collect();
            sorted.sort_by(|x, y| row[*y as usize].total_cmp(&row[*x as usize]));
            for active in 1..=experts {
                let mut chosen = vec![0; active];
                largest(&row, &mut chosen);
                assert_eq!(chosen, sorted[..active], "{row:?}");
            }
        }
    }

    #[test]
    fn of_equal_scores_the_first_are_chosen() {
        let mut chosen = [0; 3];
        largest(&[0.5, 0.7, 0.5, 0.7], &mut chosen);
        assert_eq!(chosen, [1, 3, 0]);
        largest(&[0.1, 0.2, 0.9, 0.3, 0.8], &mut chosen);
        assert_eq!(chosen, [2, 4, 3]);
    }
}
