//! A product cut into tasks, panels and blocks, for the inner products of x86.
//!
//! - A *task* is a stripe of result columns by a range of result rows. Stripes are narrow enough that each thread gets
//!   several tasks, and rows are split only when there are too few stripes, because every task packs its own panel.
//! - A *panel* is the right side of a stripe, up to 2304 of depth, packed: about 1 MiB at most, half of a usual L2 cache. It is
//!   read once per 32 result rows. More depth goes panel by panel, with sums in f32 in between.
//! - A *block* is 32 rows by 32 or 48 columns of sums. Its left side is read where it is stored, if it can be: 32 rows by
//!   2304 fit the L1 and L2 caches and are used for all blocks of the stripe. Ends that fill no whole block are packed.
//!
//! Where a result is cut depends on the number of threads, in which order it is summed does not: panels are cut by depth
//! alone.

use std::cell::Cell;
use std::ops::Range;
use std::ptr;

use half::bf16;

use super::aligned::Aligned;
use super::block::{Block, Inner, LEFT, Previous, Segment};
use super::factor::{Scratch, Side};
use super::out::{Crew, Out};
use super::pack::{self, Blocks, STEP, STRIP};
use super::target::{Target, finish};
use super::thirds;

/// Depth of a panel that is the only one: a usual width and, behind it, the rank of an adapter.
const DEPTH: [usize; 2] = [2304, 640];
/// Depth of a panel among several: less, so that stripes are wide and the left side is read less often. It outweighs that
/// sums are read and written for each panel.
const DEPTH_OF_SEVERAL: [usize; 2] = [1536, 640];
/// Values of a panel.
const PANEL: usize = 1 << 19;
/// Added to the length of a packed block, so that blocks do not all begin in the same set of a cache.
const SKEW: usize = 32;

/// What is multiplied and where it goes: `out [left lines, right lines] = beta out + alpha sum of left right`.
pub(super) struct Work<'a> {
    pub(super) terms: &'a [(Side<'a>, Side<'a>)],
    pub(super) rows: usize,
    pub(super) columns: usize,
    /// Whether the result is stored `[columns, rows]`.
    pub(super) exchanged: bool,
    pub(super) alpha: f32,
    pub(super) beta: f32,
}

/// Part of a term inside a panel.
struct Part {
    term: usize,
    depth: Range<usize>,
    /// Depth of the parts before it, filled up.
    before: usize,
}

/// Buffers of a thread: they grow to what its largest task needs and stay.
#[derive(Default)]
struct Workspace {
    panel: Aligned<bf16>,
    left: Aligned<bf16>,
    sums: Aligned<f32>,
    turned: Aligned<f32>,
    scratch: Scratch,
    segments: Vec<Segment>,
}

thread_local! {
    /// Taken out while in use.
    static WORKSPACE: Cell<Workspace> = Cell::default();
}

/// Computes `work` into `out`.
///
/// # Safety
/// The machine has the instructions of `I` and those of [`finish`].
pub(super) unsafe fn multiply<I: Inner, T: Target>(out: &Out<'_, T>, work: &Work<'_>, crew: Crew) {
    let panels = panels(work.terms, I::PARTS);
    let tasks = tasks::<I>(work, &panels, crew.size());
    crew.share(tasks.len(), |index| {
        let (rows, columns) = tasks[index].clone();
        let mut workspace = WORKSPACE.take();
        // SAFETY: the caller's promise; tasks do not overlap.
        unsafe {
            I::begin();
            task::<I, T>(out, work, &panels, rows, columns, &mut workspace);
            I::end();
        }
        WORKSPACE.set(workspace);
    });
}

/// Depth cut into panels, all terms after one another.
fn panels(terms: &[(Side<'_>, Side<'_>)], parts: usize) -> Vec<Vec<Part>> {
    let all: usize = terms.iter().map(|(left, _)| left.depth().next_multiple_of(STEP)).sum();
    let kind = usize::from(parts > 1);
    let most = if all <= DEPTH[kind] { DEPTH[kind] } else { DEPTH_OF_SEVERAL[kind] };
    let mut panels = vec![Vec::new()];
    let mut before = 0;
    for (term, (left, _)) in terms.iter().enumerate() {
        let mut start = 0;
        while start < left.depth() {
            if before == most {
                panels.push(Vec::new());
                before = 0;
            }
            let depth = start..left.depth().min(start + most - before);
            let (end, padded) = (depth.end, depth.len().next_multiple_of(STEP));
            if let Some(panel) = panels.last_mut() {
                panel.push(Part { term, depth, before });
            }
            before += padded;
            start = end;
        }
    }
    panels
}

