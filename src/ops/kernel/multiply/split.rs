//! A product cut into tasks, panels and blocks, for the inner products of x86.
//!
//! - A *task* is a stripe of result columns by a range of result rows. Stripes are narrow enough that each thread gets
//!   several tasks, and rows are split only when there are too few stripes, because every task packs its own panel.
//! - A *panel* is the right side of a stripe, up to 2304 of depth, packed: about 1 MiB at most, half of a usual L2 cache. It is
//!   read once per 32 result rows. More depth goes panel by panel, with sums in f32 in between.
//! - A *block* is 32 rows by 32 or 48 columns of sums. Its left side is read where it is stored, if it can be, in chunks of
//!   depth that stay in the L1 cache for all blocks of the stripe. Ends that fill no whole block are packed.
//!
//! Where a result is cut depends on the number of threads, in which order it is summed does not: panels are cut by depth
//! alone.

use std::cell::Cell;
use std::ops::Range;

use super::block::{Inner, LEFT};
use super::factor::Side;
use super::out::{Crew, Out};
use super::pack::{STEP, STRIP};
use super::target::Target;
use super::task::{Workspace, task};

/// Depth of a panel that is the only one, of bf16 and of f32 in three parts: a usual width and, behind it, the rank of an adapter.
const DEPTH: [usize; 2] = [2304, 640];
/// Depth of a panel among several: less, so that stripes are wide and the left side is read less often. It outweighs that
/// sums are read and written for each panel.
const DEPTH_OF_SEVERAL: [usize; 2] = [1536, 640];
/// Values of a panel.
const PANEL: usize = 1 << 19;
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
pub(super) struct Part {
    pub(super) term: usize,
    pub(super) depth: Range<usize>,
    /// Depth of the parts before it, filled up.
    pub(super) before: usize,
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
pub(super) fn depth_of(panel: &[Part]) -> usize {
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
