//! Blocks of 32 integers.

use std::arch::x86_64::{
    __m256i, _mm_loadu_si128, _mm256_add_epi32, _mm256_add_ps, _mm256_and_si256, _mm256_cmpeq_epi16,
    _mm256_cvtepi8_epi16, _mm256_cvtepi32_ps, _mm256_cvtph_ps, _mm256_fmadd_ps, _mm256_loadu_si256,
    _mm256_mul_ps, _mm256_or_si256, _mm256_set1_epi16, _mm256_set1_ps, _mm256_setzero_ps, _mm256_storeu_ps,
    _mm256_sub_epi16,
};

use super::super::{PART, bytes};
use super::{PARTS, Words, ask_ahead, eight, nibbles, sixteen, total};

/// A block of 32 integers times an f16, plus another f16 where it has a minimum.
pub(super) trait Small {
    const BYTES: usize;
    /// Whether the second value of the block is added to each of its own.
    const MINIMUM: bool;
    /// The integers of a block, as those of 16 bits.
    ///
    /// # Safety
    /// The machine has avx2, fma and f16c.
    unsafe fn integers(block: &[u8]) -> [__m256i; 2];
}

macro_rules! small {
    ($($name:ident, $bytes:literal, $minimum:literal, $block:ident => $integers:expr;)+) => {
        $(
            pub(super) struct $name;

            impl Small for $name {
                const BYTES: usize = $bytes;
                const MINIMUM: bool = $minimum;

                #[inline]
                #[target_feature(enable = "avx2,fma,f16c")]
                unsafe fn integers($block: &[u8]) -> [__m256i; 2] {
                    $integers
                }
            }
        )+
    };
}

small! {
    Q4_0, 18, false, block => nibbles(bytes(block, 2)).map(|q| _mm256_sub_epi16(q, _mm256_set1_epi16(8)));
    Q4_1, 20, true, block => nibbles(bytes(block, 4));
    Q5_0, 22, false, block => {
        let q = five_bits(bytes(block, 2), bytes(block, 6));
        q.map(|q| _mm256_sub_epi16(q, _mm256_set1_epi16(16)))
    };
    Q5_1, 24, true, block => five_bits(bytes(block, 4), bytes(block, 8));
    Q8_0, 34, false, block => {
        let qs: &[u8; PART] = bytes(block, 2);
        [0, 16].map(|at| _mm256_cvtepi8_epi16(sixteen(bytes(qs, at))))
    };
}

/// [`nibbles`] with a fifth bit each, the lowest of `high` for the first.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn five_bits(high: &[u8; 4], qs: &[u8; 16]) -> [__m256i; 2] {
    /// The bit of each of 16 lanes.
    const BITS: [i16; 16] = {
        let mut bits = [0; 16];
        let mut i = 0;
        while i < 16 {
            bits[i] = (1u16 << i).cast_signed();
            i += 1;
        }
        bits
    };

    // SAFETY: 16 values are read.
    let bits = unsafe { _mm256_loadu_si256(BITS.as_ptr().cast()) };
    let [low, last] = nibbles(qs);
    let fifth = |high: [u8; 2]| {
        let all = _mm256_set1_epi16(i16::from_le_bytes(high));
        let set = _mm256_cmpeq_epi16(_mm256_and_si256(all, bits), bits);
        _mm256_and_si256(set, _mm256_set1_epi16(16))
    };
    [_mm256_or_si256(low, fifth([high[0], high[1]])), _mm256_or_si256(last, fifth([high[2], high[3]]))]
}

/// # Safety
/// The machine has avx2, fma and f16c.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn small<F: Small>(row: &[u8], x: &Words) -> f32 {
    let (mut sums, mut minima) = ([_mm256_setzero_ps(); 2], _mm256_setzero_ps());
    for (group, blocks) in row.chunks(PARTS * F::BYTES).enumerate() {
        let first = group * PARTS;
        // Scales of the blocks, then minima.
        let mut halves = [[0u16; PARTS]; 2];
        for (i, block) in blocks.chunks_exact(F::BYTES).enumerate() {
            halves[0][i] = u16::from_le_bytes(*bytes(block, 0));
            if F::MINIMUM {
                halves[1][i] = u16::from_le_bytes(*bytes(block, 2));
            }
        }
        // SAFETY: eight values are read of each, and eight are written.
        let factors = unsafe {
            let [scales, least] = halves.map(|eight| _mm256_cvtph_ps(_mm_loadu_si128(eight.as_ptr().cast())));
            if F::MINIMUM {
                minima = _mm256_fmadd_ps(least, eight(&x.sums[first..]), minima);
            }
            let mut factors = [0f32; PARTS];
            _mm256_storeu_ps(factors.as_mut_ptr(), _mm256_mul_ps(scales, eight(&x.scales[first..])));
            factors
        };
        for (i, block) in blocks.chunks_exact(F::BYTES).enumerate() {
            ask_ahead(block);
            // SAFETY: the caller's promise.
            let [low, high] = x.products(unsafe { F::integers(block) }, first + i);
            let whole = _mm256_cvtepi32_ps(_mm256_add_epi32(low, high));
            sums[i % 2] = _mm256_fmadd_ps(whole, _mm256_set1_ps(factors[i]), sums[i % 2]);
        }
    }
    total(_mm256_add_ps(_mm256_add_ps(sums[0], sums[1]), minima))
}
