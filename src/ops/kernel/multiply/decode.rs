//! The product for a few rows, as in generating token by token: `y [m, n] = x w^T` with rows of the weight as stored. Each weight
//! is read once, where it is stored or where it is filled in, so that the memory sets the pace; sums are dot products
//! along the rows, of bf16 or, where the weight is not bf16, of f32.

use std::arch::x86_64::{
    __m512, __m512i, _MM_HINT_T0, _mm_prefetch, _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_loadu_ps,
    _mm512_loadu_si512, _mm512_maskz_loadu_epi16, _mm512_maskz_loadu_ps, _mm512_reduce_add_ps,
    _mm512_setzero_ps, _mm512_setzero_si512,
};
use std::borrow::Cow;
use std::cell::Cell;
use std::ops::Range;

use half::bf16;

use super::avx512::as_bf16;
use super::factor::{Scratch, Side, Source};
use super::out::{Crew, Out};
use super::path::Path;
use super::target::Target;

/// Columns of a task: few, so that threads end together.
const TASK: usize = 32;
/// Weight rows at once.
const LINES: usize = 4;

/// Whether the product is one of these: few rows, all lines as stored. From four rows on, tiles with a weight in bf16 as their
/// left side keep up with the memory better; to pack any other weight costs more than a few products.
pub(super) fn takes(path: Path, sides: &[(Side<'_>, Side<'_>)], m: usize) -> bool {
    let narrow = sides.iter().all(|(_, right)| right.factor.is_bf16());
    let most = match (narrow, path) {
        (true, Path::Amx) => 3,
        (true, _) => 16,
        (false, _) => 8,
    };
    m <= most && sides.iter().all(|(left, right)| left.along && right.along)
}

/// Rows of the left side in the type in which they meet the right one.
enum Rows<'a> {
    Narrow(Cow<'a, [bf16]>, usize),
    Wide(Cow<'a, [f32]>, usize),
}

impl<'a> Rows<'a> {
    fn of(left: &'a Side<'a>, right: &Side<'_>, m: usize, scratch: &mut Scratch) -> Self {
        let (depth, stride) = (left.depth(), left.factor.stride);
        match (right.factor.is_bf16(), left.factor.source) {
            (true, Source::Bf16(values)) => Self::Narrow(Cow::Borrowed(values), stride),
            (false, Source::F32(values)) => Self::Wide(Cow::Borrowed(values), stride),
            (true, _) => {
                let mut all = Vec::with_capacity(m * depth);
                left.pieces(0..m, 0..depth, scratch, |rows, values, stride| {
                    (0..rows.len()).for_each(|row| all.extend_from_slice(&values[row * stride..][..depth]));
                });
                Self::Narrow(Cow::Owned(all), depth)
            }
            (false, _) => {
                let mut all = Vec::with_capacity(m * depth);
                left.wide_pieces(0..m, 0..depth, &mut scratch.wide, |rows, values, stride| {
                    (0..rows.len()).for_each(|row| all.extend_from_slice(&values[row * stride..][..depth]));
                });
                Self::Wide(Cow::Owned(all), depth)
            }
        }
    }
}

thread_local! {
    /// Weight rows that are not in memory. Taken out while in use.
    static FILLED: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// `out [m, n] = beta out + alpha sum of left right`, for what [`takes`] accepts.
///
/// # Safety
/// The machine has avx512f, avx512bw, avx512bf16.
pub(super) unsafe fn multiply<T: Target>(
    out: &Out<'_, T>,
    sides: &[(Side<'_>, Side<'_>)],
    (m, n): (usize, usize),
    alpha: f32,
    beta: f32,
    crew: Crew,
) {
    let mut scratch = Scratch::default();
    let terms: Vec<(Rows<'_>, Side<'_>)> =
        sides.iter().map(|(left, right)| (Rows::of(left, right, m, &mut scratch), *right)).collect();
    let write = |row: usize, column: usize, sum: f32| {
        // SAFETY: each value belongs to one task, and `out` is borrowed until all have ended.
        let value = &mut unsafe { out.part(row, column..column + 1) }[0];
        let old = if beta == 0.0 { 0.0 } else { beta * value.widen() };
        *value = T::narrow(old + alpha * sum);
    };
    crew.share(n.div_ceil(TASK), |task| {
        let mut filled = FILLED.take();
        let end = n.min((task + 1) * TASK);
        for column in (task * TASK..end).step_by(LINES) {
            let columns = column..end.min(column + LINES);
            fill(&terms, columns.clone(), &mut filled);
            for row in (0..m).step_by(4) {
                // SAFETY: the caller's promise.
                unsafe {
                    match m - row {
                        1 => dots::<1>(&terms, row, columns.clone(), &filled, write),
                        2 => dots::<2>(&terms, row, columns.clone(), &filled, write),
                        3 => dots::<3>(&terms, row, columns.clone(), &filled, write),
                        _ => dots::<4>(&terms, row, columns.clone(), &filled, write),
                    }
                }
            }
        }
        FILLED.set(filled);
    });
}

/// The weight rows `columns` of all terms that fill them in, one term after the other.
fn fill(terms: &[(Rows<'_>, Side<'_>)], columns: Range<usize>, filled: &mut Vec<f32>) {
    let mut at = 0;
    for (_, right) in terms {
        if let Source::Fill(fill) = right.factor.source {
            let depth = right.depth();
            if filled.len() < at + LINES * depth {
                filled.resize(at + LINES * depth, 0.0);
            }
            for column in columns.clone() {
                fill.fill(column, 0, &mut filled[at + (column - columns.start) * depth..][..depth]);
            }
            at += LINES * depth;
        }
    }
}

/// `M` rows from `row` on by up to four columns.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn dots<const M: usize>(
    terms: &[(Rows<'_>, Side<'_>)],
    row: usize,
    columns: Range<usize>,
    filled: &[f32],
    write: impl Fn(usize, usize, f32),
) {
    let mut sums: [[__m512; LINES]; M] = [[_mm512_setzero_ps(); LINES]; M];
    let mut filled = filled;
    // Columns that are not there repeat the last one; their sums are not written.
    let line = |j: usize| (columns.start + j).min(columns.end - 1);
    for (rows, right) in terms {
        let (depth, stride) = (right.depth(), right.factor.stride);
        match (rows, right.factor.source) {
            (Rows::Narrow(x, x_stride), Source::Bf16(w)) => {
                let x: [&[bf16]; M] = std::array::from_fn(|i| &x[(row + i) * x_stride..][..depth]);
                let w: [&[bf16]; LINES] = std::array::from_fn(|j| &w[line(j) * stride..][..depth]);
                add_narrow(&mut sums, x, w, LINES * stride);
            }
            (Rows::Wide(x, x_stride), source) => {
                let x: [&[f32]; M] = std::array::from_fn(|i| &x[(row + i) * x_stride..][..depth]);
                let w: [&[f32]; LINES] = match source {
                    Source::F32(w) => std::array::from_fn(|j| &w[line(j) * stride..][..depth]),
                    _ => std::array::from_fn(|j| &filled[(line(j) - columns.start) * depth..][..depth]),
                };
                if !matches!(source, Source::F32(_)) {
                    filled = &filled[LINES * depth..];
                }
                add_wide(&mut sums, x, w);
            }
            (Rows::Narrow(..), _) => {}
        }
    }
    for (i, sums) in sums.iter().enumerate() {
        for (column, sum) in columns.clone().zip(sums) {
            write(row + i, column, _mm512_reduce_add_ps(*sum));
        }
    }
}

/// Adds products of bf16; the next rows of the weight lie `next` values behind these.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn add_narrow<const M: usize>(
    sums: &mut [[__m512; LINES]; M],
    x: [&[bf16]; M],
    w: [&[bf16]; LINES],
    next: usize,
) {
    let depth = w[0].len();
    for at in (0..depth).step_by(32) {
        let mut weights = [_mm512_setzero_si512(); LINES];
        for (vector, row) in weights.iter_mut().zip(w) {
            _mm_prefetch::<_MM_HINT_T0>(row.as_ptr().wrapping_add(next + at).cast());
            *vector = load(row, at);
        }
        for (sums, row) in sums.iter_mut().zip(x) {
            let x = load(row, at);
            for (sum, w) in sums.iter_mut().zip(weights) {
                *sum = _mm512_dpbf16_ps(*sum, as_bf16(x), as_bf16(w));
            }
        }
    }
}

