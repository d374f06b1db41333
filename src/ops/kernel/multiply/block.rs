//! One block of a product, 32 rows by some strips of 16 columns: what an inner product of x86 is given.

use super::target::Target;

/// Rows of a block.
pub(super) const LEFT: usize = 32;

/// Left lines for a stretch of depth. Line `i` of step `s` (32 values) begins at `left + i stride + s step`, in bytes.
/// Behind the last segment stands one without steps.
#[derive(Clone)]
#[repr(C)]
pub(super) struct Segment {
    pub(super) left: *const u8,
    pub(super) stride: usize,
    pub(super) step: usize,
    pub(super) steps: usize,
}

/// A way to compute one block.
pub(super) trait Inner {
    /// Strips of 16 columns in a block.
    const STRIPS: usize;
    /// Parts of a packed value.
    const PARTS: usize;

    /// Before a task, on its thread.
    ///
    /// # Safety
    /// The machine has the instructions, and so for the others.
    unsafe fn begin();

    /// After a task.
    ///
    /// # Safety
    /// As above.
    unsafe fn end();

    /// Computes a block, and meanwhile writes as many rows of `previous` as it returns.
    ///
    /// # Safety
    /// What [`Block`] and [`Previous`] say holds, for `lines` and `strips` in use. Between `begin` and `end` on this thread.
    unsafe fn block<T: Target>(
        call: &Block<'_>,
        lines: usize,
        strips: usize,
        previous: Option<&Previous>,
    ) -> usize;
}

/// `sums [32][STRIPS * 16] = left right`, added to what is there if `accumulate`.
pub(super) struct Block<'a> {
    /// One with steps at least, then one without, where the block ends. Can be read for the lines in use, rounded up to 16.
    pub(super) segments: &'a [Segment],
    /// `STRIPS * PARTS` KiB for each step of all segments. Aligned to 64 bytes, as `sums`.
    pub(super) right: *const u8,
    pub(super) sums: *mut f32,
    pub(super) accumulate: bool,
}

/// A block that has been summed and waits to be written, whole and to nothing added: while the next one is multiplied, the
/// processor has room for it.
#[repr(C)]
pub(super) struct Previous {
    pub(super) alpha: f32,
    /// The first row of the result, the others `apart` bytes from each other.
    pub(super) to: *mut u8,
    pub(super) apart: usize,
    /// `[32][STRIPS * 16]`.
    pub(super) sums: *const f32,
}
