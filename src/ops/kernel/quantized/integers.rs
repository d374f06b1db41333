//! Rows of blocks times a row of bf16, for the formats that most files are in, on AVX-512: integers are multiplied as they are
//! stored and the sum of a part is scaled once, where the way for all formats scales and rounds every value. So
//! these sums know nothing of the rounding of weights, and are the better for it.

use std::arch::x86_64::{
    __m128i, __m512, __m512bh, __m512i, _MM_HINT_T0, _mm_cvtsi64_si128, _mm_loadu_si128, _mm_prefetch,
    _mm256_add_ps, _mm256_and_si256, _mm256_castsi256_si128, _mm256_cvtepi32_ps, _mm256_cvtepu8_epi16,
    _mm256_cvtepu8_epi32, _mm256_extracti128_si256, _mm256_loadu_ps, _mm256_loadu_si256, _mm256_mul_ps,
    _mm256_or_si256, _mm256_set1_epi8, _mm256_set1_epi16, _mm256_setzero_ps, _mm256_slli_epi16,
    _mm256_srli_epi16, _mm256_storeu_ps, _mm256_sub_epi8, _mm512_add_ps, _mm512_and_si512,
    _mm512_castps512_ps256, _mm512_castsi256_si512, _mm512_cvtepi8_epi32, _mm512_cvtepi32_epi16,
    _mm512_cvtepi32_ps, _mm512_cvtepu8_epi16, _mm512_cvtph_ps, _mm512_dpbf16_ps, _mm512_fmadd_ps,
    _mm512_inserti64x4, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mask_add_epi16,
    _mm512_mask_i32gather_epi32, _mm512_mul_ps, _mm512_mullo_epi32, _mm512_permutexvar_epi16,
    _mm512_reduce_add_ps, _mm512_set1_epi16, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setr_epi32,
    _mm512_setzero_ps, _mm512_setzero_si512, _mm512_srli_epi16, _mm512_storeu_ps,
};

use super::super::multiply::Path;
use super::{Kind, PART, Row};

/// Bytes between what is read and what is asked for: the next page, where the processor does not look by itself.
const AHEAD: usize = 4096;

/// `x w`, if the machine and the format have this way.
pub(super) fn dot(kind: Kind, row: &[u8], x: &Row) -> Option<f32> {
    let (values, bytes) = kind.block();
    let len = x.narrow.len();
    assert!(
        len.is_multiple_of(values) && (len / values).checked_mul(bytes) == Some(row.len()),
        "a row of {kind:?} for {len} values"
    );
    if !matches!(Path::best(), Path::Amx | Path::Avx512Bf16) {
        return None;
    }
    // SAFETY: the machine has the path, and with it these instructions, and the row has the blocks of all values.
    unsafe {
        Some(match kind {
            Kind::Q4_0 => small::<Q4_0>(row, x),
            Kind::Q5_0 => small::<Q5_0>(row, x),
            Kind::Q8_0 => small::<Q8_0>(row, x),
            Kind::Q4K => q4_k(row, x),
            Kind::Q6K => q6_k(row, x),
            _ => return None,
        })
    }
}

/// A format with blocks of 32 values, each an integer times the f16 that the block begins with.
trait Small {
    const BYTES: usize;
    /// The products of a block's integers with part `index` of `x`, summed in lanes.
    ///
    /// # Safety
    /// The block and the part are there, and the machine has the instructions.
    unsafe fn sums(block: *const u8, x: &Row, index: usize) -> __m512;
}

struct Q4_0;
struct Q5_0;
struct Q8_0;

/// bf16 of `i % count - zero`.
const fn integers(count: usize, zero: usize) -> [u16; 32] {
    let mut table = [0; 32];
    let mut i = 0;
    while i < 32 {
        table[i] = (((i % count) as f32 - zero as f32).to_bits() >> 16) as u16;
        i += 1;
    }
    table
}

impl Small for Q4_0 {
    const BYTES: usize = 2 + 16;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn sums(block: *const u8, x: &Row, index: usize) -> __m512 {
        static TABLE: [u16; 32] = integers(16, 8);
        // SAFETY: the caller's promise.
        unsafe { narrow_sums(look_up(nibbles(block.add(2)), &TABLE), x, index) }
    }
}

impl Small for Q5_0 {
    const BYTES: usize = 2 + 4 + 16;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn sums(block: *const u8, x: &Row, index: usize) -> __m512 {
        static TABLE: [u16; 32] = integers(32, 16);
        // SAFETY: the caller's promise.
        unsafe {
            let fifth = block.add(2).cast::<u32>().read_unaligned();
            let four = _mm512_and_si512(nibbles(block.add(6)), _mm512_set1_epi16(15));
            let all = _mm512_mask_add_epi16(four, fifth, four, _mm512_set1_epi16(16));
            narrow_sums(look_up(all, &TABLE), x, index)
        }
    }
}

