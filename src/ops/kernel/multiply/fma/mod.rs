//! The product in f32 by fused multiply-adds of AVX2 or AVX-512; bf16 is widened on the way.
//!
//! - A *task* is a stripe of result columns by a range of result rows.
//! - A *part* is a piece of the depth of one term. The right side of a stripe is packed part by part; it stays in the L2 cache
//!   while left lines go by, and a block of it in the L1 cache.
//! - A *group* is as many left lines as stay in the L2 cache beside it.
//!
//! Sums of a part begin at zero and are added to those of the parts before it. Parts depend on the depth of the terms alone, so
//! results depend neither on the number of threads nor on the width of vectors.

mod pack;
mod tile;

use std::cell::Cell;
use std::ops::Range;

use super::aligned::Aligned;
use super::factor::{Side, Source};
use super::out::{Crew, Out};
use super::target::Target;
pub(super) use tile::{Avx2, Avx512, Tile};

use tile::{Call, Lie};

/// Greatest depth of a part: 16 KiB for a block of AVX2, 48 KiB for one of AVX-512.
const DEPTH: usize = 256;
/// Greatest width of a stripe, a multiple of all tiles' widths.
const STRIPE: usize = 192;
/// Left lines of a group, a multiple of all tiles' heights.
const GROUP: usize = 96;
/// Stored columns are read from multiples of this on, as [`Fill`](super::factor::Fill) asks.
const UNIT: usize = 32;
/// Between copied left lines, so that they do not all begin in the same set of a cache.
const SKEW: usize = 16;

/// A piece of the depth of a term.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Part {
    term: usize,
    depth: Range<usize>,
}

/// What is multiplied: `out = beta out + alpha sum of left right`.
struct Work<'a> {
    terms: &'a [(Side<'a>, Side<'a>)],
    parts: Vec<Part>,
    alpha: f32,
    beta: f32,
    /// Whether values in f32 are rounded to bf16 first.
    rounds: bool,
}

/// Buffers of a thread: they grow to what its largest task needs and stay.
#[derive(Default)]
struct Workspace {
    right: Aligned<f32>,
    left: Aligned<f32>,
    sums: Aligned<f32>,
    scratch: Vec<f32>,
}

thread_local! {
    /// Taken out while in use.
    static WORKSPACE: Cell<Workspace> = Cell::default();
}

/// `out [m, n] = beta out + alpha sum of left right`, with f32 rounded to bf16 first unless `wide`.
///
/// # Safety
/// The machine has the instructions of `I`, and avx2 and fma.
pub(super) unsafe fn multiply<I: Tile, T: Target>(
    out: &Out<'_, T>,
    terms: &[(Side<'_>, Side<'_>)],
    (m, n): (usize, usize),
    (alpha, beta): (f32, f32),
    crew: Crew,
    wide: bool,
) {
    let work = Work { terms, parts: parts(terms), alpha, beta, rounds: !wide };
    let tasks = tasks::<I>(terms, (m, n), crew.size());
    crew.share(tasks.len(), |index| {
        let (rows, columns) = tasks[index].clone();
        let mut workspace = WORKSPACE.take();
        // SAFETY: the caller's promise; tasks do not overlap.
        unsafe { task::<I, T>(out, &work, rows, columns, &mut workspace) };
        WORKSPACE.set(workspace);
    });
}

/// The depth of each term, cut evenly.
fn parts(terms: &[(Side<'_>, Side<'_>)]) -> Vec<Part> {
    let mut parts = Vec::new();
    for (term, (left, _)) in terms.iter().enumerate() {
        let all = left.depth();
        let step = all.div_ceil(all.div_ceil(DEPTH)).next_multiple_of(UNIT);
        parts.extend((0..all).step_by(step).map(|at| Part { term, depth: at..all.min(at + step) }));
    }
    parts
}

