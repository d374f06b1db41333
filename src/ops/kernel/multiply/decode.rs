//! The product for a few rows, as in generating token by token: `y [m, n] = x w^T` with rows of both in place. Each weight is
//! read once, where it is stored, so that the memory sets the pace; sums are dot products along the rows.

use std::arch::x86_64::{
    __m512, __m512i, _MM_HINT_T0, _mm_prefetch, _mm512_dpbf16_ps, _mm512_loadu_si512,
    _mm512_maskz_loadu_epi16, _mm512_reduce_add_ps, _mm512_setzero_ps,
};
use std::ops::Range;

use half::bf16;

use super::avx512::as_bf16;
use super::factor::Side;
use super::out::{Crew, Out};
use super::path::Path;
use super::target::Target;

/// Columns of a task.
const TASK: usize = 64;
/// Weight rows at once.
const LINES: usize = 4;

/// Whether the product is one of these: few rows, all sides in place. From four rows on,
/// tiles with the weight as their left side keep up with the memory better.
pub(super) fn takes(path: Path, sides: &[(Side<'_>, Side<'_>)], m: usize) -> bool {
    let most = if path == Path::Amx { 3 } else { 16 };
    m <= most && sides.iter().all(|(left, right)| left.in_place().is_some() && right.in_place().is_some())
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
    let write = |row: usize, column: usize, sum: f32| {
        // SAFETY: each value belongs to one task, and `out` is borrowed until all have ended.
        let value = &mut unsafe { out.part(row, column..column + 1) }[0];
        let old = if beta == 0.0 { 0.0 } else { beta * value.widen() };
        *value = T::narrow(old + alpha * sum);
    };
    crew.share(n.div_ceil(TASK), |task| {
        let end = n.min((task + 1) * TASK);
        for column in (task * TASK..end).step_by(LINES) {
            let columns = column..end.min(column + LINES);
            for row in (0..m).step_by(4) {
                // SAFETY: the caller's promise.
                unsafe {
                    match m - row {
                        1 => dots::<1>(sides, row, columns.clone(), write),
                        2 => dots::<2>(sides, row, columns.clone(), write),
                        3 => dots::<3>(sides, row, columns.clone(), write),
                        _ => dots::<4>(sides, row, columns.clone(), write),
                    }
                }
            }
        }
    });
}

/// `M` rows from `row` on by up to four columns.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn dots<const M: usize>(
    sides: &[(Side<'_>, Side<'_>)],
    row: usize,
    columns: Range<usize>,
    write: impl Fn(usize, usize, f32),
) {
    let mut sums: [[__m512; LINES]; M] = [[_mm512_setzero_ps(); LINES]; M];
    for (left, right) in sides {
        let (Some(x), Some(w)) = (left.in_place(), right.in_place()) else { continue };
        let depth = left.depth();
        let x: [&[bf16]; M] = std::array::from_fn(|i| &x[(row + i) * left.factor.stride..][..depth]);
        // Columns that are not there repeat the last one; their sums are not written.
        let w: [&[bf16]; LINES] = std::array::from_fn(|j| {
            let column = (columns.start + j).min(columns.end - 1);
            &w[column * right.factor.stride..][..depth]
        });
        let whole = depth / 32 * 32;
        let next = LINES * right.factor.stride;
        for at in (0..whole).step_by(32) {
            for row in w {
                _mm_prefetch::<_MM_HINT_T0>(row.as_ptr().wrapping_add(next + at).cast());
            }
            add(&mut sums, x.map(|row| load(row, at)), w.map(|row| load(row, at)));
        }
        if whole < depth {
            add(&mut sums, x.map(|row| load_end(row, whole)), w.map(|row| load_end(row, whole)));
        }
    }
    for (i, sums) in sums.iter().enumerate() {
        for (column, sum) in columns.clone().zip(sums) {
            write(row + i, column, _mm512_reduce_add_ps(*sum));
        }
    }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn add<const M: usize>(sums: &mut [[__m512; LINES]; M], x: [__m512i; M], w: [__m512i; LINES]) {
    for (sums, x) in sums.iter_mut().zip(x) {
        for (sum, w) in sums.iter_mut().zip(w) {
            *sum = _mm512_dpbf16_ps(*sum, as_bf16(x), as_bf16(w));
        }
    }
}

/// 32 values of a row from `at` on.
#[inline]
#[target_feature(enable = "avx512f")]
fn load(row: &[bf16], at: usize) -> __m512i {
    debug_assert!(at + 32 <= row.len());
    // SAFETY: the callers stay below the whole vectors of the row.
    unsafe { _mm512_loadu_si512(row.as_ptr().add(at).cast()) }
}

/// What is left of a row from `at` on, less than 32 values, zeros behind it.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn load_end(row: &[bf16], at: usize) -> __m512i {
    let rest = &row[at..];
    assert!(rest.len() < 32);
    // SAFETY: values that the mask leaves out are not touched.
    unsafe { _mm512_maskz_loadu_epi16((1 << rest.len()) - 1, rest.as_ptr().cast()) }
}
