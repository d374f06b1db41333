//! Blocks of 256 integers with a scale for each 16 of them.

use std::arch::x86_64::{
    __m128i, __m256, __m256i, _mm_and_si128, _mm_cvtsi32_si128, _mm_set_epi64x, _mm_set1_epi8,
    _mm_srli_epi16, _mm_srli_si128, _mm_sub_epi8, _mm256_add_ps, _mm256_and_si256, _mm256_castsi256_si128,
    _mm256_cmpeq_epi8, _mm256_cvtepi8_epi16, _mm256_cvtepi8_epi32, _mm256_cvtepi32_ps,
    _mm256_extracti128_si256, _mm256_fmadd_ps, _mm256_mul_ps, _mm256_or_si256, _mm256_set1_epi8,
    _mm256_set1_ps, _mm256_setzero_ps, _mm256_setzero_si256, _mm256_slli_epi16, _mm256_srl_epi16,
    _mm256_storeu_ps, _mm256_sub_epi8, _mm256_sub_ps,
};

use super::super::{PART, bytes};
use super::{PARTS, Words, all, ask_ahead, eight, half, sixteen, total};

/// A block of 256 values with a scale for each 16, a signed byte times an f16.
pub(super) trait Sixteens {
    const BYTES: usize;
    /// Where the f16 is that the scales are multiplied by.
    const FACTOR: usize;
    /// Where the f16 is that the minima are multiplied by, if the block has minima.
    const MINIMA: Option<usize>;
    /// The scales, and the minima where the block has them.
    ///
    /// # Safety
    /// The machine has avx2, fma and f16c.
    unsafe fn scales(block: &[u8]) -> [__m128i; 2];
    /// The integers of a part, one in each byte.
    ///
    /// # Safety
    /// The machine has avx2, fma and f16c.
    unsafe fn integers(block: &[u8], part: usize) -> __m256i;
}

pub(super) struct Q2K;
pub(super) struct Q3K;
pub(super) struct Q6K;

/// `scales [16] (4 bits scale, 4 bits minimum), qs [64], d, dmin`: as [`super::super::large::Q2K`].
impl Sixteens for Q2K {
    const BYTES: usize = 16 + 64 + 4;
    const FACTOR: usize = 80;
    const MINIMA: Option<usize> = Some(82);

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn scales(block: &[u8]) -> [__m128i; 2] {
        let both = sixteen(bytes(block, 0));
        [both, _mm_srli_epi16::<4>(both)].map(|four| _mm_and_si128(four, _mm_set1_epi8(15)))
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn integers(block: &[u8], part: usize) -> __m256i {
        two_bits(bytes(block, 16 + part / 4 * PART), part)
    }
}

/// `hmask [32], qs [64], scales [12], d`: as [`super::super::large::Q3K`].
impl Sixteens for Q3K {
    const BYTES: usize = 32 + 64 + 12 + 2;
    const FACTOR: usize = 108;
    const MINIMA: Option<usize> = None;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn scales(block: &[u8]) -> [__m128i; 2] {
        let low = u64::from_le_bytes(*bytes(block, 96));
        let high = u32::from_le_bytes(*bytes(block, 104));
        let high = |first: u32| {
            let two = |shift: u32| u64::from(high >> shift & 0x0303_0303) << 4;
            two(first) | two(first + 2) << 32
        };
        let eight = |shift: u32| (low >> shift & 0x0f0f_0f0f_0f0f_0f0f | high(shift)).cast_signed();
        let six = _mm_sub_epi8(_mm_set_epi64x(eight(4), eight(0)), _mm_set1_epi8(32));
        [six, six]
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn integers(block: &[u8], part: usize) -> __m256i {
        let low = two_bits(bytes(block, 32 + part / 4 * PART), part);
        // Where the mask has no bit, the value is four less.
        let bit = _mm256_set1_epi8((1u8 << part).cast_signed());
        let none = _mm256_cmpeq_epi8(_mm256_and_si256(all(bytes(block, 0)), bit), _mm256_setzero_si256());
        _mm256_sub_epi8(low, _mm256_and_si256(none, _mm256_set1_epi8(4)))
    }
}

/// The two bits of each byte that belong to a part.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn two_bits(qs: &[u8; PART], part: usize) -> __m256i {
    let shift = _mm_cvtsi32_si128(2 * (part % 4) as i32);
    _mm256_and_si256(_mm256_srl_epi16(all(qs), shift), _mm256_set1_epi8(3))
}

/// `ql [128], qh [64], scales [16], d`: as [`super::super::large::Q6K`].
impl Sixteens for Q6K {
    const BYTES: usize = 128 + 64 + 16 + 2;
    const FACTOR: usize = 208;
    const MINIMA: Option<usize> = None;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn scales(block: &[u8]) -> [__m128i; 2] {
        let scales = sixteen(bytes(block, 192));
        [scales, scales]
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn integers(block: &[u8], part: usize) -> __m256i {
        let (half, quarter) = (part / 4, part % 4);
        let four = _mm_cvtsi32_si128((quarter / 2 * 4) as i32);
        let low = _mm256_srl_epi16(all(bytes(block, half * 64 + quarter % 2 * PART)), four);
        let high = two_bits(bytes(block, 128 + half * PART), quarter);
        let low = _mm256_and_si256(low, _mm256_set1_epi8(15));
        _mm256_sub_epi8(_mm256_or_si256(low, _mm256_slli_epi16::<4>(high)), _mm256_set1_epi8(32))
    }
}

/// # Safety
/// The machine has avx2, fma and f16c.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn sixteens<F: Sixteens>(row: &[u8], x: &Words) -> f32 {
    let (mut sums, mut minima) = ([_mm256_setzero_ps(); 2], _mm256_setzero_ps());
    for (number, block) in row.chunks_exact(F::BYTES).enumerate() {
        // SAFETY: the caller's promise.
        let [scales, least] = unsafe { F::scales(block) };
        let scales = widened(half(block, F::FACTOR), scales);
        if let Some(at) = F::MINIMA {
            let halves = &x.halves[2 * PARTS * number..];
            for (i, least) in widened(half(block, at), least).into_iter().enumerate() {
                minima = _mm256_fmadd_ps(least, eight(&halves[PARTS * i..]), minima);
            }
        }
        let mut factors = [[0f32; PARTS]; 2];
        for (factors, scales) in factors.iter_mut().zip(scales) {
            // SAFETY: eight values are written.
            unsafe { _mm256_storeu_ps(factors.as_mut_ptr(), scales) };
        }
        let factors = factors.as_flattened();
        for part in 0..PARTS {
            ask_ahead(&block[part * F::BYTES / PARTS..]);
            // SAFETY: the caller's promise.
            let integers = unsafe { F::integers(block, part) };
            let words = [_mm256_castsi256_si128(integers), _mm256_extracti128_si256::<1>(integers)];
            let words = words.map(|sixteen| _mm256_cvtepi8_epi16(sixteen));
            let index = PARTS * number + part;
            for (i, whole) in x.products(words, index).into_iter().enumerate() {
                let factor = _mm256_set1_ps(factors[2 * part + i] * x.scales[index]);
                sums[i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole), factor, sums[i]);
            }
        }
    }
    total(_mm256_sub_ps(_mm256_add_ps(sums[0], sums[1]), minima))
}

/// 16 signed bytes times a factor.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn widened(factor: __m256, sixteen: __m128i) -> [__m256; 2] {
    [sixteen, _mm_srli_si128::<8>(sixteen)]
        .map(|eight| _mm256_mul_ps(factor, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight))))
}
