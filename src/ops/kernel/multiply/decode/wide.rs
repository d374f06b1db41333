//! Dot products in f32 by fused multiply-adds; a weight in bf16 is widened in registers.
//!
//! Sums are kept in 16 lanes, whatever the width of vectors, and folded in one order: AVX2 and AVX-512 give the same bits.

use std::ops::Range;

use super::super::factor::Side;
use super::super::target::Target;
use super::{Dots, LINES, Rows, Weights, weights};

/// Products that are summed side by side.
const LANES: usize = 16;

/// Declares a set of instructions that compute [`dots`].
macro_rules! dots {
    ($(#[$attribute:meta])* $name:ident, $features:literal) => {
        $(#[$attribute])*
        pub(in super::super) struct $name;

        impl Dots for $name {
            const NARROW: bool = false;

            unsafe fn dots<const M: usize>(
                terms: &[(Rows<'_>, Side<'_>)],
                row: usize,
                columns: &Range<usize>,
                filled: &[f32],
            ) -> [[f32; LINES]; M] {
                #[target_feature(enable = $features)]
                fn with_features<const M: usize>(
                    terms: &[(Rows<'_>, Side<'_>)],
                    row: usize,
                    columns: &Range<usize>,
                    filled: &[f32],
                ) -> [[f32; LINES]; M] {
                    dots(terms, row, columns, filled)
                }

                // SAFETY: the caller's promise.
                unsafe { with_features(terms, row, columns, filled) }
            }
        }
    };
}

dots! {
    /// Vectors of 8.
    Avx2, "avx2,fma"
}

dots! {
    /// Vectors of 16.
    Avx512, "avx512f,avx512bw,avx512dq,avx512vl,fma"
}

#[inline(always)]
fn dots<const M: usize>(
    terms: &[(Rows<'_>, Side<'_>)],
    row: usize,
    columns: &Range<usize>,
    filled: &[f32],
) -> [[f32; LINES]; M] {
    let (mut folded, mut filled) = ([[0.0; LINES]; M], filled);
    for (rows, right) in terms {
        let Rows::Wide(x, stride) = rows else { unreachable!("rows are in f32") };
        let weights = weights(right, columns, &mut filled);
        // Row by row: the sums of several would not fit into the registers of AVX2, and the weights are in the L1 cache.
        for (i, folded) in folded.iter_mut().enumerate() {
            let x = &x[(row + i) * stride..][..right.depth()];
            match weights {
                Weights::Narrow(w) => add(folded, x, w),
                Weights::Wide(w) => add(folded, x, w),
            }
        }
    }
    folded
}

/// Adds the products of one row with four.
#[inline(always)]
fn add<T: Target>(folded: &mut [f32; LINES], x: &[f32], w: [&[T]; LINES]) {
    let mut sums = [[0f32; LANES]; LINES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    let whole = chunks.len() * LANES;
    let rows = w.map(|row| row[..whole].as_chunks::<LANES>().0);
    for (at, x) in chunks.iter().enumerate() {
        for (sums, row) in sums.iter_mut().zip(rows) {
            for ((sum, x), w) in sums.iter_mut().zip(x).zip(&row[at]) {
                *sum = x.mul_add(w.widen(), *sum);
            }
        }
    }
    for ((sums, row), folded) in sums.iter_mut().zip(w).zip(folded) {
        for ((sum, x), w) in sums.iter_mut().zip(rest).zip(&row[whole..]) {
            *sum = x.mul_add(w.widen(), *sum);
        }
        let mut half = LANES / 2;
        while half > 0 {
            for lane in 0..half {
                sums[lane] += sums[lane + half];
            }
            half /= 2;
        }
        *folded += sums[0];
    }
}