impl Small for Q8_0 {
    const BYTES: usize = 2 + 32;

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    unsafe fn sums(block: *const u8, x: &Row, index: usize) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe {
            let [low, high] = [2, 18].map(|at| wide(_mm_loadu_si128(block.add(at).cast())));
            let at = x.wide.as_ptr().add(index * PART);
            _mm512_fmadd_ps(high, _mm512_loadu_ps(at.add(16)), _mm512_mul_ps(low, _mm512_loadu_ps(at)))
        }
    }
}

/// # Safety
/// `row` has the blocks of all values of `x`, and the machine has the instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn small<F: Small>(row: &[u8], x: &Row) -> f32 {
    /// Blocks whose scales are read at once.
    const BLOCKS: usize = 16;

    let count = x.narrow.len() / PART;
    let (mut even, mut odd) = (_mm512_setzero_ps(), _mm512_setzero_ps());
    let mut factors = [0f32; BLOCKS];
    for first in (0..count).step_by(BLOCKS) {
        let here = BLOCKS.min(count - first);
        // SAFETY: the blocks up to `count` are there.
        unsafe {
            let start = row.as_ptr().add(first * F::BYTES);
            _mm512_storeu_ps(factors.as_mut_ptr(), scales::<F>(start, here));
            for i in (0..here).step_by(2) {
                let block = start.add(i * F::BYTES);
                // A hint, which is ignored where nothing is mapped.
                _mm_prefetch::<_MM_HINT_T0>(block.wrapping_add(AHEAD).cast());
                even = _mm512_fmadd_ps(F::sums(block, x, first + i), _mm512_set1_ps(factors[i]), even);
                if i + 1 < here {
                    let sums = F::sums(block.add(F::BYTES), x, first + i + 1);
                    odd = _mm512_fmadd_ps(sums, _mm512_set1_ps(factors[i + 1]), odd);
                }
            }
        }
    }
    _mm512_reduce_add_ps(_mm512_add_ps(even, odd))
}

/// The scales of up to 16 blocks.
///
/// # Safety
/// So many blocks are there, and the machine has the instructions.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn scales<F: Small>(start: *const u8, count: usize) -> __m512 {
    let numbers = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    let offsets = _mm512_mullo_epi32(numbers, _mm512_set1_epi32(F::BYTES as i32));
    let mask = ((1u32 << count) - 1) as u16;
    // SAFETY: four bytes are read of each block, which is longer.
    let found =
        unsafe { _mm512_mask_i32gather_epi32::<1>(_mm512_setzero_si512(), mask, offsets, start.cast()) };
    _mm512_cvtph_ps(_mm512_cvtepi32_epi16(found))
}

/// `d, dmin, scales [12], qs [128]`: as [`super::large::Q4K`].
///
/// # Safety
/// As [`small`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn q4_k(row: &[u8], x: &Row) -> f32 {
    const BYTES: usize = 4 + 12 + 128;
    static TABLE: [u16; 32] = integers(16, 0);

    let (mut even, mut odd, mut minima) = (_mm512_setzero_ps(), _mm512_setzero_ps(), _mm256_setzero_ps());
    for (number, block) in row.chunks_exact(BYTES).enumerate() {
        let word = |at: usize| u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
        let (a, b, c) = (word(4), word(8), word(12));
        // Six bits each, those of the last four parts in three pieces.
        let pair = |low: u32, high: u32| (u64::from(low) | u64::from(high) << 32).cast_signed();
        let factors = pair(a & 0x3f3f_3f3f, c & 0x0f0f_0f0f | (a >> 6 & 0x0303_0303) << 4);
        let least = pair(b & 0x3f3f_3f3f, c >> 4 & 0x0f0f_0f0f | (b >> 6 & 0x0303_0303) << 4);
        let scaled = |eight: i64, at: usize| {
            let d = _mm256_set1_epi16(i16::from_le_bytes([block[at], block[at + 1]]));
            let eight = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(eight)));
            _mm256_mul_ps(_mm512_castps512_ps256(_mm512_cvtph_ps(d)), eight)
        };
        let mut factor = [0f32; 8];
        // SAFETY: eight parts of `x` belong to the block, and 128 bytes from the sixteenth on are its integers.
        unsafe {
            _mm256_storeu_ps(factor.as_mut_ptr(), scaled(factors, 0));
            let sums = _mm256_loadu_ps(x.sums.as_ptr().add(8 * number));
            minima = _mm256_add_ps(minima, _mm256_mul_ps(scaled(least, 2), sums));
            for i in 0..4 {
                let bytes = block.as_ptr().add(16 + 32 * i);
                _mm_prefetch::<_MM_HINT_T0>(bytes.wrapping_add(AHEAD).cast());
                let both = _mm512_cvtepu8_epi16(_mm256_loadu_si256(bytes.cast()));
                let part = 8 * number + 2 * i;
                let low = narrow_sums(look_up(both, &TABLE), x, part);
                let high = narrow_sums(look_up(_mm512_srli_epi16::<4>(both), &TABLE), x, part + 1);
                even = _mm512_fmadd_ps(low, _mm512_set1_ps(factor[2 * i]), even);
                odd = _mm512_fmadd_ps(high, _mm512_set1_ps(factor[2 * i + 1]), odd);
            }
        }
    }
    let mut rest = [0f32; 8];
    // SAFETY: eight values are written.
    unsafe { _mm256_storeu_ps(rest.as_mut_ptr(), minima) };
    _mm512_reduce_add_ps(_mm512_add_ps(even, odd)) - rest.iter().sum::<f32>()
}