/// Rows and columns of each task: of the cuts that give all threads something to do, the one whose longest thread has least.
fn tasks<I: Tile>(
    terms: &[(Side<'_>, Side<'_>)],
    (m, n): (usize, usize),
    threads: usize,
) -> Vec<(Range<usize>, Range<usize>)> {
    /// What packing a value costs in products of a lane: read in place, along its line, across.
    const LEFT: [f32; 3] = [0.2, 1.0, 2.0];
    const RIGHT: [f32; 2] = [2.0, 1.0];

    let (left_side, right) = terms[0];
    let left = match (left_side.stored_f32().is_some() && left_side.along, left_side.along) {
        (true, _) => LEFT[0],
        (false, true) => LEFT[1],
        (false, false) => LEFT[2],
    };
    let right = RIGHT[usize::from(!right.along)];
    let width = if I::WIDTH.is_multiple_of(UNIT) { I::WIDTH } else { UNIT.max(2 * I::WIDTH) };
    let strip = if left_side.along { I::LINES } else { GROUP };
    let (units, strips) = (n.div_ceil(width), m.div_ceil(strip));
    let mut best = (f32::INFINITY, 1, 1);
    for stripe in 1..=units.min(STRIPE / width) {
        let stripes = units.div_ceil(stripe);
        for ranges in 1..=strips.min(4 * threads) {
            let height = strips.div_ceil(ranges);
            let rounds = (stripes * strips.div_ceil(height)).div_ceil(threads);
            let (rows, columns) = ((height * strip) as f32, (stripe * width) as f32);
            let cost = rounds as f32 * (rows * left + columns * right + rows * columns / I::LANES as f32);
            if cost < best.0 {
                best = (cost, stripe * width, height * strip);
            }
        }
    }
    let (_, stripe, height) = best;
    let mut tasks = Vec::with_capacity(n.div_ceil(stripe) * m.div_ceil(height));
    for column in (0..n).step_by(stripe) {
        for row in (0..m).step_by(height) {
            tasks.push((row..m.min(row + height), column..n.min(column + stripe)));
        }
    }
    tasks
}

/// # Safety
/// As [`multiply`]; nobody else uses this part of `out`.
unsafe fn task<I: Tile, T: Target>(
    out: &Out<'_, T>,
    work: &Work<'_>,
    rows: Range<usize>,
    columns: Range<usize>,
    workspace: &mut Workspace,
) {
    let Workspace { right, left, sums, scratch } = workspace;
    let blocks = columns.len().div_ceil(I::WIDTH);
    let width = blocks * I::WIDTH;
    // Sums of whole tiles lie in the result itself where it is in f32 and not scaled.
    let plain = work.alpha == 1.0 && (work.beta == 0.0 || work.beta == 1.0);
    let direct = T::as_f32(out.address(rows.start, columns.start)).filter(|_| plain);
    let waiting = match (direct, work.parts.len()) {
        (Some(_), _) => 0,
        (None, 1) => rows.len().min(GROUP).next_multiple_of(I::LINES) * width,
        (None, _) => rows.len().next_multiple_of(I::LINES) * width,
    };
    // One more tile, for those that are not whole in the result.
    let (sums, spare) = sums.at_least(waiting + I::LINES * I::WIDTH).split_at_mut(waiting);
    for (number, part) in work.parts.iter().enumerate() {
        let (left_side, right_side) = work.terms[part.term];
        let depth = part.depth.len();
        let right = right.at_least(blocks * depth * I::WIDTH);
        let rounds = |side: &Side<'_>| work.rounds && !side.factor.is_bf16();
        // SAFETY: the caller's promise.
        unsafe {
            let (lines, depth) = (columns.clone(), part.depth.clone());
            pack::blocks(right_side, lines, depth, I::WIDTH, right, rounds(&right_side), scratch);
        }
        for group in rows.clone().step_by(GROUP) {
            let group = group..rows.end.min(group + GROUP);
            let (lines, deep) = (group.clone(), part.depth.clone());
            // SAFETY: as above.
            let lines = unsafe { Lines::of::<I>(left_side, lines, deep, left, rounds(&left_side), scratch) };
            let first = if work.parts.len() > 1 { group.start - rows.start } else { 0 };
            for (block, right) in right.chunks_exact(depth * I::WIDTH).enumerate() {
                let within = block * I::WIDTH..columns.len().min((block + 1) * I::WIDTH);
                let vectors = within.len().div_ceil(I::LANES);
                for line in (0..group.len()).step_by(I::LINES) {
                    let height = I::LINES.min(group.len() - line);
                    let (left, apart) = lines.strip::<I>(line, height);
                    let mut call = Call {
                        left,
                        line: apart,
                        right: right.as_ptr(),
                        depth,
                        sums: spare.as_mut_ptr(),
                        apart: I::WIDTH,
                        adds: number > 0,
                    };
                    let Some(to) = direct else {
                        let at = (first + line) * width + within.start;
                        let room = &mut sums[at..][..(I::LINES - 1) * width + vectors * I::LANES];
                        (call.sums, call.apart) = (room.as_mut_ptr(), width);
                        // SAFETY: instructions by the caller's promise; lines, block and sums are there for a whole tile.
                        unsafe { I::tile(&call, lines.lie, vectors) };
                        continue;
                    };
                    let adds = number > 0 || work.beta == 1.0;
                    if height == I::LINES && within.len() == vectors * I::LANES {
                        let place = (group.start + line - rows.start) * out.stride() + within.start;
                        (call.sums, call.apart, call.adds) = (to.wrapping_add(place), out.stride(), adds);
                        // SAFETY: as above; the whole tile lies in this task's part of the result.
                        unsafe { I::tile(&call, lines.lie, vectors) };
                        continue;
                    }
                    call.adds = false;
                    // SAFETY: as above; `spare` is one tile.
                    unsafe { I::tile(&call, lines.lie, vectors) };
                    let across = columns.start + within.start..columns.start + within.end;
                    for (row, sums) in (group.start + line..).zip(spare.chunks_exact(I::WIDTH)).take(height) {
                        // SAFETY: as above.
                        unsafe { finish(out.part(row, across.clone()), sums, 1.0, f32::from(adds)) };
                    }
                }
            }
            if direct.is_none() && number + 1 == work.parts.len() {
                for (row, sums) in group.zip(sums[first * width..].chunks_exact(width)) {
                    // SAFETY: as above.
                    unsafe { finish(out.part(row, columns.clone()), sums, work.alpha, work.beta) };
                }
            }
        }
    }
}

