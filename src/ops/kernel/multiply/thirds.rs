//! Values in f32 as sums of three bf16, for products at the accuracy of f32 on tiles of bf16.
//!
//! Rounding to 8 bits of significand, three times what is left, takes all 24: `x = x1 + x2 + x3` with `x2` at most 2^-8 of
//! `x` and `x3` at most 2^-17. Of the nine products `x1 w1 + x1 w2 + x2 w1 + x1 w3 + x3 w1 + x2 w2` are taken; the others
//! are below the rounding of an f32. What is not finite makes `x3` NaN; the smallest third is lost where it is denormal.
//!
//! Layout: as in [`pack`](super::pack) with three parts behind one another in each step, `[depth / 32][3][..]`; pairs are
//! of depth `p` and `p + 16`, since then two vectors of f32 become one of pairs without crossing lanes.

use std::arch::x86_64::{
    __m512, __m512i, _mm512_add_epi32, _mm512_and_si512, _mm512_castps_si512, _mm512_castsi512_ps,
    _mm512_loadu_ps, _mm512_maskz_loadu_ps, _mm512_range_ps, _mm512_set1_epi32, _mm512_set1_ps,
    _mm512_setzero_ps, _mm512_setzero_si512, _mm512_srli_epi32, _mm512_store_si512, _mm512_sub_ps,
    _mm512_ternarylogic_epi32,
};
use std::ops::Range;

use half::bf16;

use super::factor::{Scratch, Side};
use super::pack::{Blocks, STEP, STRIP, fetch, store, transpose};

/// Parts of a value.
pub(super) const PARTS: usize = 3;
/// Values of a step of one part of a strip.
const TILE: usize = STRIP * STEP;

/// Packs `lines x depth` of the right side into `out`.
///
/// # Safety
/// The machine has avx512f, avx512bw and avx512dq. `out` is aligned to 64 bytes, and `blocks.stride` a multiple of 32.
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
pub(super) unsafe fn right(
    side: Side<'_>,
    lines: Range<usize>,
    depth: Range<usize>,
    out: &mut [bf16],
    blocks: Blocks,
    scratch: &mut Scratch,
) {
    blocks.check(&lines, &depth, out.len(), PARTS);
    let (out, apart, step) = (out.as_mut_ptr(), blocks.strips * TILE, blocks.strips * PARTS * TILE);
    if side.along {
        side.wide_pieces(lines.clone(), depth.clone(), &mut scratch.wide, |rows, values, stride| {
            for start in rows.clone().step_by(STRIP) {
                let height = STRIP.min(rows.end - start);
                let values = &values[(start - rows.start) * stride..];
                let to = blocks.strip((start - lines.start) / STRIP, PARTS);
                for at in (0..depth.len()).step_by(STEP) {
                    let mut parts = [[_mm512_setzero_si512(); 16]; PARTS];
                    for line in 0..height {
                        let row = &values[line * stride..];
                        fetch(row, STRIP * stride + at);
                        fetch(row, STRIP * stride + at + STRIP);
                        let three = thirds(pair_along(row, at, depth.len()));
                        for (part, vector) in parts.iter_mut().zip(three) {
                            part[line] = vector;
                        }
                    }
                    for (number, part) in parts.iter_mut().enumerate() {
                        transpose(part);
                        // SAFETY: `check` holds all blocks inside `out`.
                        unsafe { store(out.add(to + at / STEP * step + number * apart), part) };
                    }
                }
            }
        });
        return;
    }
    /// Lines at once: a few lines of the cache from each stored row.
    const REACH: usize = 4 * STRIP;
    for group in lines.clone().step_by(REACH) {
        let columns = group..lines.end.min(group + REACH);
        side.wide_pieces(depth.clone(), columns.clone(), &mut scratch.wide, |rows, values, stride| {
            for start in (0..rows.len()).step_by(STEP) {
                let at = (rows.start - depth.start + start) / STEP * step;
                let values = &values[start * stride..];
                let height = rows.len() - start;
                for pair in 0..STEP / 2 {
                    for column in (0..columns.len()).step_by(STRIP) {
                        let two = pair_across(values, stride, (pair, height), (column, columns.len()));
                        fetch(values, (pair + STEP) * stride + column);
                        fetch(values, (pair + STEP + STRIP) * stride + column);
                        let to = blocks.strip((group - lines.start + column) / STRIP, PARTS);
                        for (number, vector) in thirds(two).into_iter().enumerate() {
                            // SAFETY: as above.
                            unsafe {
                                let to = out.add(to + at + number * apart + pair * STEP);
                                _mm512_store_si512(to.cast(), vector);
                            }
                        }
                    }
                }
            }
        });
    }
}

