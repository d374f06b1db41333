//! Rows of blocks times a row of bf16, on AVX2 and newer: integers of 16 bits are multiplied and the sum of a part is scaled once.
//!
//! A part of the row is 32 whole numbers of 16 bits times a power of two. A bf16 has 8 bits, so every value within a
//! factor of 128 of the greatest is exact, and each smaller one is off by at most 2^-15 of the greatest. Values below
//! 2^-102 may become zero.

use std::arch::x86_64::{
    __m128i, __m256, __m256i, _mm_and_si128, _mm_cvtsi32_si128, _mm_cvtsi64_si128, _mm_loadu_si128,
    _mm_set_epi64x, _mm_set1_epi8, _mm_set1_epi16, _mm_srli_epi16, _mm_srli_si128, _mm_sub_epi8,
    _mm256_add_epi32, _mm256_add_ps, _mm256_and_si256, _mm256_castsi256_si128, _mm256_cmpeq_epi8,
    _mm256_cmpeq_epi16, _mm256_cvtepi8_epi16, _mm256_cvtepi8_epi32, _mm256_cvtepi32_ps, _mm256_cvtepu8_epi16,
    _mm256_cvtepu8_epi32, _mm256_cvtph_ps, _mm256_extracti128_si256, _mm256_fmadd_ps, _mm256_loadu_ps,
    _mm256_loadu_si256, _mm256_madd_epi16, _mm256_mul_ps, _mm256_or_si256, _mm256_set1_epi8,
    _mm256_set1_epi16, _mm256_set1_ps, _mm256_setzero_ps, _mm256_setzero_si256, _mm256_slli_epi16,
    _mm256_srl_epi16, _mm256_srli_epi16, _mm256_storeu_ps, _mm256_sub_epi8, _mm256_sub_epi16, _mm256_sub_ps,
};

use half::bf16;

use super::super::rows::ask;
use super::{Kind, PART, bytes, scales_and_minima};

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
            words.values.extend(part.iter().map(|value| (value.to_f32() * up).round_ties_even() as i16));
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

/// A block of 32 integers times an f16, plus another f16 where it has a minimum.
trait Small {
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
            struct $name;

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

/// The low nibbles of 16 bytes, then the high ones.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn nibbles(qs: &[u8; 16]) -> [__m256i; 2] {
    let words = _mm256_cvtepu8_epi16(sixteen(qs));
    [_mm256_and_si256(words, _mm256_set1_epi16(15)), _mm256_srli_epi16::<4>(words)]
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

/// # Safety
/// The machine has avx2, fma and f16c.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn small<F: Small>(row: &[u8], x: &Words) -> f32 {
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

/// A block of 256 values in eight parts, with scales and minima of six bits: `d, dmin, scales [12], ..`.
trait Large {
    const BYTES: usize;
    /// Where the integers begin whose two nibbles belong to two parts.
    const NIBBLES: usize;
    /// Whether 32 bytes after the scales hold a fifth bit of each value, that of a part at the part's number.
    const FIVE: bool;
}

struct Q4K;
struct Q5K;

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
unsafe fn large<F: Large>(row: &[u8], x: &Words) -> f32 {
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

/// A block of 256 values with a scale for each 16, a signed byte times an f16.
trait Sixteens {
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
    /// As [`scales`](Self::scales).
    unsafe fn integers(block: &[u8], part: usize) -> __m256i;
}

struct Q2K;
struct Q3K;
struct Q6K;

/// `scales [16] (4 bits scale, 4 bits minimum), qs [64], d, dmin`: as [`super::large::Q2K`].
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

/// `hmask [32], qs [64], scales [12], d`: as [`super::large::Q3K`].
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

/// `ql [128], qh [64], scales [16], d`: as [`super::large::Q6K`].
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
unsafe fn sixteens<F: Sixteens>(row: &[u8], x: &Words) -> f32 {
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

/// The f16 at `at`, in all lanes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn half(block: &[u8], at: usize) -> __m256 {
    _mm256_cvtph_ps(_mm_set1_epi16(i16::from_le_bytes(*bytes(block, at))))
}

/// 16 signed bytes times a factor.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn widened(factor: __m256, sixteen: __m128i) -> [__m256; 2] {
    [sixteen, _mm_srli_si128::<8>(sixteen)]
        .map(|eight| _mm256_mul_ps(factor, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight))))
}
