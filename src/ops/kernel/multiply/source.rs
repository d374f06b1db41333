//! Where the values of a matrix come from.

use half::bf16;

/// Rows of a matrix that are not held in bf16, for instance quantized blocks: written where they are packed.
pub(crate) trait Fill: Sync {
    /// Writes the values of row `row` from `column` on into `out`; `column` is a multiple of 32, and `out` ends at one or
    /// where the row ends.
    fn fill(&self, row: usize, column: usize, out: &mut [f32]);
}

#[derive(Clone, Copy)]
pub(crate) enum Source<'a> {
    Bf16(&'a [bf16]),
    F32(&'a [f32]),
    Fill(&'a dyn Fill),
}
