//! Dot products of bf16 as pairs in AVX-512, and of f32 where a weight is not in bf16.

use std::arch::x86_64::{
    __m512, __m512i, _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512,
    _mm512_maskz_loadu_epi16, _mm512_maskz_loadu_ps, _mm512_reduce_add_ps, _mm512_setzero_ps,
    _mm512_setzero_si512,
};
use std::ops::Range;

use half::bf16;

use super::super::super::rows::ask;
use super::super::avx512::as_bf16;
use super::super::factor::Side;
use super::{Dots, LINES, Rows, Weights, weights};

/// AVX-512 with its dot product of bf16.
pub(in super::super) struct Narrow;

impl Dots for Narrow {
    const NARROW: bool = true;

    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn dots<const M: usize>(
        terms: &[(Rows<'_>, Side<'_>)],
        row: usize,
        columns: &Range<usize>,
        filled: &[f32],
    ) -> [[f32; LINES]; M] {
        let mut sums: [[__m512; LINES]; M] = [[_mm512_setzero_ps(); LINES]; M];
        let mut filled = filled;
        for (rows, right) in terms {
            let depth = right.depth();
            match (rows, weights(right, columns, &mut filled)) {
                (Rows::Narrow(x, x_stride), Weights::Narrow(w)) => {
                    let x: [&[bf16]; M] = std::array::from_fn(|i| &x[(row + i) * x_stride..][..depth]);
                    add_narrow(&mut sums, x, w, LINES * right.factor.stride);
                }
                (Rows::Wide(x, x_stride), Weights::Wide(w)) => {
                    let x: [&[f32]; M] = std::array::from_fn(|i| &x[(row + i) * x_stride..][..depth]);
                    add_wide(&mut sums, x, w);
                }
                _ => unreachable!("rows and weights are of one type"),
            }
        }
        let mut folded = [[0.0; LINES]; M];
        for (folded, sums) in folded.iter_mut().zip(sums) {
            for (folded, sum) in folded.iter_mut().zip(sums) {
                *folded = _mm512_reduce_add_ps(sum);
            }
        }
        folded
    }
}

/// Adds products of bf16; the next rows of the weight lie `next` values behind these.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn add_narrow<const M: usize>(
    sums: &mut [[__m512; LINES]; M],
    x: [&[bf16]; M],
    w: [&[bf16]; LINES],
    next: usize,
) {
    let depth = w[0].len();
    for at in (0..depth).step_by(32) {
        let mut weights = [_mm512_setzero_si512(); LINES];
        for (vector, row) in weights.iter_mut().zip(w) {
            ask(row.as_ptr().wrapping_add(next + at));
            *vector = load(row, at);
        }
        for (sums, row) in sums.iter_mut().zip(x) {
            let x = load(row, at);
            for (sum, w) in sums.iter_mut().zip(weights) {
                *sum = _mm512_dpbf16_ps(*sum, as_bf16(x), as_bf16(w));
            }
        }
    }
}

/// Adds products of f32.
#[inline]
#[target_feature(enable = "avx512f")]
fn add_wide<const M: usize>(sums: &mut [[__m512; LINES]; M], x: [&[f32]; M], w: [&[f32]; LINES]) {
    let depth = w[0].len();
    for at in (0..depth).step_by(16) {
        let mut weights = [_mm512_setzero_ps(); LINES];
        for (vector, row) in weights.iter_mut().zip(w) {
            *vector = load_wide(row, at);
        }
        for (sums, row) in sums.iter_mut().zip(x) {
            let x = load_wide(row, at);
            for (sum, w) in sums.iter_mut().zip(weights) {
                *sum = _mm512_fmadd_ps(x, w, *sum);
            }
        }
    }
}

/// 32 values of a row from `at` on, or what is left, with zeros behind it.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn load(row: &[bf16], at: usize) -> __m512i {
    let rest = &row[at..];
    // SAFETY: values that the mask leaves out are not touched.
    unsafe {
        if rest.len() >= 32 {
            _mm512_loadu_si512(rest.as_ptr().cast())
        } else {
            _mm512_maskz_loadu_epi16((1 << rest.len()) - 1, rest.as_ptr().cast())
        }
    }
}

/// 16 values of a row from `at` on, or what is left, with zeros behind it.
#[inline]
#[target_feature(enable = "avx512f")]
fn load_wide(row: &[f32], at: usize) -> __m512 {
    let rest = &row[at..];
    // SAFETY: values that the mask leaves out are not touched.
    unsafe {
        if rest.len() >= 16 {
            _mm512_loadu_ps(rest.as_ptr())
        } else {
            _mm512_maskz_loadu_ps((1 << rest.len()) - 1, rest.as_ptr())
        }
    }
}