/// `ql [128], qh [64], scales [16], d`: as [`super::large::Q6K`].
///
/// # Safety
/// As [`small`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn q6_k(row: &[u8], x: &Row) -> f32 {
    const BYTES: usize = 128 + 64 + 16 + 2;

    let (mut even, mut odd) = (_mm512_setzero_ps(), _mm512_setzero_ps());
    for (number, block) in row.chunks_exact(BYTES).enumerate() {
        let d = _mm512_cvtph_ps(_mm256_set1_epi16(i16::from_le_bytes([block[208], block[209]])));
        let mut factors = [0f32; 16];
        // SAFETY: the block has so many bytes, and `x` has 256 values for it.
        unsafe {
            let block = block.as_ptr();
            _mm512_storeu_ps(
                factors.as_mut_ptr(),
                _mm512_mul_ps(d, wide(_mm_loadu_si128(block.add(192).cast()))),
            );
            for half in 0..2 {
                let load = |at: usize| _mm256_loadu_si256(block.add(at).cast());
                let (first, second) = (load(64 * half), load(64 * half + 32));
                _mm_prefetch::<_MM_HINT_T0>(block.wrapping_add(64 * half + AHEAD).cast());
                _mm_prefetch::<_MM_HINT_T0>(block.wrapping_add(128 + 32 * half + AHEAD).cast());
                let top = load(128 + 32 * half);
                let quarters = [
                    (first, _mm256_slli_epi16::<4>(top)),
                    (second, _mm256_slli_epi16::<2>(top)),
                    (_mm256_srli_epi16::<4>(first), top),
                    (_mm256_srli_epi16::<4>(second), _mm256_srli_epi16::<2>(top)),
                ];
                for (quarter, (low, high)) in quarters.into_iter().enumerate() {
                    let low = _mm256_and_si256(low, _mm256_set1_epi8(0x0f));
                    let high = _mm256_and_si256(high, _mm256_set1_epi8(0x30));
                    let q = _mm256_sub_epi8(_mm256_or_si256(low, high), _mm256_set1_epi8(32));
                    let [first, second] = [_mm256_castsi256_si128(q), _mm256_extracti128_si256::<1>(q)];
                    let part = 4 * half + quarter;
                    let x = x.wide.as_ptr().add((8 * number + part) * PART);
                    let first = _mm512_mul_ps(wide(first), _mm512_loadu_ps(x));
                    let second = _mm512_mul_ps(wide(second), _mm512_loadu_ps(x.add(16)));
                    even = _mm512_fmadd_ps(first, _mm512_set1_ps(factors[2 * part]), even);
                    odd = _mm512_fmadd_ps(second, _mm512_set1_ps(factors[2 * part + 1]), odd);
                }
            }
        }
    }
    _mm512_reduce_add_ps(_mm512_add_ps(even, odd))
}

/// The nibbles of 16 bytes in words, the low ones first; what stands above a low one is still there.
///
/// # Safety
/// They can be read, and the machine has the instructions.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn nibbles(bytes: *const u8) -> __m512i {
    // SAFETY: the caller's promise.
    let low = _mm256_cvtepu8_epi16(unsafe { _mm_loadu_si128(bytes.cast()) });
    _mm512_inserti64x4::<1>(_mm512_castsi256_si512(low), _mm256_srli_epi16::<4>(low))
}

/// The values at the lowest five bits of each word.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn look_up(indices: __m512i, table: &[u16; 32]) -> __m512i {
    // SAFETY: 64 bytes are read.
    _mm512_permutexvar_epi16(indices, unsafe { _mm512_loadu_si512(table.as_ptr().cast()) })
}

/// 16 signed bytes as f32.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
fn wide(bytes: __m128i) -> __m512 {
    _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))
}

/// The products of 32 values of bf16 with part `index` of `x`, summed in lanes.
///
/// # Safety
/// The part is there, and the machine has the instructions.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
unsafe fn narrow_sums(values: __m512i, x: &Row, index: usize) -> __m512 {
    // SAFETY: the caller's promise; any bits are a vector of bf16.
    unsafe {
        let x = _mm512_loadu_si512(x.narrow.as_ptr().add(index * PART).cast());
        let [x, values] = [x, values].map(|bits| std::mem::transmute::<__m512i, __m512bh>(bits));
        _mm512_dpbf16_ps(_mm512_setzero_ps(), x, values)
    }
}
