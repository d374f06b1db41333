//! Dot products in f32 by fused multiply-adds of AVX2; a weight in bf16 is widened in registers. The memory sets the pace, so
//! that wider vectors would not be faster.

use std::arch::x86_64::{
    __m256, _mm_loadu_si128, _mm256_castsi256_ps, _mm256_cvtepu16_epi32, _mm256_fmadd_ps, _mm256_loadu_ps,
    _mm256_setzero_ps, _mm256_slli_epi32, _mm256_storeu_ps,
};
use std::ops::Range;

use half::bf16;

use super::super::super::rows::ask;
use super::super::factor::Side;
use super::super::target::Target;
use super::{Dots, LINES, Rows, Weights, weights};

/// Values of a vector.
const LANES: usize = 8;
/// Products that are summed side by side, in two vectors.
const BOTH: usize = 2 * LANES;

/// AVX2 with fused multiply-adds.
pub(in super::super) struct Wide;

impl Dots for Wide {
    const NARROW: bool = false;

    #[target_feature(enable = "avx2,fma")]
    unsafe fn dots<const M: usize>(
        terms: &[(Rows<'_>, Side<'_>)],
        row: usize,
        columns: &Range<usize>,
        filled: &[f32],
    ) -> [[f32; LINES]; M] {
        let (mut folded, mut filled) = ([[0.0; LINES]; M], filled);
        for (rows, right) in terms {
            let Rows::Wide(x, stride) = rows else { unreachable!("rows are in f32") };
            let (weights, next) = (weights(right, columns, &mut filled), LINES * right.factor.stride);
            // Row by row: the sums of several would not fit into the registers, and the weights are in the L1 cache.
            for (i, folded) in folded.iter_mut().enumerate() {
                let x = &x[(row + i) * stride..][..right.depth()];
                match weights {
                    Weights::Narrow(w) => add(folded, x, w, next),
                    Weights::Wide(w) => add(folded, x, w, next),
                }
            }
        }
        folded
    }
}

/// A type of weights that vectors of f32 are made of.
trait Widened: Target {
    /// Eight values.
    ///
    /// # Safety
    /// The machine has AVX2.
    unsafe fn eight(values: &[Self; LANES]) -> __m256;
}

impl Widened for f32 {
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn eight(values: &[Self; LANES]) -> __m256 {
        // SAFETY: eight values are read.
        unsafe { _mm256_loadu_ps(values.as_ptr()) }
    }
}

impl Widened for bf16 {
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn eight(values: &[Self; LANES]) -> __m256 {
        // SAFETY: eight values are read.
        let bits = _mm256_cvtepu16_epi32(unsafe { _mm_loadu_si128(values.as_ptr().cast()) });
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
    }
}

/// Adds the products of one row with four; the next rows of the weight lie `next` values behind these.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn add<T: Widened>(folded: &mut [f32; LINES], x: &[f32], w: [&[T]; LINES], next: usize) {
    let mut sums = [[_mm256_setzero_ps(); 2]; LINES];
    let (chunks, rest) = x.as_chunks::<BOTH>();
    let whole = chunks.len() * BOTH;
    let rows = w.map(|row| row[..whole].as_chunks::<BOTH>().0);
    for (at, x) in chunks.iter().enumerate() {
        // SAFETY: the caller's instructions.
        let x = halves(x).map(|half| unsafe { f32::eight(half) });
        for (sums, row) in sums.iter_mut().zip(rows) {
            ask(row[at].as_ptr().wrapping_add(next));
            for ((sum, x), w) in sums.iter_mut().zip(x).zip(halves(&row[at])) {
                // SAFETY: as above.
                *sum = _mm256_fmadd_ps(x, unsafe { T::eight(w) }, *sum);
            }
        }
    }
    for ((sums, row), folded) in sums.iter().zip(w).zip(folded) {
        let mut lanes = [0f32; BOTH];
        for (lanes, sum) in lanes.as_chunks_mut::<LANES>().0.iter_mut().zip(sums) {
            // SAFETY: eight values are written.
            unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), *sum) };
        }
        for ((lane, x), w) in lanes.iter_mut().zip(rest).zip(&row[whole..]) {
            *lane = x.mul_add(w.widen(), *lane);
        }
        let mut half = BOTH / 2;
        while half > 0 {
            for lane in 0..half {
                lanes[lane] += lanes[lane + half];
            }
            half /= 2;
        }
        *folded += lanes[0];
    }
}

/// The first eight values and the last.
#[inline(always)]
fn halves<T>(values: &[T; BOTH]) -> [&[T; LANES]; 2] {
    let (first, last) = values.split_at(LANES);
    [first, last].map(|half| half.first_chunk().expect("half of the values"))
}
