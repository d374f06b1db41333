//! The product for a few rows, as in generating token by token: `y [m, n] = x w^T` with rows of the weight as stored. Each weight
//! is read once, where it is stored or where it is filled in, so that the memory sets the pace; sums are dot products
//! along the rows.

mod narrow;
mod wide;

use std::borrow::Cow;
use std::cell::Cell;
use std::ops::Range;

use half::bf16;

use super::factor::{Scratch, Side};
use super::out::{Crew, Out};
use super::path::Path;
use super::source::Source;
use super::target::{Target, round_to_bf16};

pub(super) use narrow::Narrow;
pub(super) use wide::Wide;

/// Columns of a task: few, so that threads end together.
const TASK: usize = 32;
/// Weight rows at once.
const LINES: usize = 4;

/// Whether the product is one of these: few rows, all lines as stored.
pub(super) fn takes(path: Path, sides: &[(Side<'_>, Side<'_>)], m: usize) -> bool {
    let narrow = sides.iter().all(|(_, right)| right.factor.is_bf16());
    m <= most_rows(path, narrow) && sides.iter().all(|(left, right)| left.along && right.along)
}

/// The most rows that are a few, with weights all in bf16 where `narrow`. From four rows on, tiles with a weight in bf16 as their
/// left side keep up with the memory better; to pack any other weight costs more than a few products.
pub(super) fn most_rows(path: Path, narrow: bool) -> usize {
    match (narrow, path) {
        (_, Path::Portable) => 0,
        (true, Path::Amx) => 3,
        (true, Path::Avx512Bf16) => 16,
        _ => 8,
    }
}

/// Instructions that sum a few rows by a few columns.
pub(super) trait Dots {
    /// Whether left rows are wanted in bf16 where they meet a weight in bf16.
    const NARROW: bool;

    /// Sums of `M` rows from `row` on by up to four columns; columns that are not there repeat the last one.
    ///
    /// # Safety
    /// The machine has the instructions.
    unsafe fn dots<const M: usize>(
        terms: &[(Rows<'_>, Side<'_>)],
        row: usize,
        columns: &Range<usize>,
        filled: &[f32],
    ) -> [[f32; LINES]; M];
}

/// Rows of the left side in the type in which they meet the right one, and the distance of two.
pub(super) enum Rows<'a> {
    Narrow(Cow<'a, [bf16]>, usize),
    Wide(Cow<'a, [f32]>, usize),
}

impl<'a> Rows<'a> {
    /// Of the first `m` rows of `left`, rounded to bf16 where `rounds` says so.
    fn of(left: &'a Side<'a>, m: usize, narrow: bool, rounds: bool, scratch: &mut Scratch) -> Self {
        let (depth, stride) = (left.depth(), left.factor.stride);
        match left.factor.source {
            Source::Bf16(values) if narrow => return Self::Narrow(Cow::Borrowed(values), stride),
            Source::F32(values) if !narrow && !rounds => return Self::Wide(Cow::Borrowed(values), stride),
            _ => {}
        }
        if narrow {
            let mut all = Vec::with_capacity(m * depth);
            left.pieces(0..m, 0..depth, scratch, |rows, values, stride| {
                (0..rows.len()).for_each(|row| all.extend_from_slice(&values[row * stride..][..depth]));
            });
            return Self::Narrow(Cow::Owned(all), depth);
        }
        let mut all = Vec::with_capacity(m * depth);
        left.wide_pieces(0..m, 0..depth, &mut scratch.wide, |rows, values, stride| {
            (0..rows.len()).for_each(|row| all.extend_from_slice(&values[row * stride..][..depth]));
        });
        if rounds {
            round_to_bf16(&mut all);
        }
        Self::Wide(Cow::Owned(all), depth)
    }
}

thread_local! {
    /// Weight rows that are not in memory. Taken out while in use.
    static FILLED: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// `out [m, n] = beta out + alpha sum of left right`, for what [`takes`] accepts.
///
/// # Safety
/// The machine has the instructions of `D`.
pub(super) unsafe fn multiply<D: Dots, T: Target>(
    out: &Out<'_, T>,
    sides: &[(Side<'_>, Side<'_>)],
    (m, n): (usize, usize),
    (alpha, beta): (f32, f32),
    crew: Crew,
) {
    let mut scratch = Scratch::default();
    let terms: Vec<(Rows<'_>, Side<'_>)> = sides
        .iter()
        .map(|(left, right)| {
            let beside_bf16 = right.factor.is_bf16();
            let narrow = D::NARROW && beside_bf16;
            (Rows::of(left, m, narrow, beside_bf16 && !left.factor.is_bf16(), &mut scratch), *right)
        })
        .collect();
    crew.share(n.div_ceil(TASK), |task| {
        let mut filled = FILLED.take();
        let end = n.min((task + 1) * TASK);
        for column in (task * TASK..end).step_by(LINES) {
            let columns = column..end.min(column + LINES);
            fill(&terms, columns.clone(), &mut filled);
            let write = |row: usize, sums: &[[f32; LINES]]| {
                for (row, sums) in (row..).zip(sums) {
                    // SAFETY: each value belongs to one task, and `out` is borrowed until all have ended.
                    let values = unsafe { out.part(row, columns.clone()) };
                    for (value, sum) in values.iter_mut().zip(sums) {
                        let old = if beta == 0.0 { 0.0 } else { beta * value.widen() };
                        *value = T::narrow(old + alpha * sum);
                    }
                }
            };
            for row in (0..m).step_by(4) {
                // SAFETY: the caller's promise.
                unsafe {
                    match m - row {
                        1 => write(row, &D::dots::<1>(&terms, row, &columns, &filled)),
                        2 => write(row, &D::dots::<2>(&terms, row, &columns, &filled)),
                        3 => write(row, &D::dots::<3>(&terms, row, &columns, &filled)),
                        _ => write(row, &D::dots::<4>(&terms, row, &columns, &filled)),
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

/// The weight rows of a term.
enum Weights<'a> {
    Narrow([&'a [bf16]; LINES]),
    Wide([&'a [f32]; LINES]),
}

/// Finds the weight rows `columns` of a term, and takes those that have been filled in from `filled`.
fn weights<'a>(right: &'a Side<'_>, columns: &Range<usize>, filled: &mut &'a [f32]) -> Weights<'a> {
    let (depth, stride) = (right.depth(), right.factor.stride);
    let line = |j: usize| (columns.start + j).min(columns.end - 1);
    match right.factor.source {
        Source::Bf16(w) => Weights::Narrow(std::array::from_fn(|j| &w[line(j) * stride..][..depth])),
        Source::F32(w) => Weights::Wide(std::array::from_fn(|j| &w[line(j) * stride..][..depth])),
        Source::Fill(_) => {
            let (here, rest) = filled.split_at(LINES * depth);
            *filled = rest;
            Weights::Wide(std::array::from_fn(|j| &here[(line(j) - columns.start) * depth..][..depth]))
        }
    }
}
