//! The product in f32 by fused multiply-adds of AVX2 or AVX-512; bf16 is widened on the way.
//!
//! - A *task* is a stripe of result columns by a range of result rows.
//! - A *part* is a piece of the depth of one term; a *span* is some parts, whose right side is packed at once.
//! - A *group* is as many left lines as stay in the L2 cache, part by part, beside their sums.
//!
//! Sums of a part begin at zero and are added to those of the parts before it. Parts depend on the depth of the terms alone, so
//! results depend neither on the number of threads nor on the width of vectors.

mod pack;
mod tile;

use std::cell::Cell;
use std::ops::Range;

use super::aligned::Aligned;
use super::factor::Side;
use super::out::{Crew, Out};
use super::source::Source;
use super::target::Target;
pub(super) use tile::{Avx2, Avx512, Tile};

use tile::Call;

/// Greatest depth of a part: 36 KiB for a block of AVX2, 108 KiB for one of AVX-512.
const DEPTH: usize = 576;
/// Greatest width of a stripe, a multiple of all tiles' widths.
const STRIPE: usize = 384;
/// Left lines of a group, a multiple of all tiles' heights.
const GROUP: usize = 96;
/// Most parts of a span: 5 MiB for the widest stripe, which lie in the L3 cache and are read once for each group.
const SPAN: usize = 6;
/// Columns up to which left lines are always read where they are stored: copying does not pay for so few.
const FEW: usize = 64;
/// Bytes: lines that are a multiple of this apart meet in one set of the L1 cache, so that copies of them are faster.
const ALIAS: usize = 4096;
/// Stored columns are read from multiples of this on, as [`Fill`](super::source::Fill) asks.
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
    let rounds = |side: &Side<'_>| work.rounds && !side.factor.is_bf16();
    let spans = work.parts.len().div_ceil(SPAN);
    // Where there are several spans, the sums of all groups wait for the next one.
    let waiting = if spans > 1 { rows.len() } else { rows.len().min(GROUP) };
    let sums = sums.at_least(waiting.next_multiple_of(I::LINES) * width);
    for (number, span) in work.parts.chunks(SPAN).enumerate() {
        let deep: usize = span.iter().map(|part| part.depth.len()).sum();
        let right = right.at_least(deep * width);
        let mut free = &mut *right;
        for part in span {
            let side = work.terms[part.term].1;
            let (here, rest) = free.split_at_mut(part.depth.len() * width);
            free = rest;
            // SAFETY: the caller's promise.
            unsafe {
                let depth = part.depth.clone();
                pack::right(side, columns.clone(), depth, I::WIDTH, here, rounds(&side), scratch);
            }
        }
        for group in rows.clone().step_by(GROUP) {
            let group = group..rows.end.min(group + GROUP);
            let sums = &mut sums[if spans > 1 { (group.start - rows.start) * width } else { 0 }..];
            let direct = direct::<I, T>(out, work, &group, &columns);
            let mut packed = &*right;
            for (at, part) in span.iter().enumerate() {
                let (here, rest) = packed.split_at(part.depth.len() * width);
                packed = rest;
                let side = work.terms[part.term].0;
                let (lines, depth) = (group.clone(), part.depth.clone());
                let alias = (side.factor.stride * size_of::<f32>()).is_multiple_of(ALIAS);
                let copies = rounds(&side) || (alias && columns.len() > FEW);
                // SAFETY: as above.
                let lines =
                    unsafe { Lines::of::<I>(side, lines, depth, left, copies, rounds(&side), scratch) };
                let sums = direct.unwrap_or(Sums { first: sums.as_mut_ptr(), apart: width });
                let adds = number > 0 || at > 0 || (direct.is_some() && work.beta == 1.0);
                // SAFETY: as above; the buffer holds whole tiles, and so does what is direct.
                unsafe { multiply_group::<I>(&lines, group.len(), here, columns.len(), sums, adds) };
            }
            if number + 1 == spans && direct.is_none() {
                for (row, sums) in group.zip(sums.chunks_exact(width)) {
                    // SAFETY: instructions by the caller's promise, and this part of the result is this task's.
                    unsafe { finish(out.part(row, columns.clone()), sums, work.alpha, work.beta) };
                }
            }
        }
    }
}

