//! Both sides of a product in the order in which the inner products read them.
//!
//! Right side: blocks of a few strips of 16 lines, `[depth / 32][STRIPS][16 pairs][16 lines][2]`, so that a product reads one
//! stream. That is a transposition of pairs where lines lie along the stored rows, and an interleaving of two rows where they lie across.
//! Left side: 32 lines, `[depth / 32][32 lines][32]`: a copy, or interleaving and transposition. Depth is filled up with
//! zeros to a multiple of 32, lines to the next strip.

use std::arch::x86_64::{
    __m512i, _MM_HINT_T1, _mm_prefetch, _mm512_loadu_si512, _mm512_maskz_loadu_epi16,
    _mm512_permutex2var_epi64, _mm512_set_epi64, _mm512_setzero_si512, _mm512_shuffle_i32x4,
    _mm512_store_si512, _mm512_storeu_si512, _mm512_unpackhi_epi16, _mm512_unpackhi_epi32,
    _mm512_unpackhi_epi64, _mm512_unpacklo_epi16, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};
use std::ops::Range;

use half::bf16;

use super::factor::{Scratch, Side};
use super::source::Source;

/// Lines of a strip.
pub(super) const STRIP: usize = 16;
/// Depth of a step: what one vector of bf16 holds.
pub(super) const STEP: usize = 32;

/// Where packed strips of the right side lie in a panel.
#[derive(Clone, Copy)]
pub(super) struct Blocks {
    /// Strips of a block.
    pub(super) strips: usize,
    /// Values from one block to the next.
    pub(super) stride: usize,
    /// Depth before what is packed now, a multiple of 32.
    pub(super) before: usize,
}

impl Blocks {
    /// Where the depth that is packed now begins in a strip, if a value has that many parts.
    #[inline]
    pub(super) fn strip(self, strip: usize, parts: usize) -> usize {
        let steps = self.before / STEP * self.strips * parts + strip % self.strips;
        strip / self.strips * self.stride + steps * STEP * STRIP
    }

    /// Panics unless a panel of `room` values holds `lines x depth`. After it no offset inside a block can wrap.
    pub(super) fn check(self, lines: &Range<usize>, depth: &Range<usize>, room: usize, parts: usize) {
        assert!(self.before.is_multiple_of(STEP));
        let padded = depth.len().checked_next_multiple_of(STEP).and_then(|len| len.checked_add(self.before));
        let used = padded.and_then(|depth| depth.checked_mul(self.strips * parts * STRIP));
        assert!(used.is_some_and(|used| used <= self.stride), "a block of {used:?} in {}", self.stride);
        let all = lines.len().div_ceil(self.strips * STRIP).checked_mul(self.stride);
        assert!(all.is_some_and(|all| all <= room), "blocks of {all:?} in {room}");
    }
}