/// Depth of a panel, filled up.
fn depth_of(panel: &[Part]) -> usize {
    panel.last().map_or(0, |part| part.before + part.depth.len().next_multiple_of(STEP))
}

/// Rows and columns of each task, which begin at multiples of 32; `width` columns are a block.
fn tasks<I: Inner>(
    work: &Work<'_>,
    panels: &[Vec<Part>],
    threads: usize,
) -> Vec<(Range<usize>, Range<usize>)> {
    /// Columns of a stripe for which reading the rows costs little, and those it should not go below: each row is read
    /// once for that many.
    const WIDE: usize = 768;
    const NARROW: usize = 96;
    /// Rows that a task should not go below: each panel is packed for that many.
    const SHORT: usize = 128;
    /// Rows of a task whose sums wait for the next panel.
    const WAITING: usize = 2048;

    let width = I::STRIPS * STRIP;
    let unit = if width.is_multiple_of(32) { width } else { 2 * width };
    let units = work.columns.div_ceil(unit);
    let widest = (PANEL / (depth_of(&panels[0]) * I::PARTS) / unit).max(1);
    // The same number for each thread if possible, else rows are split as well.
    let stripes = (work.columns / WIDE / threads).clamp(1, 4) * threads;
    let stripes = stripes.max(units.div_ceil(widest).next_multiple_of(threads));
    let stripe = units.div_ceil(stripes).max(NARROW / unit).min(widest);
    let stripes = units.div_ceil(stripe);
    let mut height = work.rows;
    if stripes < threads {
        height = work.rows.div_ceil((3 * threads).div_ceil(stripes)).max(SHORT);
    }
    if panels.len() > 1 {
        height = height.min(WAITING);
    }
    let height = height.next_multiple_of(LEFT);
    let mut tasks = Vec::with_capacity(stripes * work.rows.div_ceil(height));
    for column in (0..work.columns).step_by(stripe * unit) {
        for row in (0..work.rows).step_by(height) {
            tasks.push((row..work.rows.min(row + height), column..work.columns.min(column + stripe * unit)));
        }
    }
    tasks
}

/// # Safety
/// As [`multiply`]; no other task writes this part of `out`.
unsafe fn task<I: Inner, T: Target>(
    out: &Out<'_, T>,
    work: &Work<'_>,
    panels: &[Vec<Part>],
    rows: Range<usize>,
    columns: Range<usize>,
    workspace: &mut Workspace,
) {
    let width = I::STRIPS * STRIP;
    let Workspace { panel: packed, left: packed_left, sums, turned, scratch, segments } = workspace;
    let blocks = columns.len().div_ceil(width);
    let size = LEFT * width;
    // Two take turns: one is summed while the other is written.
    let several = panels.len() > 1;
    let kept = if several { rows.len().div_ceil(LEFT) * blocks } else { 2 };
    let sums = sums.at_least(kept * size);
    let turned = turned.at_least(size);
    for (number, panel) in panels.iter().enumerate() {
        let depth = depth_of(panel);
        let stride = depth * I::PARTS * width + SKEW;
        let packed = packed.at_least(blocks * stride);
        let packed_left = packed_left.at_least(LEFT * I::PARTS * depth);
        for part in panel {
            let side = work.terms[part.term].1;
            let (lines, depth) = (columns.clone(), part.depth.clone());
            // SAFETY: instructions by the caller's promise; the buffer is aligned, `stride` is a multiple of 32.
            unsafe {
                let blocks = Blocks { strips: I::STRIPS, stride, before: part.before };
                if I::PARTS == 1 {
                    pack::right(side, lines, depth, packed, blocks, scratch);
                } else {
                    thirds::right(side, lines, depth, packed, blocks, scratch);
                }
            };
        }
        let mut summed: Option<Summed> = None;
        for (strip, row) in rows.clone().step_by(LEFT).enumerate() {
            let lines = row..rows.end.min(row + LEFT);
            segments.clear();
            let mut free = &mut packed_left[..];
            for part in panel {
                let side = work.terms[part.term].0;
                // SAFETY: instructions by the caller's promise.
                unsafe {
                    lay_out::<I>(side, lines.clone(), part.depth.clone(), &mut free, scratch, segments)
                };
            }
            segments.push(END);
            for block in 0..blocks {
                let column = columns.start + block * width;
                let within = column..columns.end.min(column + width);
                let index = strip * blocks + block;
                let at = if several { index } else { index % 2 } * size;
                let call = Block {
                    segments,
                    right: packed[block * stride..].as_ptr().cast(),
                    sums: sums[at..at + size].as_mut_ptr(),
                    accumulate: number > 0,
                };
                let previous = summed.as_ref().and_then(|summed| summed.previous(out, work, sums, width));
                // SAFETY: segments cover the lines, the panel all strips of the block; both hold until the next strip.
                // The previous block is whole and this task's, and its sums are not those of this one.
                let written = unsafe {
                    let strips = within.len().div_ceil(STRIP);
                    I::block::<T>(&call, lines.len(), strips, previous.as_ref())
                };
                if number + 1 < panels.len() {
                    continue;
                }
                let next = Summed { rows: lines.clone(), columns: within, at };
                if let Some(summed) = summed.replace(next) {
                    // SAFETY: instructions by the caller's promise; this part of the result is this task's.
                    unsafe { summed.write(out, work, written, sums, width, turned) };
                }
            }
        }
        if let Some(summed) = summed {
            // SAFETY: as above.
            unsafe { summed.write(out, work, 0, sums, width, turned) };
        }
    }
}

