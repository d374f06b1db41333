//! What a product of x86 has to do: its terms, and the parts of them that a panel holds.

use std::ops::Range;

use super::factor::Side;
use super::pack::STEP;

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

/// Depth of a panel, filled up.
pub(super) fn depth_of(panel: &[Part]) -> usize {
    panel.last().map_or(0, |part| part.before + part.depth.len().next_multiple_of(STEP))
}