/// Packs `lines x depth` of the right side into `out`.
///
/// # Safety
/// The machine has avx512f and avx512bw. `out` is aligned to 64 bytes, and `blocks.stride` a multiple of 32.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn right(
    side: Side<'_>,
    lines: Range<usize>,
    depth: Range<usize>,
    out: &mut [bf16],
    blocks: Blocks,
    scratch: &mut Scratch,
) {
    let padded = depth.len().next_multiple_of(STEP);
    blocks.check(&lines, &depth, out.len(), 1);
    let out = out.as_mut_ptr();
    let step = blocks.strips * STEP * STRIP;
    // Of a pair, whose depth is even, from the beginning of its strip.
    let pair_at = |depth: usize| depth / STEP * step + depth % STEP * STRIP;
    if side.along {
        let count = depth.len();
        side.pieces(lines.clone(), depth, scratch, |rows, values, row_stride| {
            for start in rows.clone().step_by(STRIP) {
                let (height, first) = (STRIP.min(rows.end - start), (start - rows.start) * row_stride);
                let to = blocks.strip((start - lines.start) / STRIP, 1);
                for at in (0..count).step_by(STEP) {
                    for line in 0..height {
                        fetch(values, first + (2 * STRIP + line) * row_stride + at);
                    }
                    let mut vectors = load_rows(&values[first + at..], row_stride, height, count - at);
                    transpose(&mut vectors);
                    // SAFETY: within a block, and the assertions hold all blocks inside `out`.
                    unsafe { store(out.add(to + pair_at(at)), &vectors) };
                }
            }
        });
        return;
    }
    // Stored rows are read across, two lines of the cache or as much as makes filling worth a call: each strip is one
    // more stream to write, and the L1 cache has room for few.
    let reach = if matches!(side.factor.source, Source::Bf16(_)) { 4 * STRIP } else { 16 * STRIP };
    for group in lines.clone().step_by(reach) {
        let columns = group..lines.end.min(group + reach);
        let width = columns.len();
        let first = (group - lines.start) / STRIP;
        let mut strips = [0; 16];
        for (i, strip) in strips.iter_mut().enumerate().take(width.div_ceil(STRIP)) {
            *strip = blocks.strip(first + i, 1);
        }
        side.pieces(depth.clone(), columns, scratch, |rows, values, row_stride| {
            let height = rows.len();
            for row in (0..height.next_multiple_of(2)).step_by(2) {
                let deep = rows.start - depth.start + row;
                for at in (0..width).step_by(STEP) {
                    fetch(values, (row + 2 * STRIP) * row_stride + at);
                    fetch(values, (row + 2 * STRIP + 1) * row_stride + at);
                    let low = load(&values[row * row_stride + at..], width - at);
                    let high = if row + 1 < height {
                        load(&values[(row + 1) * row_stride + at..], width - at)
                    } else {
                        _mm512_setzero_si512()
                    };
                    let (one, two) = interleave(low, high);
                    // SAFETY: as above; the second strip is there when the row reaches it.
                    unsafe {
                        _mm512_store_si512(out.add(strips[at / STRIP] + pair_at(deep)).cast(), one);
                        if width - at > STRIP {
                            _mm512_store_si512(out.add(strips[at / STRIP + 1] + pair_at(deep)).cast(), two);
                        }
                    }
                }
            }
        });
    }
    // Pairs of the last step that lie past the depth.
    let written = depth.len().next_multiple_of(2);
    for strip in 0..lines.len().div_ceil(STRIP) {
        for at in (written..padded).step_by(2) {
            // SAFETY: as above.
            unsafe {
                _mm512_store_si512(
                    out.add(blocks.strip(strip, 1) + pair_at(at)).cast(),
                    _mm512_setzero_si512(),
                );
            }
        }
    }
}

/// Packs up to 32 lines of the left side into `out`, `[depth / 32][32][32]`; of lines that are not there only those are
/// written that fill up a strip.
///
/// # Safety
/// The machine has avx512f and avx512bw, and `out` is aligned to 64 bytes.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) unsafe fn left(
    side: Side<'_>,
    lines: Range<usize>,
    depth: Range<usize>,
    out: &mut [bf16],
    scratch: &mut Scratch,
) {
    const BLOCK: usize = 2 * STRIP * STEP;
    let count = depth.len();
    assert!(lines.len() <= 2 * STRIP && count.div_ceil(STEP) <= out.len() / BLOCK);
    let out = out.as_mut_ptr();
    if side.along {
        side.pieces(lines.clone(), depth, scratch, |rows, values, row_stride| {
            for row in 0..rows.len() {
                let line = rows.start - lines.start + row;
                let values = &values[row * row_stride..];
                for at in (0..count).step_by(STEP) {
                    let vector = load(&values[at..], count - at);
                    // SAFETY: within `out` by the assertion.
                    unsafe { _mm512_store_si512(out.add(at / STEP * BLOCK + line * STEP).cast(), vector) };
                }
            }
        });
        return;
    }
    let width = lines.len();
    side.pieces(depth.clone(), lines, scratch, |rows, values, row_stride| {
        // A piece begins at a multiple of 32 of the depth.
        for start in (0..rows.len()).step_by(STEP) {
            let at = rows.start - depth.start + start;
            let mut strips = [[_mm512_setzero_si512(); 16]; 2];
            let [first, second] = &mut strips;
            for (pair, (first, second)) in first.iter_mut().zip(second).enumerate() {
                let row = start + 2 * pair;
                if row >= rows.len() {
                    break;
                }
                let low = load(&values[row * row_stride..], width);
                let high = if row + 1 < rows.len() {
                    load(&values[(row + 1) * row_stride..], width)
                } else {
                    _mm512_setzero_si512()
                };
                (*first, *second) = interleave(low, high);
            }
            for (half, vectors) in strips.iter_mut().enumerate().take(width.div_ceil(STRIP)) {
                transpose(vectors);
                // SAFETY: as above.
                unsafe { store(out.add(at / STEP * BLOCK + half * STRIP * STEP), vectors) };
            }
        }
    });
}

/// Asks for the line of the cache of a value that is read soon; it need not be there.
#[inline]
pub(super) fn fetch<T>(values: &[T], at: usize) {
    // SAFETY: a hint, that never faults.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(values.as_ptr().wrapping_add(at).cast()) }
}

