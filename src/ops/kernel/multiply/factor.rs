//! The factors of a product: a stored matrix, and which way round it is read.

use std::ops::Range;

use half::bf16;

use super::source::{Fill, Source};
use super::target::Target;

/// A matrix as one side of a product. Its constructors hold `(rows - 1) * stride + columns` to the values that are there,
/// or, where these are produced, to `isize::MAX`: no offset of a value that it has can wrap.
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

    /// Rows of `columns` values that begin `stride` apart, as those of one head among several.
    pub(crate) fn strided<T: Target>(values: &'a [T], rows: usize, columns: usize, stride: usize) -> Self {
        let end = rows.saturating_sub(1).checked_mul(stride).and_then(|start| start.checked_add(columns));
        let ends = rows == 0 || columns == 0 || end.is_some_and(|end| end <= values.len());
        assert!(
            ends && (rows <= 1 || columns <= stride),
            "{rows} rows of {columns} values, {stride} apart, in {} values",
            values.len()
        );
        // The distance to a row that is not there is never used, and might be anything.
        let stride = if rows <= 1 { columns } else { stride };
        Self { stride, ..Self::stored(T::source(values), rows, columns) }
    }

    /// A matrix whose values are produced while they are packed.
    pub(crate) fn filled(fill: &'a dyn Fill, rows: usize, columns: usize) -> Self {
        let values = rows.checked_mul(columns).filter(|values| isize::try_from(*values).is_ok());
        assert!(values.is_some(), "a matrix of {rows}x{columns} values");
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

    #[cfg(target_arch = "x86_64")]
    pub(super) fn is_f32(&self) -> bool {
        matches!(self.source, Source::F32(_))
    }

    pub(super) fn is_bf16(&self) -> bool {
        matches!(self.source, Source::Bf16(_))
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
    #[cfg(target_arch = "x86_64")]
    pub(super) fn in_place(&self) -> Option<&[bf16]> {
        match self.factor.source {
            Source::Bf16(values) if self.along => Some(values),
            _ => None,
        }
    }

    /// The values in f32 where they are stored.
    pub(super) fn stored_f32(&self) -> Option<Stored> {
        let Source::F32(values) = self.factor.source else { return None };
        let stride = self.factor.stride;
        let (line, deep) = if self.along { (stride, 1) } else { (1, stride) };
        Some(Stored { values: values.as_ptr(), line, deep, depth: self.depth() })
    }

    /// Calls `f(rows, values, stride)` for a stored part of the matrix in bf16, in pieces of a few rows: `values` is where
    /// (row `rows.start`, column `columns.start`) lies, with rows `stride` apart. Values that are not bf16 pass through
    /// `scratch`, rounded.
    #[inline(always)]
    pub(super) fn pieces(
        &self,
        rows: Range<usize>,
        columns: Range<usize>,
        scratch: &mut Scratch,
        mut f: impl FnMut(Range<usize>, &[bf16], usize),
    ) {
        if let Source::Bf16(values) = self.factor.source {
            if let Some(part) = self.part(&rows, &columns) {
                f(rows, &values[part], self.factor.stride);
            }
            return;
        }
        let width = columns.len();
        let Scratch { narrow, wide } = scratch;
        for start in rows.clone().step_by(PIECE) {
            let piece = start..rows.end.min(start + PIECE);
            self.wide_pieces(piece, columns.clone(), wide, |rows, values, stride| {
                narrow.resize(rows.len() * width, bf16::ZERO);
                // Rows end to end are one: those of an adapter may be too short for a vector.
                let (length, stride) =
                    if stride == width { (narrow.len(), narrow.len()) } else { (width, stride) };
                for (out, row) in narrow.chunks_exact_mut(length).zip(values.chunks(stride)) {
                    for (out, value) in out.iter_mut().zip(row) {
                        *out = bf16::narrow(*value);
                    }
                }
                f(rows, narrow, width);
            });
        }
    }

    /// As [`pieces`](Self::pieces), in f32.
    #[inline(always)]
    pub(super) fn wide_pieces(
        &self,
        rows: Range<usize>,
        columns: Range<usize>,
        scratch: &mut Vec<f32>,
        mut f: impl FnMut(Range<usize>, &[f32], usize),
    ) {
        let (width, stride) = (columns.len(), self.factor.stride);
        let Some(part) = self.part(&rows, &columns) else { return };
        if let Source::F32(values) = self.factor.source {
            return f(rows, &values[part], stride);
        }
        for start in rows.clone().step_by(PIECE) {
            let piece = start..rows.end.min(start + PIECE);
            scratch.resize(piece.len() * width, 0.0);
            for (row, out) in piece.clone().zip(scratch.chunks_exact_mut(width)) {
                match self.factor.source {
                    Source::Fill(fill) => fill.fill(row, columns.start, out),
                    Source::Bf16(values) => {
                        let from = row * stride + columns.start;
                        for (out, value) in out.iter_mut().zip(&values[from..from + width]) {
                            *out = value.widen();
                        }
                    }
                    Source::F32(_) => {}
                }
            }
            f(piece, scratch, width);
        }
    }

    /// Where a stored part lies among the values, if anything does.
    fn part(&self, rows: &Range<usize>, columns: &Range<usize>) -> Option<Range<usize>> {
        let Factor { stored_rows, stored_columns, stride, .. } = self.factor;
        assert!(rows.end <= stored_rows && columns.end <= stored_columns);
        if rows.is_empty() || columns.is_empty() {
            return None;
        }
        Some(rows.start * stride + columns.start..(rows.end - 1) * stride + columns.end)
    }
}

/// A side in f32 in memory, with the distances of neighbouring lines and of neighbours in depth.
pub(super) struct Stored {
    pub(super) values: *const f32,
    pub(super) line: usize,
    pub(super) deep: usize,
    pub(super) depth: usize,
}

/// Rows of a piece that is not in place; even, because values are packed in pairs, and a multiple of the steps of depth.
const PIECE: usize = 32;

/// Values on the way from where they are stored to where they are packed.
#[derive(Default)]
pub(super) struct Scratch {
    narrow: Vec<bf16>,
    pub(super) wide: Vec<f32>,
}
