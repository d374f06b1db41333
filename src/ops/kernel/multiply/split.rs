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
use super::work::{Part, Work, depth_of};

/// Values of a panel.
const PANEL: usize = 1 << 19;

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

/// Depth of a panel. Several are less deep than one may be: then stripes are wide and the left side is read less often, which
/// outweighs that sums are read and written for each panel. All the more so where left lines have to be turned or split.
fn deepest(all: usize, across: bool, parts: usize) -> usize {
    match (parts, across) {
        (1, true) => 768,
        // A usual width and, behind it, the rank of an adapter.
        (1, false) if all <= 2304 => 2304,
        (1, false) => 1536,
        _ if all <= 640 => 640,
        _ => 512,
    }
}

/// Depth cut into panels, all terms after one another.
fn panels(terms: &[(Side<'_>, Side<'_>)], parts: usize) -> Vec<Vec<Part>> {
    let all: usize = terms.iter().map(|(left, _)| left.depth().next_multiple_of(STEP)).sum();
    let across = terms.iter().any(|(left, _)| !left.along);
    let most = deepest(all, across, parts);
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

/// Rows and columns of each task, which begin at multiples of 32.
///
/// Every stripe reads or packs all left lines, every range of rows packs all right ones: the cut that costs least, idle
/// threads counted in.
fn tasks<I: Inner>(
    work: &Work<'_>,
    panels: &[Vec<Part>],
    threads: usize,
) -> Vec<(Range<usize>, Range<usize>)> {
    /// Rows of a task whose sums wait for the next panel.
    const WAITING: usize = 2048;
    /// What a value costs that is read in place, packed along its line, or across; one product costs a 200th.
    const COSTS: [f32; 3] = [1.0, 2.0, 4.0];

    let width = I::STRIPS * STRIP;
    let unit = if width.is_multiple_of(32) { width } else { 2 * width };
    let units = work.columns.div_ceil(unit);
    let widest = (PANEL / (depth_of(&panels[0]) * I::PARTS) / unit).max(1);
    let (left, right) = work.terms[0];
    let left = match (left.in_place().is_some() && I::PARTS == 1, left.along) {
        (true, _) => COSTS[0],
        (false, true) => COSTS[1],
        (false, false) => COSTS[2],
    };
    let right = if right.along { COSTS[2] } else { COSTS[1] };
    let strips = work.rows.div_ceil(LEFT);
    let most = if panels.len() > 1 { WAITING / LEFT } else { strips };
    let mut best = (f32::INFINITY, units, strips);
    for stripe in 1..=units.min(widest) {
        let stripes = units.div_ceil(stripe);
        for ranges in strips.div_ceil(most)..=strips.min(4 * threads).max(strips.div_ceil(most)) {
            let height = strips.div_ceil(ranges);
            // The thread that has most to do.
            let rounds = (stripes * strips.div_ceil(height)).div_ceil(threads);
            let (rows, columns) = ((height * LEFT) as f32, (stripe * unit) as f32);
            let cost = rows * left + columns * right + rows * columns * I::PARTS as f32 / 200.0;
            let cost = rounds as f32 * cost;
            if cost < best.0 {
                best = (cost, stripe, height);
            }
        }
    }
    let (_, stripe, height) = best;
    let (stripe, height) = (stripe * unit, height * LEFT);
    let mut tasks = Vec::with_capacity(work.columns.div_ceil(stripe) * work.rows.div_ceil(height));
    for column in (0..work.columns).step_by(stripe) {
        for row in (0..work.rows).step_by(height) {
            tasks.push((row..work.rows.min(row + height), column..work.columns.min(column + stripe)));
        }
    }
    tasks
}
