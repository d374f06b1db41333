//! The product anywhere: both sides widened to f32, piece by piece, and multiplied by the `gemm` crate.

use std::cell::Cell;
use std::ops::Range;

use super::factor::{Scratch, Side};
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

/// `out [m, n] = beta out + alpha sum of left right`.
pub(super) fn multiply<T: Target>(
    out: &Out<'_, T>,
    terms: &[(Side<'_>, Side<'_>)],
    (m, n): (usize, usize),
    alpha: f32,
    beta: f32,
    crew: Crew,
) {
    let stripes = n.div_ceil(COLUMNS);
    // At least two tasks for each thread where the result is narrow; the right side is widened in each.
    let parts = (2 * crew.size()).div_ceil(stripes);
    let height = m.div_ceil(parts).max(ROWS).next_multiple_of(32);
    crew.share(stripes * m.div_ceil(height), |task| {
        let (column, row) = (task % stripes * COLUMNS, task / stripes * height);
        let (rows, columns) = (row..m.min(row + height), column..n.min(column + COLUMNS));
        let mut workspace = WORKSPACE.take();
        sum(terms, rows.clone(), columns.clone(), &mut workspace);
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
fn sum(terms: &[(Side<'_>, Side<'_>)], rows: Range<usize>, columns: Range<usize>, workspace: &mut Workspace) {
    let Workspace { left, right, sums, scratch } = workspace;
    let n = columns.len();
    sums.clear();
    sums.resize(rows.len() * n, 0.0);
    for (left_side, right_side) in terms {
        let depth = left_side.depth();
        for start in (0..depth).step_by(DEPTH) {
            let part = start..depth.min(start + DEPTH);
            widen(*right_side, columns.clone(), part.clone(), right, scratch);
            for (row, sums) in rows.clone().step_by(ROWS).zip(sums.chunks_mut(ROWS * n)) {
                let lines = row..rows.end.min(row + ROWS);
                widen(*left_side, lines.clone(), part.clone(), left, scratch);
                let (m, k) = (lines.len(), part.len());
                let (left_line, left_deep) = strides(*left_side, m, k);
                let (right_line, right_deep) = strides(*right_side, n, k);
                assert!(sums.len() == m * n && left.len() == m * k && right.len() == n * k);
                // SAFETY: all three matrices fill their slices, whose lengths have just been checked, and `sums` is
                // borrowed mutably.
                unsafe {
                    gemm::gemm(
                        m,
                        n,
                        k,
                        sums.as_mut_ptr(),
                        1,
                        n as isize,
                        true,
                        left.as_ptr(),
                        left_deep,
                        left_line,
                        right.as_ptr(),
                        right_line,
                        right_deep,
                        1.0,
                        1.0,
                        false,
                        false,
                        false,
                        gemm::Parallelism::None,
                    );
                }
            }
        }
    }
}

/// Distances of neighbouring lines and of neighbours in depth in what [`widen`] writes.
fn strides(side: Side<'_>, lines: usize, depth: usize) -> (isize, isize) {
    if side.along { (depth as isize, 1) } else { (1, lines as isize) }
}

/// `lines x depth` in f32, laid out as stored, without gaps.
fn widen(
    side: Side<'_>,
    lines: Range<usize>,
    depth: Range<usize>,
    out: &mut Vec<f32>,
    scratch: &mut Scratch,
) {
    let (rows, columns) = if side.along { (lines, depth) } else { (depth, lines) };
    let width = columns.len();
    out.clear();
    side.pieces(rows, columns, scratch, |rows, values, stride| {
        for row in 0..rows.len() {
            out.extend(values[row * stride..][..width].iter().map(|value| value.widen()));
        }
    });
}