/// Where sums are kept: the first one, and the distance of their rows.
#[derive(Clone, Copy)]
struct Sums {
    first: *mut f32,
    apart: usize,
}

/// The place of a group in the result, if its sums can be kept there: whole tiles in f32 that are not scaled. What is there
/// already may be added to in one part only, for a different order of additions would give other bits.
fn direct<I: Tile, T: Target>(
    out: &Out<'_, T>,
    work: &Work<'_>,
    rows: &Range<usize>,
    columns: &Range<usize>,
) -> Option<Sums> {
    let whole = rows.len().is_multiple_of(I::LINES) && columns.len().is_multiple_of(I::LANES);
    let plain = work.alpha == 1.0 && (work.beta == 0.0 || (work.beta == 1.0 && work.parts.len() == 1));
    if !whole || !plain {
        return None;
    }
    // The last value is one of the result, too.
    out.address(rows.end - 1, columns.end - 1);
    Some(Sums { first: T::as_f32(out.address(rows.start, columns.start))?, apart: out.stride() })
}

/// `sums [count, columns] = left right`, added to what is there if `adds`.
///
/// # Safety
/// The machine has the instructions of `I`. There are sums for whole tiles, which nobody else uses.
unsafe fn multiply_group<I: Tile>(
    lines: &Lines<'_>,
    count: usize,
    right: &[f32],
    columns: usize,
    sums: Sums,
    adds: bool,
) {
    let depth = right.len() / columns.next_multiple_of(I::WIDTH);
    for (block, right) in right.chunks_exact(depth * I::WIDTH).enumerate() {
        let first = block * I::WIDTH;
        let vectors = (columns - first).min(I::WIDTH).div_ceil(I::LANES);
        for line in (0..count).step_by(I::LINES) {
            let (left, apart) = lines.strip::<I>(line, I::LINES.min(count - line));
            // SAFETY: the caller's promise.
            let here = unsafe { sums.first.add(line * sums.apart + first) };
            // Later blocks find all lines in the cache.
            let is_new = block == 0 && line + 2 * I::LINES <= count;
            let next = if is_new { lines.strip::<I>(line + I::LINES, I::LINES).0 } else { std::ptr::null() };
            let right = right.as_ptr();
            let call = Call { left, line: apart, right, depth, sums: here, apart: sums.apart, adds, next };
            // SAFETY: instructions by the caller's promise; lines, block and sums are there for a whole tile.
            unsafe { I::tile(&call, vectors) };
        }
    }
}

/// Left lines of a group, as far as a part of the depth reaches.
struct Lines<'a> {
    values: &'a [f32],
    /// Distance of two lines.
    apart: usize,
    /// The last lines, where they fill no whole strip and the others are read where they are stored.
    last: &'a [f32],
}

impl<'a> Lines<'a> {
    /// Lays out lines: copied if `copies`, rounded to bf16 if `rounds`, or read where they are stored if they can be.
    ///
    /// # Safety
    /// The machine has avx2 and fma.
    unsafe fn of<I: Tile>(
        side: Side<'a>,
        lines: Range<usize>,
        depth: Range<usize>,
        packed: &'a mut Aligned<f32>,
        copies: bool,
        rounds: bool,
        scratch: &mut Vec<f32>,
    ) -> Self {
        let in_place = match side.factor.source {
            Source::F32(values) if side.along && !copies => Some(values),
            _ => None,
        };
        let whole = lines.len() - lines.len() % I::LINES;
        let copied = if in_place.is_some() { lines.start + whole..lines.end } else { lines.clone() };
        let apart = depth.len() + SKEW;
        let packed = packed.at_least(copied.len().next_multiple_of(I::LINES) * apart);
        // SAFETY: the caller's promise.
        unsafe { pack::left(side, copied, depth.clone(), packed, apart, rounds, scratch) };
        match in_place {
            Some(values) => {
                let stride = side.factor.stride;
                let end = (lines.end - 1) * stride + depth.end;
                let values = &values[lines.start * stride + depth.start..end];
                Self { values, apart: stride, last: packed }
            }
            None => Self { values: packed, apart, last: &[] },
        }
    }

    /// Where a strip of `height` lines begins, and the distance of its lines.
    fn strip<I: Tile>(&self, line: usize, height: usize) -> (*const f32, usize) {
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
