//! Rows of blocks times a row of bf16, on AVX2 and newer: integers of 16 bits are multiplied and the sum of a part is scaled once.
//!
//! A part of the row is 32 whole numbers of 16 bits times a power of two. A bf16 has 8 bits, so every value within a
//! factor of 128 of the greatest is exact, and each smaller one is off by at most 2^-15 of the greatest. Values below
//! 2^-102 may become zero.

mod large;
mod sixteens;
mod small;

use std::arch::x86_64::{
    __m128i, __m256, __m256i, _mm_loadu_si128, _mm_set1_epi16, _mm256_and_si256, _mm256_cvtepu8_epi16,
    _mm256_cvtph_ps, _mm256_loadu_ps, _mm256_loadu_si256, _mm256_madd_epi16, _mm256_set1_epi16,
    _mm256_srli_epi16, _mm256_storeu_ps,
};

use half::bf16;

use super::super::rows::ask;
use super::{Kind, PART, bytes};
use large::{Q4K, Q5K, large};
use sixteens::{Q2K, Q3K, Q6K, sixteens};
use small::{Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, small};

/// Bytes between what is read and what is asked for: the next page, where the processor does not look by itself.
const AHEAD: usize = 4096;
/// Values of a vector of f32.
const LANES: usize = 8;
/// Parts whose scales are computed at once, those of a block of 256 values.
const PARTS: usize = LANES;

/// A row as integers of 16 bits.
pub(crate) struct Words {
    values: Vec<i16>,
    /// The factor of each part's integers. Zeros fill the last group of [`PARTS`].
    scales: Vec<f32>,
    /// The sum of each part's values. Zeros fill the last group likewise.
    sums: Vec<f32>,
    /// The sum of each half of each part, two for a part.
    halves: Vec<f32>,
}

impl Words {
    /// The values as integers. `None` if one is infinite, NaN, or 2^74 or larger, where scales could overflow.
    pub(super) fn of(row: &[bf16]) -> Option<Self> {
        /// Bits of an integer beside its sign.
        const BITS: u32 = 15;
        /// Exponents as f32 stores them: the bias, and those between which scales neither vanish nor overflow.
        const BIAS: u32 = 127;
        const LEAST: u32 = 40;
        /// 1.5 times 2^23: adding it and taking it away rounds to whole numbers as the processor does, without a call.
        const WHOLE: f32 = 12_582_912.0;
        const MOST: u32 = 200;

        let parts = (row.len() / PART).next_multiple_of(PARTS);
        let mut words = Self {
            values: Vec::with_capacity(row.len()),
            scales: vec![0.0; parts],
            sums: vec![0.0; parts],
            halves: Vec::with_capacity(2 * parts),
        };
        for (number, part) in row.as_chunks::<PART>().0.iter().enumerate() {
            let greatest = part.iter().map(|value| value.to_bits() & 0x7fff).max().unwrap_or(0);
            let exponent = u32::from(greatest >> 7).max(LEAST);
            if exponent > MOST {
                return None;
            }
            // Powers of two, so that multiplying with them is exact.
            let power = |exponent: u32| f32::from_bits(exponent << 23);
            let (up, down) = (power(2 * BIAS + BITS - 1 - exponent), power(exponent - (BITS - 1)));
            words.values.extend(part.iter().map(|value| (value.to_f32() * up + WHOLE - WHOLE) as i16));
            words.scales[number] = down;
            let half = |at: usize| part[at..][..PART / 2].iter().map(|value| value.to_f32()).sum::<f32>();
            let halves = [half(0), half(PART / 2)];
            words.sums[number] = halves[0] + halves[1];
            words.halves.extend(halves);
        }
        Some(words)
    }

    /// The values that the integers stand for.
    #[cfg(test)]
    pub(super) fn to_f32(&self) -> Vec<f32> {
        let parts = self.values.as_chunks::<PART>().0.iter().zip(&self.scales);
        parts.flat_map(|(part, scale)| part.map(|value| f32::from(value) * scale)).collect()
    }

    /// The products of integers of 16 bits with the first and the last 16 values of part `index`, summed in lanes.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn products(&self, [low, high]: [__m256i; 2], index: usize) -> [__m256i; 2] {
        let values = &self.values[index * PART..][..PART];
        // SAFETY: 16 values are read from the first on, and 16 after them.
        let [first, last] = [0, 16].map(|at| unsafe { _mm256_loadu_si256(values.as_ptr().add(at).cast()) });
        [_mm256_madd_epi16(low, first), _mm256_madd_epi16(high, last)]
    }
}

/// `x w` with the values `w` of `row`.
///
/// # Safety
/// The machine has avx2, fma and f16c.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn dot(kind: Kind, row: &[u8], x: &Words) -> f32 {
    let (values, bytes) = kind.block();
    assert!(
        x.values.len().is_multiple_of(values)
            && (x.values.len() / values).checked_mul(bytes) == Some(row.len()),
        "a row of {kind:?} for {} values",
        x.values.len()
    );
    // SAFETY: the caller's promise.
    unsafe {
        match kind {
            Kind::Q4_0 => small::<Q4_0>(row, x),
            Kind::Q4_1 => small::<Q4_1>(row, x),
            Kind::Q5_0 => small::<Q5_0>(row, x),
            Kind::Q5_1 => small::<Q5_1>(row, x),
            Kind::Q8_0 => small::<Q8_0>(row, x),
            Kind::Q2K => sixteens::<Q2K>(row, x),
            Kind::Q3K => sixteens::<Q3K>(row, x),
            Kind::Q4K => large::<Q4K>(row, x),
            Kind::Q5K => large::<Q5K>(row, x),
            Kind::Q6K => sixteens::<Q6K>(row, x),
        }
    }
}

/// The low nibbles of 16 bytes, then the high ones.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn nibbles(qs: &[u8; 16]) -> [__m256i; 2] {
    let words = _mm256_cvtepu8_epi16(sixteen(qs));
    [_mm256_and_si256(words, _mm256_set1_epi16(15)), _mm256_srli_epi16::<4>(words)]
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn sixteen(bytes: &[u8; 16]) -> __m128i {
    // SAFETY: 16 bytes are read.
    unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn all(bytes: &[u8; PART]) -> __m256i {
    // SAFETY: 32 bytes are read.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

/// Eight values of f32.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn eight(values: &[f32]) -> __m256 {
    let values = &values[..LANES];
    // SAFETY: eight values are read.
    unsafe { _mm256_loadu_ps(values.as_ptr()) }
}

/// Asks for bytes that are read soon.
#[inline(always)]
fn ask_ahead(block: &[u8]) {
    ask(block.as_ptr().wrapping_add(AHEAD));
}

/// The sum of all lanes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn total(lanes: __m256) -> f32 {
    let mut values = [0f32; LANES];
    // SAFETY: eight values are written.
    unsafe { _mm256_storeu_ps(values.as_mut_ptr(), lanes) };
    values.iter().sum()
}

/// The f16 at `at`, in all lanes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn half(block: &[u8], at: usize) -> __m256 {
    _mm256_cvtph_ps(_mm_set1_epi16(i16::from_le_bytes(*bytes(block, at))))
}
