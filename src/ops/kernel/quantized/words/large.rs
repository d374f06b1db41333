//! Blocks of 256 integers in eight parts, each with a scale and a minimum.

use std::arch::x86_64::{
    _mm_cvtsi64_si128, _mm256_add_epi32, _mm256_add_ps, _mm256_and_si256, _mm256_cvtepi32_ps,
    _mm256_cvtepu8_epi16, _mm256_cvtepu8_epi32, _mm256_fmadd_ps, _mm256_mul_ps, _mm256_or_si256,
    _mm256_set1_epi16, _mm256_set1_ps, _mm256_setzero_ps, _mm256_slli_epi16, _mm256_srli_epi16,
    _mm256_storeu_ps, _mm256_sub_ps,
};

use super::super::{PART, bytes, scales_and_minima};
use super::{PARTS, Words, ask_ahead, eight, half, nibbles, sixteen, total};

/// A block of 256 values in eight parts, with scales and minima of six bits: `d, dmin, scales [12], ..`.
pub(super) trait Large {
    const BYTES: usize;
    /// Where the integers begin whose two nibbles belong to two parts.
    const NIBBLES: usize;
    /// Whether 32 bytes after the scales hold a fifth bit of each value, that of a part at the part's number.
    const FIVE: bool;
}

pub(super) struct Q4K;
pub(super) struct Q5K;

impl Large for Q4K {
    const BYTES: usize = 4 + 12 + 128;
    const NIBBLES: usize = 4 + 12;
    const FIVE: bool = false;
}

impl Large for Q5K {
    const BYTES: usize = 4 + 12 + 32 + 128;
    const NIBBLES: usize = 4 + 12 + 32;
    const FIVE: bool = true;
}

/// # Safety
/// The machine has avx2, fma and f16c.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn large<F: Large>(row: &[u8], x: &Words) -> f32 {
    let (mut sums, mut minima) = ([_mm256_setzero_ps(); 2], _mm256_setzero_ps());
    for (number, block) in row.chunks_exact(F::BYTES).enumerate() {
        let first = PARTS * number;
        let (scales, least) = scales_and_minima(bytes(block, 4));
        let scaled = |at: usize, six: u64| {
            let six = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(six.cast_signed()));
            _mm256_mul_ps(half(block, at), _mm256_cvtepi32_ps(six))
        };
        minima = _mm256_fmadd_ps(scaled(2, least), eight(&x.sums[first..]), minima);
        let mut factors = [0f32; PARTS];
        let scales = _mm256_mul_ps(scaled(0, scales), eight(&x.scales[first..]));
        // SAFETY: eight values are written.
        unsafe { _mm256_storeu_ps(factors.as_mut_ptr(), scales) };
        // The bits of the next two parts are the lowest two.
        let mut high = [0, 16].map(|at| _mm256_cvtepu8_epi16(sixteen(bytes(block, 16 + at))));
        for pair in 0..PARTS / 2 {
            let qs = &block[F::NIBBLES + PART * pair..];
            ask_ahead(qs);
            let [mut first, mut last] = [nibbles(bytes(qs, 0)), nibbles(bytes(qs, 16))];
            if F::FIVE {
                let bits = |high| {
                    let low = _mm256_slli_epi16::<4>(_mm256_and_si256(high, _mm256_set1_epi16(1)));
                    [low, _mm256_slli_epi16::<3>(_mm256_and_si256(high, _mm256_set1_epi16(2)))]
                };
                let (firsts, lasts) = (bits(high[0]), bits(high[1]));
                first = [0, 1].map(|i| _mm256_or_si256(first[i], firsts[i]));
                last = [0, 1].map(|i| _mm256_or_si256(last[i], lasts[i]));
                high = high.map(|high| _mm256_srli_epi16::<2>(high));
            }
            for i in 0..2 {
                let [low, high] = x.products([first[i], last[i]], PARTS * number + 2 * pair + i);
                let whole = _mm256_cvtepi32_ps(_mm256_add_epi32(low, high));
                sums[i] = _mm256_fmadd_ps(whole, _mm256_set1_ps(factors[2 * pair + i]), sums[i]);
            }
        }
    }
    total(_mm256_sub_ps(_mm256_add_ps(sums[0], sums[1]), minima))
}