/// Left lines of a group, as far as a part of the depth reaches.
struct Lines<'a> {
    lie: Lie,
    values: &'a [f32],
    /// Distance of two lines, or of two strips where lines lie across.
    apart: usize,
    /// The last lines, where they fill no whole strip and the others are read where they are stored.
    last: &'a [f32],
}

impl<'a> Lines<'a> {
    /// # Safety
    /// The machine has avx2 and fma.
    unsafe fn of<I: Tile>(
        side: Side<'a>,
        lines: Range<usize>,
        depth: Range<usize>,
        packed: &'a mut Aligned<f32>,
        rounds: bool,
        scratch: &mut Vec<f32>,
    ) -> Self {
        let (count, deep) = (lines.len().next_multiple_of(I::LINES), depth.len());
        if !side.along {
            let packed = packed.at_least(count * deep);
            // SAFETY: the caller's promise.
            unsafe { pack::blocks(side, lines, depth, I::LINES, packed, rounds, scratch) };
            return Self { lie: Lie::Across, values: packed, apart: deep * I::LINES, last: &[] };
        }
        let in_place = match side.factor.source {
            Source::F32(values) if !rounds => Some(values),
            _ => None,
        };
        let copied =
            if in_place.is_some() { lines.end - lines.len() % I::LINES..lines.end } else { lines.clone() };
        let apart = deep + SKEW;
        let packed = packed.at_least(copied.len().next_multiple_of(I::LINES) * apart);
        // SAFETY: the caller's promise.
        unsafe { pack::left_along(side, copied, depth.clone(), packed, apart, rounds, scratch) };
        match in_place {
            Some(values) => {
                let stride = side.factor.stride;
                let end = (lines.end - 1) * stride + depth.end;
                let values = &values[lines.start * stride + depth.start..end];
                Self { lie: Lie::Along, values, apart: stride, last: packed }
            }
            None => Self { lie: Lie::Along, values: packed, apart, last: &[] },
        }
    }

    /// Where a strip of `height` lines begins, and the distance of its lines.
    fn strip<I: Tile>(&self, line: usize, height: usize) -> (*const f32, usize) {
        if self.lie == Lie::Across {
            return (self.values[line / I::LINES * self.apart..].as_ptr(), 0);
        }
        if height < I::LINES && !self.last.is_empty() {
            return (self.last.as_ptr(), self.last.len() / I::LINES);
        }
        (self.values[line * self.apart..].as_ptr(), self.apart)
    }
}

/// `row = beta row + alpha sums`, for as many sums as the row has values; `beta` 0 does not read the row.
///
/// # Safety
/// The machine has avx2 and fma.
#[target_feature(enable = "avx2,fma")]
unsafe fn finish<T: Target>(row: &mut [T], sums: &[f32], alpha: f32, beta: f32) {
    let sums = &sums[..row.len()];
    if beta == 0.0 {
        for (value, sum) in row.iter_mut().zip(sums) {
            *value = T::narrow(alpha * sum);
        }
    } else {
        for (value, sum) in row.iter_mut().zip(sums) {
            *value = T::narrow(beta * value.widen() + alpha * sum);
        }
    }
}
