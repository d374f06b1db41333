//! One task of a product: a panel of the right side after the other, all rows against each.
//!
//! Where left lines meet several blocks, their depth is taken in chunks that stay in the L1 cache while the blocks stream by;
//! the sums of the lines go through the L2 cache from chunk to chunk.

use std::ops::Range;
use std::ptr;

use half::bf16;

use super::aligned::Aligned;
use super::block::{Block, Inner, LEFT, Previous, Segment};
use super::factor::Scratch;
use super::out::Out;
use super::pack::{self, Blocks, STEP, STRIP};
use super::target::{Target, finish, finish_rows};
use super::thirds;
use super::work::{Part, Work, depth_of};

/// Added to the length of a packed block, so that blocks do not all begin in the same set of a cache.
const SKEW: usize = 32;

/// Buffers of a thread: they grow to what its largest task needs and stay.
#[derive(Default)]
pub(super) struct Workspace {
    panel: Aligned<bf16>,
    left: Lines,
    sums: Aligned<f32>,
    turned: Aligned<f32>,
    scratch: Scratch,
}

/// # Safety
/// As [`multiply`](super::split::multiply), between `begin` and `end`; no other task writes this part of `out`.
pub(super) unsafe fn task<I: Inner, T: Target>(
    out: &Out<'_, T>,
    work: &Work<'_>,
    panels: &[Vec<Part>],
    rows: Range<usize>,
    columns: Range<usize>,
    workspace: &mut Workspace,
) {
    let width = I::STRIPS * STRIP;
    let Workspace { panel: packed, left, sums, turned, scratch } = workspace;
    let blocks = columns.len().div_ceil(width);
    let size = LEFT * width;
    // Of each block of the task, if they wait for the next panel; else of a strip, if they wait for the next chunk. One
    // more, that is written while the next one is summed.
    let kept = if panels.len() > 1 { rows.len().div_ceil(LEFT) * blocks } else { blocks + 1 };
    let sums = sums.at_least(kept * size);
    let turned = turned.at_least(size);
    for (number, panel) in panels.iter().enumerate() {
        let depth = depth_of(panel);
        let stride = depth * I::PARTS * width + SKEW;
        let packed = packed.at_least(blocks * stride);
        for part in panel {
            let side = work.terms[part.term].1;
            let (lines, depth) = (columns.clone(), part.depth.clone());
            let blocks = Blocks { strips: I::STRIPS, stride, before: part.before };
            // SAFETY: instructions by the caller's promise; the buffer is aligned, `stride` is a multiple of 32.
            unsafe {
                if I::PARTS == 1 {
                    pack::right(side, lines, depth, packed, blocks, scratch);
                } else {
                    thirds::right(side, lines, depth, packed, blocks, scratch);
                }
            }
        }
        let steps = depth / STEP;
        let chunk = if blocks < FEW { steps } else { steps.div_ceil(steps.div_ceil(STEPS)) };
        let mut summed: Option<Summed> = None;
        for (strip, row) in rows.clone().step_by(LEFT).enumerate() {
            let lines = row..rows.end.min(row + LEFT);
            for start in (0..steps).step_by(chunk) {
                let end = steps.min(start + chunk);
                // SAFETY: instructions by the caller's promise.
                unsafe {
                    left.lay_out::<I>(work, panel, lines.clone(), start..end, blocks < FEW, scratch);
                }
                for block in 0..blocks {
                    let column = columns.start + block * width;
                    let within = column..columns.end.min(column + width);
                    let at = (strip * blocks + block) % kept * size;
                    let direct = direct::<I, T>(out, work, &lines, &within);
                    let again = number > 0 || start > 0;
                    let call = Block {
                        segments: &left.segments,
                        right: packed[block * stride + start * STEP * width * I::PARTS..].as_ptr().cast(),
                        sums: direct.unwrap_or(sums[at..at + size].as_mut_ptr()),
                        apart: size_of::<f32>() * if direct.is_some() { out.stride() } else { width },
                        accumulate: again || (direct.is_some() && work.beta == 1.0),
                    };
                    let before = summed.take();
                    let previous = before
                        .as_ref()
                        .filter(|_| direct.is_none())
                        .and_then(|before| before.previous(out, work, sums, width));
                    // SAFETY: segments cover the lines, the panel all strips of the block; both hold until the next chunk.
                    // The previous block is whole and this task's, and its sums are not those of this one.
                    unsafe {
                        let strips = within.len().div_ceil(STRIP);
                        let written = I::block::<T>(&call, lines.len(), strips, previous.as_ref());
                        if let Some(before) = before {
                            before.write(out, work, written, sums, width, turned);
                        }
                    }
                    if direct.is_none() && number + 1 == panels.len() && end == steps {
                        summed = Some(Summed { rows: lines.clone(), columns: within, at });
                    }
                }
            }
        }
        if let Some(summed) = summed {
            // SAFETY: instructions by the caller's promise; this part of the result is this task's.
            unsafe { summed.write(out, work, 0, sums, width, turned) };
        }
    }
}