/// The first `count` values (at most 32), zeros behind them.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn load(values: &[bf16], count: usize) -> __m512i {
    let count = count.min(STEP);
    assert!(count <= values.len());
    // SAFETY: `count` values are there; those that the mask leaves out are not touched.
    unsafe {
        if count == STEP {
            _mm512_loadu_si512(values.as_ptr().cast())
        } else {
            _mm512_maskz_loadu_epi16((1 << count) - 1, values.as_ptr().cast())
        }
    }
}

/// `height` rows (at most 16) of at most 32 values, filled up with zeros.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn load_rows(values: &[bf16], stride: usize, height: usize, count: usize) -> [__m512i; 16] {
    let mut vectors = [_mm512_setzero_si512(); 16];
    if height == 16 && count >= STEP {
        assert!(15 * stride + STEP <= values.len());
        for (row, vector) in vectors.iter_mut().enumerate() {
            // SAFETY: in bounds by the assertion.
            *vector = unsafe { _mm512_loadu_si512(values.as_ptr().add(row * stride).cast()) };
        }
        return vectors;
    }
    for (row, vector) in vectors.iter_mut().enumerate().take(height) {
        *vector = load(&values[row * stride..], count);
    }
    vectors
}

/// # Safety
/// `out` is aligned to 64 bytes and has room for 16 vectors.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn store(out: *mut bf16, vectors: &[__m512i; 16]) {
    for (i, vector) in vectors.iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe { _mm512_store_si512(out.add(i * 32).cast(), *vector) };
    }
}

/// Two rows of 32 values to pairs: of the first 16 columns, of the others.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn interleave(low: __m512i, high: __m512i) -> (__m512i, __m512i) {
    // Unpacking works within each 128 bits: `a` has columns 0-3, 8-11, 16-19, 24-27, `b` the others.
    let (a, b) = (_mm512_unpacklo_epi16(low, high), _mm512_unpackhi_epi16(low, high));
    (
        _mm512_permutex2var_epi64(a, _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), b),
        _mm512_permutex2var_epi64(a, _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4), b),
    )
}

/// 16 rows of 16 values of 32 bits, transposed.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn transpose(rows: &mut [__m512i; 16]) {
    let mut pairs = *rows;
    for i in (0..16).step_by(2) {
        pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    // Vector 4 i + c: of rows 4 i to 4 i + 3, columns c, c + 4, c + 8, c + 12, one in each 128 bits.
    let mut fours = pairs;
    for i in (0..16).step_by(4) {
        fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
        fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
        fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
        fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
    for c in 0..4 {
        let (a, b) = (fours[c], fours[c + 4]);
        let (e, f) = (fours[c + 8], fours[c + 12]);
        let (ab_even, ab_odd) = (_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
        let (ef_even, ef_odd) = (_mm512_shuffle_i32x4(e, f, 0x88), _mm512_shuffle_i32x4(e, f, 0xdd));
        rows[c] = _mm512_shuffle_i32x4(ab_even, ef_even, 0x88);
        rows[c + 4] = _mm512_shuffle_i32x4(ab_odd, ef_odd, 0x88);
        rows[c + 8] = _mm512_shuffle_i32x4(ab_even, ef_even, 0xdd);
        rows[c + 12] = _mm512_shuffle_i32x4(ab_odd, ef_odd, 0xdd);
    }
}

/// `to [columns][to_stride] = from [rows][from_stride]` transposed, in blocks of 16 by 16 values.
#[target_feature(enable = "avx512f")]
pub(super) fn turn(from: &[f32], from_stride: usize, to: &mut [f32], to_stride: usize) {
    assert!(from_stride.checked_mul(to_stride) == Some(from.len()) && to.len() == from.len());
    assert!(from_stride.is_multiple_of(16) && to_stride.is_multiple_of(16));
    for row in (0..to_stride).step_by(16) {
        for column in (0..from_stride).step_by(16) {
            let mut vectors = [_mm512_setzero_si512(); 16];
            // SAFETY: 16 rows and columns from here on are inside by the assertions, in both.
            unsafe {
                for (i, vector) in vectors.iter_mut().enumerate() {
                    *vector = _mm512_loadu_si512(from.as_ptr().add((row + i) * from_stride + column).cast());
                }
                transpose(&mut vectors);
                for (i, vector) in vectors.iter().enumerate() {
                    _mm512_storeu_si512(to.as_mut_ptr().add((column + i) * to_stride + row).cast(), *vector);
                }
            }
        }
    }
}