/// Packs up to 32 lines of the left side into `out`, `[depth / 32][3][32][32]`.
///
/// # Safety
/// The machine has avx512f, avx512bw and avx512dq, and `out` is aligned to 64 bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512dq")]
pub(super) unsafe fn left(
    side: Side<'_>,
    lines: Range<usize>,
    depth: Range<usize>,
    out: &mut [bf16],
    scratch: &mut Scratch,
) {
    const STEP_SIZE: usize = 2 * PARTS * TILE;
    assert!(lines.len() <= 2 * STRIP && depth.len().div_ceil(STEP) <= out.len() / STEP_SIZE);
    let out = out.as_mut_ptr();
    if side.along {
        side.wide_pieces(lines, depth.clone(), &mut scratch.wide, |rows, values, stride| {
            // Step by step, so that what is written lies end to end.
            for at in (0..depth.len()).step_by(STEP) {
                let whole = at + STEP <= depth.len();
                for line in 0..rows.len() {
                    let row = &values[line * stride..];
                    fetch(row, 2 * STRIP * stride + at);
                    fetch(row, 2 * STRIP * stride + at + STRIP);
                    let two = if whole { whole_pair(row, at) } else { pair_along(row, at, depth.len()) };
                    for (number, vector) in thirds(two).into_iter().enumerate() {
                        // SAFETY: within `out` by the assertion.
                        unsafe {
                            let to = out.add(at / STEP * STEP_SIZE + number * 2 * TILE + line * STEP);
                            _mm512_store_si512(to.cast(), vector);
                        }
                    }
                }
            }
        });
        return;
    }
    side.wide_pieces(depth.clone(), lines.clone(), &mut scratch.wide, |rows, values, stride| {
        for start in (0..rows.len()).step_by(STEP) {
            let at = (rows.start - depth.start + start) / STEP * STEP_SIZE;
            let (values, height) = (&values[start * stride..], rows.len() - start);
            for column in (0..lines.len()).step_by(STRIP) {
                let mut parts = [[_mm512_setzero_si512(); 16]; PARTS];
                for pair in 0..STEP / 2 {
                    let two = pair_across(values, stride, (pair, height), (column, lines.len()));
                    for (part, vector) in parts.iter_mut().zip(thirds(two)) {
                        part[pair] = vector;
                    }
                }
                for (number, part) in parts.iter_mut().enumerate() {
                    transpose(part);
                    // SAFETY: as above.
                    unsafe { store(out.add(at + number * 2 * TILE + column / STRIP * TILE), part) };
                }
            }
        }
    });
}

/// Values `at..at + 16` and the 16 behind them, zeros from `end` on.
#[inline]
#[target_feature(enable = "avx512f")]
fn pair_along(row: &[f32], at: usize, end: usize) -> [__m512; 2] {
    [load(row, at, end), load(row, at + STRIP, end)]
}

/// Values `at..at + 32`.
#[inline]
#[target_feature(enable = "avx512f")]
fn whole_pair(row: &[f32], at: usize) -> [__m512; 2] {
    let values = &row[at..at + 2 * STRIP];
    // SAFETY: 32 values.
    unsafe { [_mm512_loadu_ps(values.as_ptr()), _mm512_loadu_ps(values.as_ptr().add(STRIP))] }
}

/// 16 values from `column` on of rows `pair` and `pair + 16`; zeros where no row is or no column.
#[inline]
#[target_feature(enable = "avx512f")]
fn pair_across(
    values: &[f32],
    stride: usize,
    (pair, height): (usize, usize),
    (column, width): (usize, usize),
) -> [__m512; 2] {
    let mut two = [_mm512_setzero_ps(); 2];
    // A loop: closures given to functions of the standard library are not compiled for these instructions.
    for (half, vector) in two.iter_mut().enumerate() {
        let row = pair + half * STRIP;
        if row < height {
            *vector = load(&values[row * stride..], column, width);
        }
    }
    two
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(row: &[f32], at: usize, end: usize) -> __m512 {
    if at + STRIP <= end {
        let values = &row[at..at + STRIP];
        // SAFETY: 16 values.
        return unsafe { _mm512_loadu_ps(values.as_ptr()) };
    }
    let count = end.saturating_sub(at);
    assert!(count == 0 || at + count <= row.len());
    // SAFETY: values that the mask leaves out are not touched, the others are there.
    unsafe { _mm512_maskz_loadu_ps(((1u32 << count) - 1) as u16, row.as_ptr().wrapping_add(at)) }
}

/// Pairs of the parts of two vectors, the first in the low halves.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn thirds([a, b]: [__m512; 2]) -> [__m512i; PARTS] {
    // Infinity would be the rounding of the largest values; what is not finite leaves a rest that is not, either.
    let largest = _mm512_set1_ps(f32::from_bits(0x7f7f_0000));
    // The smaller magnitude of both, with the sign of the first.
    let (a1, b1) =
        (rounded(_mm512_range_ps::<0b0010>(a, largest)), rounded(_mm512_range_ps::<0b0010>(b, largest)));
    let (a, b) = (_mm512_sub_ps(a, a1), _mm512_sub_ps(b, b1));
    let (a2, b2) = (rounded(a), rounded(b));
    let (a3, b3) = (_mm512_sub_ps(a, a2), _mm512_sub_ps(b, b2));
    [halves(a1, b1), halves(a2, b2), halves(a3, b3)]
}

/// To 8 bits of significand, ties away from zero.
#[inline]
#[target_feature(enable = "avx512f")]
fn rounded(values: __m512) -> __m512 {
    let bits = _mm512_add_epi32(_mm512_castps_si512(values), _mm512_set1_epi32(0x8000));
    _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(0xffff_0000u32 as i32)))
}

/// The upper halves of both.
#[inline]
#[target_feature(enable = "avx512f")]
fn halves(low: __m512, high: __m512) -> __m512i {
    let low = _mm512_srli_epi32::<16>(_mm512_castps_si512(low));
    let upper = _mm512_set1_epi32(0xffff_0000u32 as i32);
    // low | (high & upper)
    _mm512_ternarylogic_epi32::<0xf8>(low, _mm512_castps_si512(high), upper)
}