/// Where the sums of a whole block can lie in the result itself: results in f32 that are neither scaled nor turned.
fn direct<I: Inner, T: Target>(
    out: &Out<'_, T>,
    work: &Work<'_>,
    lines: &Range<usize>,
    columns: &Range<usize>,
) -> Option<*mut f32> {
    let whole = lines.len() == LEFT && columns.len() == I::STRIPS * STRIP;
    let plain = work.alpha == 1.0 && (work.beta == 0.0 || work.beta == 1.0) && !work.exchanged;
    if !I::DIRECT || !whole || !plain {
        return None;
    }
    T::as_f32(out.address(lines.start, columns.start))
}

/// Steps of a chunk: 40 KiB of bf16 in 32 lines.
const STEPS: usize = 20;
/// Blocks for which packing left lines and cutting their depth does not pay.
const FEW: usize = 3;

/// Up to 32 lines of the left side, as far as a chunk of depth reaches.
#[derive(Default)]
struct Lines {
    packed: Aligned<bf16>,
    segments: Vec<Segment>,
}

impl Lines {
    /// Lays out `steps` of a panel: in place where that is good and whole steps of whole strips are there, else packed.
    ///
    /// # Safety
    /// The machine has the instructions of [`pack::left`] and [`thirds::left`].
    unsafe fn lay_out<I: Inner>(
        &mut self,
        work: &Work<'_>,
        panel: &[Part],
        lines: Range<usize>,
        steps: Range<usize>,
        few: bool,
        scratch: &mut Scratch,
    ) {
        const SIZE: usize = size_of::<bf16>();
        self.segments.clear();
        let mut free = self.packed.at_least(steps.len() * LEFT * STEP * I::PARTS);
        for part in panel {
            let (side, before) = (work.terms[part.term].0, part.before / STEP);
            // In steps of the part.
            let (first, end) = (steps.start.saturating_sub(before), steps.end.saturating_sub(before));
            let mut start = part.depth.end.min(part.depth.start + first * STEP);
            let end = part.depth.end.min(part.depth.start + end * STEP);
            let stride = side.factor.stride * SIZE;
            // Then lines meet in few sets of the L1 cache.
            let alias = stride.is_multiple_of(2048);
            if I::PARTS == 1
                && (few || !alias)
                && let Some(values) = side.in_place()
                && lines.len().is_multiple_of(STRIP)
                && end.saturating_sub(start) >= STEP
            {
                let steps = (end - start) / STEP;
                let row = side.factor.stride;
                let all = &values[lines.start * row + start..(lines.end - 1) * row + start + steps * STEP];
                self.segments.push(Segment { left: all.as_ptr().cast(), stride, step: STEP * SIZE, steps });
                start += steps * STEP;
            }
            if start >= end {
                continue;
            }
            let steps = (end - start).div_ceil(STEP);
            let (packed, rest) = free.split_at_mut(steps * LEFT * STEP * I::PARTS);
            free = rest;
            // SAFETY: the caller's promise; `packed` begins at a multiple of 2 KiB of an aligned buffer.
            unsafe {
                if I::PARTS == 1 {
                    pack::left(side, lines.clone(), start..end, packed, scratch);
                } else {
                    thirds::left(side, lines.clone(), start..end, packed, scratch);
                }
            }
            let step = LEFT * STEP * I::PARTS * SIZE;
            self.segments.push(Segment { left: packed.as_ptr().cast(), stride: STEP * SIZE, step, steps });
        }
        self.segments.push(Segment { left: ptr::null(), stride: 0, step: 0, steps: 0 });
    }
}

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
        if across.len() == 32 && written < lines.len() {
            let (first, rows) = (lines.start + written, lines.len() - written);
            let to = out.address(first, across.start);
            // The last value is one of the result, too.
            out.address(lines.end - 1, across.end - 1);
            let scales = (work.alpha, work.beta);
            // SAFETY: the caller's promise.
            unsafe { finish_rows(to, out.stride(), rows, &sums[written * stride..], stride, scales) };
            return;
        }
        for (i, line) in lines.enumerate().skip(written) {
            // SAFETY: the caller's promise.
            unsafe {
                let row = out.part(line, across.clone());
                finish(row, &sums[i * stride..], work.alpha, work.beta);
            }
        }
    }
}
