//! Both sides of a product in f32, as tiles read them.
//!
//! The right side lies in blocks as wide as a tile, `[depth][width]`, filled up with zeros; left lines lie one after the other.

use std::arch::x86_64::{
    __m256, _mm256_loadu_ps, _mm256_permute2f128_ps, _mm256_setzero_ps, _mm256_shuffle_ps, _mm256_storeu_ps,
    _mm256_unpackhi_ps, _mm256_unpacklo_ps,
};
use std::ops::Range;

use half::bf16;

use super::super::super::rows::ask_for;
use super::super::factor::Side;
use super::super::source::Source;
use super::super::target::{Target, round_to_bf16};

/// Lines that are turned at once, and their depth.
const SQUARE: usize = 8;

/// Packs `lines x depth` of the right side into blocks of `width` lines, each `[depth][width]`. Values are rounded to bf16 if `rounds`.
///
/// # Safety
/// The machine has avx2 and fma.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn right(
    side: Side<'_>,
    lines: Range<usize>,
    depth: Range<usize>,
    width: usize,
    out: &mut [f32],
    rounds: bool,
    scratch: &mut Vec<f32>,
) {
    let (size, count) = (depth.len() * width, lines.len());
    let out = &mut out[..count.div_ceil(width) * size];
    if !count.is_multiple_of(width) {
        let last = out.len() - size;
        out[last..].fill(0.0);
    }
    if side.along {
        side.wide_pieces(lines.clone(), depth.clone(), scratch, |rows, values, stride| {
            for start in (0..rows.len()).step_by(SQUARE) {
                let line = rows.start - lines.start + start;
                let block = &mut out[line / width * size..][..size];
                let height = SQUARE.min(rows.len() - start);
                let to = &mut block[line % width..];
                turn(&values[start * stride..], stride, (height, depth.len()), to, width);
            }
        });
    } else {
        side.wide_pieces(depth.clone(), lines, scratch, |rows, values, stride| {
            for (row, values) in rows.zip(values.chunks(stride)) {
                let at = (row - depth.start) * width;
                for (block, values) in out.chunks_exact_mut(size).zip(values[..count].chunks(width)) {
                    copy(values, &mut block[at..at + values.len()]);
                }
            }
        });
    }
    if rounds {
        round_to_bf16(out);
    }
}

/// Copies `lines x depth` of the left side to places that begin `apart` from each other. Values are rounded to bf16 if `rounds`.
///
/// # Safety
/// The machine has avx2 and fma.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn left(
    side: Side<'_>,
    lines: Range<usize>,
    depth: Range<usize>,
    out: &mut [f32],
    apart: usize,
    rounds: bool,
    scratch: &mut Vec<f32>,
) {
    let count = depth.len();
    if !side.along {
        side.wide_pieces(depth.clone(), lines.clone(), scratch, |rows, values, stride| {
            for start in (0..rows.len()).step_by(SQUARE) {
                let to = &mut out[rows.start - depth.start + start..];
                let height = SQUARE.min(rows.len() - start);
                turn(&values[start * stride..], stride, (height, lines.len()), to, apart);
            }
        });
    } else if let Source::Bf16(values) = side.factor.source {
        let stride = side.factor.stride;
        for (line, out) in lines.clone().zip(out.chunks_mut(apart)) {
            let from = line * stride + depth.start;
            ahead(values, from + AHEAD * stride, count);
            widen(&values[from..from + count], &mut out[..count]);
        }
    } else {
        side.wide_pieces(lines.clone(), depth, scratch, |rows, values, stride| {
            let out = &mut out[(rows.start - lines.start) * apart..];
            for (line, out) in out.chunks_mut(apart).enumerate().take(rows.len()) {
                ahead(values, (line + AHEAD) * stride, count);
                copy(&values[line * stride..][..count], &mut out[..count]);
            }
        });
    }
    if rounds {
        out.chunks_mut(apart).take(lines.len()).for_each(|line| round_to_bf16(&mut line[..count]));
    }
}

/// Lines between the one that is copied and the one that is asked for: the processor sees the end of a line, but not
/// where the next one begins.
const AHEAD: usize = 3;

/// Lines between those that are turned and those that are asked for.
const SOON: usize = 16;

/// Asks for `count` values from `at` on, as far as they are there.
#[inline(always)]
fn ahead<T>(values: &[T], at: usize, count: usize) {
    ask_for(values.get(at..).unwrap_or_default(), count);
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn copy(from: &[f32], to: &mut [f32]) {
    let ((from, rest), (to, last)) = (from.as_chunks::<SQUARE>(), to.as_chunks_mut::<SQUARE>());
    // By hand: the compiler makes a call of memcpy of a plain loop, and the call takes longer than copying a block's width.
    for (to, from) in to.iter_mut().zip(from) {
        // SAFETY: eight values of each.
        unsafe { _mm256_storeu_ps(to.as_mut_ptr(), _mm256_loadu_ps(from.as_ptr())) };
    }
    for (to, from) in last.iter_mut().zip(rest) {
        *to = *from;
    }
}

#[inline]
#[target_feature(enable = "avx2,fma")]
fn widen(from: &[bf16], to: &mut [f32]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to = from.widen();
    }
}

/// Writes up to eight lines, `stride` apart, as columns of rows `width` apart.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn turn(from: &[f32], stride: usize, (height, depth): (usize, usize), to: &mut [f32], width: usize) {
    let whole = if height == SQUARE { depth / SQUARE * SQUARE } else { 0 };
    for at in (0..whole).step_by(SQUARE) {
        if at.is_multiple_of(64 / size_of::<f32>()) {
            for line in SOON..SOON + SQUARE {
                ask_for(from.get(line * stride + at..).unwrap_or_default(), 1);
            }
        }
        let mut rows = [_mm256_setzero_ps(); SQUARE];
        for (line, row) in rows.iter_mut().enumerate() {
            let values = &from[line * stride + at..][..SQUARE];
            // SAFETY: eight values.
            *row = unsafe { _mm256_loadu_ps(values.as_ptr()) };
        }
        for (deep, column) in transposed(rows).into_iter().enumerate() {
            let values = &mut to[(at + deep) * width..][..SQUARE];
            // SAFETY: room for eight values.
            unsafe { _mm256_storeu_ps(values.as_mut_ptr(), column) };
        }
    }
    for at in whole..depth {
        for line in 0..height {
            to[at * width + line] = from[line * stride + at];
        }
    }
}

/// Turns eight rows of eight values into columns.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn transposed(r: [__m256; SQUARE]) -> [__m256; SQUARE] {
    let pair = |a, b| (_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
    let ((a0, a1), (a2, a3)) = (pair(r[0], r[1]), pair(r[2], r[3]));
    let ((a4, a5), (a6, a7)) = (pair(r[4], r[5]), pair(r[6], r[7]));
    // The four values that rows 0 to 3, or 4 to 7, have at depths 0 and 4, then at 1 and 5, and so on.
    let four = |a, b| (_mm256_shuffle_ps::<0x44>(a, b), _mm256_shuffle_ps::<0xee>(a, b));
    let ((b0, b1), (b2, b3)) = (four(a0, a2), four(a1, a3));
    let ((b4, b5), (b6, b7)) = (four(a4, a6), four(a5, a7));
    let low = |a, b| _mm256_permute2f128_ps::<0x20>(a, b);
    let high = |a, b| _mm256_permute2f128_ps::<0x31>(a, b);
    [
        low(b0, b4),
        low(b1, b5),
        low(b2, b6),
        low(b3, b7),
        high(b0, b4),
        high(b1, b5),
        high(b2, b6),
        high(b3, b7),
    ]
}
