//! The product anywhere, by the `gemm` crate: of f32 where it is stored, of other values piece by piece, widened to f32.

use std::cell::Cell;
use std::ops::Range;

use super::factor::{Scratch, Side, Stored};
use super::out::{Crew, Out};
use super::target::Target;

/// Right lines of a task, left lines of a piece, depth of a piece: 512 KiB and 256 KiB of f32.
const COLUMNS: usize = 256;
const ROWS: usize = 128;
const DEPTH: usize = 512;

#[derive(Default)]
struct Workspace {
    left: Vec<f32>,
    right: Vec<f32>,
    sums: Vec<f32>,
    scratch: Scratch,
}

thread_local! {
    /// Taken out while in use.
    static WORKSPACE: Cell<Workspace> = Cell::default();
}

/// `out [m, n] = beta out + alpha sum of left right`, with f32 rounded to bf16 first unless `wide`.
pub(super) fn multiply<T: Target>(
    out: &Out<'_, T>,
    terms: &[(Side<'_>, Side<'_>)],
    (m, n): (usize, usize),
    (alpha, beta): (f32, f32),
    crew: Crew,
    wide: bool,
) {
    let stored: Option<Vec<_>> =
        terms.iter().map(|(left, right)| Some((left.stored_f32()?, right.stored_f32()?))).collect();
    if let (Some(terms), Some(to)) = (stored, T::as_f32(out.address(0, 0))) {
        let threads = match crew.size() {
            1 => gemm::Parallelism::None,
            _ => gemm::Parallelism::Rayon(0),
        };
        for (term, (left, right)) in terms.into_iter().enumerate() {
            let beta = if term == 0 { beta } else { 1.0 };
            let shape = (m, n, left.depth);
            // SAFETY: the result has room for `m` by `n` values, which are this call's, and the sides are what they say.
            unsafe { gemm_f32(to, out.stride(), shape, left, right, (alpha, beta), threads) };
        }
        return;
    }
    let stripes = n.div_ceil(COLUMNS);
    // At least two tasks for each thread where the result is narrow; the right side is widened in each.
    let parts = (2 * crew.size()).div_ceil(stripes);
    let height = m.div_ceil(parts).max(ROWS).next_multiple_of(32);
    crew.share(stripes * m.div_ceil(height), |task| {
        let (column, row) = (task % stripes * COLUMNS, task / stripes * height);
        let (rows, columns) = (row..m.min(row + height), column..n.min(column + COLUMNS));
        let mut workspace = WORKSPACE.take();
        sum(terms, rows.clone(), columns.clone(), &mut workspace, wide);
        for (row, sums) in rows.zip(workspace.sums.chunks_exact(columns.len())) {
            // SAFETY: tasks do not overlap, and `out` is borrowed until all have ended.
            let values = unsafe { out.part(row, columns.clone()) };
            for (value, sum) in values.iter_mut().zip(sums) {
                let old = if beta == 0.0 { 0.0 } else { beta * value.widen() };
                *value = T::narrow(old + alpha * sum);
            }
        }
        WORKSPACE.set(workspace);
    });
}

/// The sums of one task into `workspace.sums`.
fn sum(
    terms: &[(Side<'_>, Side<'_>)],
    rows: Range<usize>,
    columns: Range<usize>,
    workspace: &mut Workspace,
    wide: bool,
) {
    let Workspace { left, right, sums, scratch } = workspace;
    let n = columns.len();
    sums.clear();
    sums.resize(rows.len() * n, 0.0);
    for (left_side, right_side) in terms {
        let depth = left_side.depth();
        for start in (0..depth).step_by(DEPTH) {
            let part = start..depth.min(start + DEPTH);
            widen(*right_side, columns.clone(), part.clone(), right, scratch, wide);
            for (row, sums) in rows.clone().step_by(ROWS).zip(sums.chunks_mut(ROWS * n)) {
                let lines = row..rows.end.min(row + ROWS);
                widen(*left_side, lines.clone(), part.clone(), left, scratch, wide);
                let (m, k) = (lines.len(), part.len());
                let left = packed(left, *left_side, m, k);
                let right = packed(right, *right_side, n, k);
                assert_eq!(sums.len(), m * n);
                // SAFETY: all three matrices fill their slices, whose lengths are checked, and `sums` is borrowed
                // mutably.
                unsafe {
                    let threads = gemm::Parallelism::None;
                    gemm_f32(sums.as_mut_ptr(), n, (m, n, k), left, right, (1.0, 1.0), threads);
                }
            }
        }
    }
}

/// What [`widen`] writes, seen as a side.
fn packed(values: &[f32], side: Side<'_>, lines: usize, depth: usize) -> Stored {
    assert_eq!(values.len(), lines * depth);
    let (line, deep) = if side.along { (depth, 1) } else { (1, lines) };
    Stored { values: values.as_ptr(), line, deep, depth }
}

/// `to = beta to + alpha left right`, with rows of `to` `stride` apart.
///
/// # Safety
/// `to` can be written for `m` by `n` values, the sides read for `m` and `n` lines.
unsafe fn gemm_f32(
    to: *mut f32,
    stride: usize,
    (m, n, k): (usize, usize, usize),
    left: Stored,
    right: Stored,
    (alpha, beta): (f32, f32),
    threads: gemm::Parallelism,
) {
    // SAFETY: the caller's promise. Distances fit into isize because slices do.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            to,
            1,
            stride as isize,
            beta != 0.0,
            left.values,
            left.deep as isize,
            left.line as isize,
            right.values,
            right.line as isize,
            right.deep as isize,
            beta,
            alpha,
            false,
            false,
            false,
            threads,
        );
    }
}

/// `lines x depth` in f32, laid out as stored, without gaps.
fn widen(
    side: Side<'_>,
    lines: Range<usize>,
    depth: Range<usize>,
    out: &mut Vec<f32>,
    scratch: &mut Scratch,
    wide: bool,
) {
    let (rows, columns) = if side.along { (lines, depth) } else { (depth, lines) };
    let width = columns.len();
    out.clear();
    if wide {
        side.wide_pieces(rows, columns, &mut scratch.wide, |rows, values, stride| {
            for row in 0..rows.len() {
                out.extend_from_slice(&values[row * stride..][..width]);
            }
        });
        return;
    }
    side.pieces(rows, columns, scratch, |rows, values, stride| {
        for row in 0..rows.len() {
            out.extend(values[row * stride..][..width].iter().map(|value| value.widen()));
        }
    });
}