/// Adds products of f32.
#[inline]
#[target_feature(enable = "avx512f")]
fn add_wide<const M: usize>(sums: &mut [[__m512; LINES]; M], x: [&[f32]; M], w: [&[f32]; LINES]) {
    let depth = w[0].len();
    for at in (0..depth).step_by(16) {
        let mut weights = [_mm512_setzero_ps(); LINES];
        for (vector, row) in weights.iter_mut().zip(w) {
            *vector = load_wide(row, at);
        }
        for (sums, row) in sums.iter_mut().zip(x) {
            let x = load_wide(row, at);
            for (sum, w) in sums.iter_mut().zip(weights) {
                *sum = _mm512_fmadd_ps(x, w, *sum);
            }
        }
    }
}

/// 32 values of a row from `at` on, or what is left, with zeros behind it.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn load(row: &[bf16], at: usize) -> __m512i {
    let rest = &row[at..];
    // SAFETY: values that the mask leaves out are not touched.
    unsafe {
        if rest.len() >= 32 {
            _mm512_loadu_si512(rest.as_ptr().cast())
        } else {
            _mm512_maskz_loadu_epi16((1 << rest.len()) - 1, rest.as_ptr().cast())
        }
    }
}

/// 16 values of a row from `at` on, or what is left, with zeros behind it.
#[inline]
#[target_feature(enable = "avx512f")]
fn load_wide(row: &[f32], at: usize) -> __m512 {
    let rest = &row[at..];
    // SAFETY: values that the mask leaves out are not touched.
    unsafe {
        if rest.len() >= 16 {
            _mm512_loadu_ps(rest.as_ptr())
        } else {
            _mm512_maskz_loadu_ps((1 << rest.len()) - 1, rest.as_ptr())
        }
    }
}