/// Appends the segments of `lines x depth` of the left side: in place as far as whole steps of whole strips reach, the
/// rest packed into `free`.
///
/// # Safety
/// The machine has the instructions of [`pack::left`].
unsafe fn lay_out<I: Inner>(
    side: Side<'_>,
    lines: Range<usize>,
    depth: Range<usize>,
    free: &mut &mut [bf16],
    scratch: &mut Scratch,
    segments: &mut Vec<Segment>,
) {
    let mut start = depth.start;
    if I::PARTS == 1
        && let Some(values) = side.in_place()
        && lines.len().is_multiple_of(STRIP)
        && depth.len() >= STEP
    {
        let steps = depth.len() / STEP;
        let stride = side.factor.stride;
        let all = &values[lines.start * stride + start..(lines.end - 1) * stride + start + steps * STEP];
        let size = size_of::<bf16>();
        segments.push(Segment { left: all.as_ptr().cast(), stride: stride * size, step: STEP * size, steps });
        start += steps * STEP;
    }
    if start == depth.end {
        return;
    }
    let steps = (depth.end - start).div_ceil(STEP);
    let (packed, rest) = std::mem::take(free).split_at_mut(steps * LEFT * STEP * I::PARTS);
    *free = rest;
    // SAFETY: the caller's promise; `packed` begins at a multiple of 2 KiB of an aligned buffer.
    unsafe {
        if I::PARTS == 1 {
            pack::left(side, lines, start..depth.end, packed, scratch);
        } else {
            thirds::left(side, lines, start..depth.end, packed, scratch);
        }
    };
    let size = size_of::<bf16>();
    segments.push(Segment {
        left: packed.as_ptr().cast(),
        stride: STEP * size,
        step: LEFT * STEP * I::PARTS * size,
        steps,
    });
}

const END: Segment = Segment { left: ptr::null(), stride: 0, step: 0, steps: 0 };

/// A block whose sums are complete: its place in the result, and where they are.
struct Summed {
    rows: Range<usize>,
    columns: Range<usize>,
    at: usize,
}

impl Summed {
    /// What an inner product needs to write it, if it is whole and replaces what is there.
    fn previous<T>(&self, out: &Out<'_, T>, work: &Work<'_>, sums: &[f32], width: usize) -> Option<Previous> {
        let whole = self.rows.len() == LEFT && self.columns.len() == width;
        (whole && work.beta == 0.0 && !work.exchanged).then(|| Previous {
            alpha: work.alpha,
            to: out.address(self.rows.start, self.columns.start).cast(),
            apart: out.stride() * size_of::<T>(),
            sums: sums[self.at..].as_ptr(),
        })
    }

    /// Scales, adds, rounds and stores, from the row `written` on.
    ///
    /// # Safety
    /// The machine has the instructions of [`finish`]; nobody else uses this part of `out`.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn write<T: Target>(
        self,
        out: &Out<'_, T>,
        work: &Work<'_>,
        written: usize,
        sums: &[f32],
        width: usize,
        turned: &mut [f32],
    ) {
        let Self { rows, columns, at } = self;
        let sums = &sums[at..at + LEFT * width];
        let (lines, across, sums, stride) = if work.exchanged {
            pack::turn(sums, width, turned, LEFT);
            (columns, rows, &*turned, LEFT)
        } else {
            (rows, columns, sums, width)
        };
        for (i, line) in lines.enumerate().skip(written) {
            // SAFETY: the caller's promise.
            unsafe {
                let row = out.part(line, across.clone());
                finish(row, &sums[i * stride..], work.alpha, work.beta);
            }
        }
    }
}
