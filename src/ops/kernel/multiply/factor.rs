//! The factors of a product: a stored matrix, where its values come from, and which way round it is read.

use std::ops::Range;

use half::bf16;

/// Rows of a matrix that are not held in bf16, for instance quantized blocks: written where they are packed.
pub(crate) trait Fill: Sync {
    /// Writes the values of row `row` from `column` on into `out`; `column` is a multiple of 32.
    fn fill(&self, row: usize, column: usize, out: &mut [f32]);
}

#[derive(Clone, Copy)]
pub(super) enum Source<'a> {
    Bf16(&'a [bf16]),
    F32(&'a [f32]),
    Fill(&'a dyn Fill),
}

/// A matrix as one side of a product. Values in f32 are rounded to bf16 when they are packed.
#[derive(Clone, Copy)]
pub(crate) struct Factor<'a> {
    pub(super) source: Source<'a>,
    /// As stored, row-major.
    stored_rows: usize,
    stored_columns: usize,
    /// Distance between the beginnings of two rows.
    pub(super) stride: usize,
    transposed: bool,
}

impl<'a> Factor<'a> {
    /// `values` are the rows end to end, each `columns` long.
    pub(crate) fn bf16(values: &'a [bf16], columns: usize) -> Self {
        Self::stored(Source::Bf16(values), rows_of(values.len(), columns), columns)
    }

    /// As [`bf16`](Self::bf16) for values in f32.
    pub(crate) fn f32(values: &'a [f32], columns: usize) -> Self {
        Self::stored(Source::F32(values), rows_of(values.len(), columns), columns)
    }

    /// A matrix whose values are produced while they are packed.
    pub(crate) fn filled(fill: &'a dyn Fill, rows: usize, columns: usize) -> Self {
        Self::stored(Source::Fill(fill), rows, columns)
    }

    fn stored(source: Source<'a>, stored_rows: usize, stored_columns: usize) -> Self {
        Self { source, stored_rows, stored_columns, stride: stored_columns, transposed: false }
    }

    /// The same values with rows and columns exchanged.
    pub(crate) fn t(self) -> Self {
        Self { transposed: !self.transposed, ..self }
    }

    pub(crate) fn rows(&self) -> usize {
        if self.transposed { self.stored_columns } else { self.stored_rows }
    }

    pub(crate) fn columns(&self) -> usize {
        if self.transposed { self.stored_rows } else { self.stored_columns }
    }

    /// The left side of a product: its rows are rows of the result.
    pub(super) fn left(self) -> Side<'a> {
        Side { along: !self.transposed, factor: self }
    }

    /// The right side of a product: its columns are columns of the result.
    pub(super) fn right(self) -> Side<'a> {
        Side { along: self.transposed, factor: self }
    }
}

fn rows_of(values: usize, columns: usize) -> usize {
    assert!(columns > 0 && values.is_multiple_of(columns), "{values} values in rows of {columns}");
    values / columns
}

/// A factor seen from the product: `lines` of `depth` values that are multiplied and summed. Left and right side look the
/// same from here.
#[derive(Clone, Copy)]
pub(super) struct Side<'a> {
    pub(super) factor: Factor<'a>,
    /// Whether a line is a stored row, that is, neighbours in depth are neighbours in memory; else lines are columns.
    pub(super) along: bool,
}

impl Side<'_> {
    pub(super) fn depth(&self) -> usize {
        if self.along { self.factor.stored_columns } else { self.factor.stored_rows }
    }

    /// The bf16 values when lines can be read where they are stored.
    pub(super) fn in_place(&self) -> Option<&[bf16]> {
        match self.factor.source {
            Source::Bf16(values) if self.along => Some(values),
            _ => None,
        }
    }

    /// Calls `f(rows, values, stride)` for a stored part of the matrix, in pieces of a few rows: `values` is where
    /// (row `rows.start`, column `columns.start`) lies, with rows `stride` apart. Values that are not bf16 pass through
    /// `scratch`.
    pub(super) fn pieces(
        &self,
        rows: Range<usize>,
        columns: Range<usize>,
        scratch: &mut Vec<bf16>,
        mut f: impl FnMut(Range<usize>, &[bf16], usize),
    ) {
        let (width, stride) = (columns.len(), self.factor.stride);
        assert!(rows.end <= self.factor.stored_rows && columns.end <= self.factor.stored_columns);
        if rows.is_empty() || columns.is_empty() {
            return;
        }
        if let Source::Bf16(values) = self.factor.source {
            let start = rows.start * stride + columns.start;
            let end = (rows.end - 1) * stride + columns.end;
            return f(rows, &values[start..end], stride);
        }
        /// Even, because values are packed in pairs.
        const PIECE: usize = 32;
        if scratch.len() < PIECE * width {
            scratch.resize(PIECE * width, bf16::ZERO);
        }
        for start in rows.clone().step_by(PIECE) {
            let piece = start..rows.end.min(start + PIECE);
            for (row, out) in piece.clone().zip(scratch.chunks_exact_mut(width)) {
                match self.factor.source {
                    Source::F32(values) => {
                        let from = row * stride + columns.start;
                        for (out, value) in out.iter_mut().zip(&values[from..from + width]) {
                            *out = bf16::from_f32(*value);
                        }
                    }
                    Source::Fill(fill) => {
                        let mut wide = [0f32; 256];
                        for (i, out) in out.chunks_mut(256).enumerate() {
                            let wide = &mut wide[..out.len()];
                            fill.fill(row, columns.start + 256 * i, wide);
                            for (out, value) in out.iter_mut().zip(wide) {
                                *out = bf16::from_f32(*value);
                            }
                        }
                    }
                    Source::Bf16(_) => {}
                }
            }
            f(piece.clone(), &scratch[..piece.len() * width], width);
        }
    }
}
