//! A frozen weight that stays in its file's quantized blocks and is dequantized where it is used: rows of an embedding when
//! they are looked up, pieces of a product when they are packed. Its values are those that dequantizing the whole would
//! give, in the type that products are computed in.
//!
//! The bytes are shared, and as a rule those of the mapped file: nothing is copied when a model is opened, several
//! processes have them once, and a system that is short of memory may drop them, which it cannot with memory of our own.

use std::fmt;
use std::sync::Arc;

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor};
use half::bf16;
use rayon::prelude::*;

use super::kernel::{Element, Fill, Kind, PART, Row, Values, dispatch, for_rows, to_tensor};
use crate::error::{Context, Error, Result};

/// Bytes that a weight is read from for as long as it lives.
pub type SharedBytes = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// A matrix of quantized values, `[out, in]`; each row is a whole number of blocks.
#[derive(Clone)]
pub struct Quantized {
    name: Arc<str>,
    rows: usize,
    columns: usize,
    kind: Kind,
    stored: GgmlDType,
    dtype: DType,
    bytes: SharedBytes,
}

impl Quantized {
    /// Whether weights of this type can be computed with as they are.
    #[must_use]
    pub fn supports(stored: GgmlDType) -> bool {
        Kind::of(stored).is_some()
    }

    /// `bytes` are the blocks of all rows, end to end; products with them are computed in `dtype`.
    pub fn new(
        name: impl Into<Arc<str>>,
        (rows, columns): (usize, usize),
        stored: GgmlDType,
        dtype: DType,
        bytes: SharedBytes,
    ) -> Result<Self> {
        let name = name.into();
        let Some(kind) = Kind::of(stored) else {
            return Err(Error::invalid(format!("cannot be computed with as {stored:?}"))).in_tensor(&name);
        };
        let (values, size) = kind.block();
        if columns == 0 || !columns.is_multiple_of(values) {
            return Err(Error::invalid(format!(
                "rows of {columns} values are no whole number of {stored:?} blocks, which have {values}"
            )))
            .in_tensor(&name);
        }
        let found = (*bytes).as_ref().len();
        let expected = rows.checked_mul(columns / values).and_then(|blocks| blocks.checked_mul(size));
        if expected != Some(found) {
            let expected =
                expected.map_or_else(|| "more than there can be".to_string(), |bytes| bytes.to_string());
            return Err(Error::invalid(format!(
                "has {found} bytes of {stored:?}, expected {expected} for {rows} rows of {columns} values"
            )))
            .in_tensor(&name);
        }
        if !matches!(dtype, DType::F32 | DType::BF16) {
            return Err(Error::invalid(format!(
                "is to be computed with in {}; expected f32 or bf16",
                dtype.as_str()
            )))
            .in_tensor(&name);
        }
        Ok(Self { name, rows, columns, kind, stored, dtype, bytes })
    }

    /// The tensor's name in a Hugging Face checkpoint.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// `(out, in)`.
    #[must_use]
    pub fn dims(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }

    /// How the values are stored.
    #[must_use]
    pub fn stored(&self) -> GgmlDType {
        self.stored
    }

    /// The type that products with it are computed in.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The values of these rows, `[rows, in]`.
    pub fn select(&self, rows: &[u32]) -> Result<Tensor> {
        if let Some(row) = rows.iter().find(|row| **row as usize >= self.rows) {
            return Err(Error::invalid(format!("has no row {row}, only {}", self.rows)))
                .in_tensor(&self.name);
        }
        dispatch!(self.dtype, selected(self, rows.len(), |i| rows[i] as usize))
    }

    /// All values, `[out, in]`.
    pub fn dequantize(&self) -> Result<Tensor> {
        dispatch!(self.dtype, selected(self, self.rows, |i| i))
    }

    fn row(&self, row: usize) -> &[u8] {
        let (values, size) = self.kind.block();
        let len = self.columns / values * size;
        &(*self.bytes).as_ref()[row * len..][..len]
    }

    /// `x W^T` for a row or two of `x`, `[m, out]` in f32: blocks are read once for each of them, so that the memory sets
    /// the pace.
    pub(super) fn product_of_few(&self, x: &Tensor) -> Result<Tensor> {
        let m = x.dim(0)?;
        let x = x.to_dtype(self.dtype)?.contiguous()?;
        if self.dtype == DType::BF16 {
            let rows: Vec<Row> = Values::<bf16>::of(&x)?.chunks_exact(self.columns).map(Row::new).collect();
            return self.dots(m, |i, blocks| self.kind.dot_narrow(blocks, &rows[i]));
        }
        let x = Values::<f32>::of(&x)?;
        let x: &[f32] = &x;
        self.dots(m, |i, blocks| self.kind.dot(blocks, &x[i * self.columns..][..self.columns]))
    }

    /// `dot(i, row)` for each of `m` rows on the left and each row of blocks, `[m, out]`.
    fn dots(&self, m: usize, dot: impl Fn(usize, &[u8]) -> f32 + Sync) -> Result<Tensor> {
        /// Values of the result in a task: few, so that threads end together.
        const TASK: usize = 16;

        let mut y = vec![0f32; m * self.rows];
        for (i, y) in y.chunks_exact_mut(self.rows).enumerate() {
            y.par_chunks_mut(TASK).enumerate().for_each(|(task, y)| {
                for (j, y) in y.iter_mut().enumerate() {
                    *y = dot(i, self.row(task * TASK + j));
                }
            });
        }
        to_tensor(y, &[m, self.rows])
    }
}

impl Fill for Quantized {
    fn fill(&self, row: usize, column: usize, out: &mut [f32]) {
        self.kind.fill(self.row(row), column, out);
    }
}

impl fmt::Debug for Quantized {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, rows, columns, stored, dtype, .. } = self;
        write!(f, "Quantized({name}, [{rows}, {columns}], {stored:?}, {})", dtype.as_str())
    }
}

fn selected<T: Element>(
    weight: &Quantized,
    count: usize,
    row: impl Fn(usize) -> usize + Sync,
) -> Result<Tensor> {
    /// Values that are widened at once.
    const PIECE: usize = 8 * PART;

    let mut values = vec![T::zero(); count * weight.columns];
    for_rows(&mut values, weight.columns, |i, out| {
        let mut wide = [0f32; PIECE];
        for (piece, out) in out.chunks_mut(PIECE).enumerate() {
            let wide = &mut wide[..out.len()];
            weight.kind.fill(weight.row(row(i)), piece * PIECE, wide);
            for (out, wide) in out.iter_mut().zip(wide) {
                *out = T::narrow(*wide);
            }
        }
    });
    Ok(Tensor::from_vec(values, (count, weight.columns), &Device::Cpu)?)
}
