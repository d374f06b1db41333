//! The values of tensors, piece by piece: decoded to f32, rounded once to the type they are written in, and measured.

use std::borrow::Cow;

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;

use super::plan::Output;
use crate::error::{Error, Result};
use crate::model::Pretrained;
use crate::weights::StoredType;

/// How many values are folded at a time.
const PIECE: usize = 1 << 22;
/// The number of these values that one thread folds at a time.
const CHUNK: usize = 1 << 14;

/// Sums over the values of one tensor or of all tensors. `W` is the base as it would be written without an adapter, `d` the
/// delta and `R` the result.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Totals {
    pub(super) values: usize,
    pub(super) changed: usize,
    /// Of `d^2`.
    pub(super) delta: f64,
    /// Of `(R - W) d`.
    pub(super) along: f64,
    /// Of `(R - W)^2`.
    pub(super) written: f64,
    /// Of `(R - (W + d))^2`.
    pub(super) lost: f64,
    /// Of `(round(W) - W)^2`: what writing the base in this type costs without any adapter.
    pub(super) base: f64,
    pub(super) largest: f64,
}

impl Totals {
    pub(super) fn add(&mut self, other: &Self) {
        self.values += other.values;
        self.changed += other.changed;
        self.delta += other.delta;
        self.along += other.along;
        self.written += other.written;
        self.lost += other.lost;
        self.base += other.base;
        self.largest = self.largest.max(other.largest);
    }

    /// `<R - W, d> / <d, d>`: the share of the delta that is in the result.
    pub(super) fn kept(&self) -> f64 {
        if self.delta == 0.0 { 1.0 } else { self.along / self.delta }
    }

    /// `||R - W|| / ||d||`.
    pub(super) fn written(&self) -> f64 {
        if self.delta == 0.0 { 1.0 } else { (self.written / self.delta).sqrt() }
    }

    /// `||R - (W + d)|| / ||d||`.
    pub(super) fn lost(&self) -> f64 {
        if self.delta == 0.0 { 0.0 } else { (self.lost / self.delta).sqrt() }
    }

    /// `1 - (||R - (W + d)||^2 - ||round(W) - W||^2) / ||d||^2`, from 0 to 1: the share of the delta that survives
    /// rounding, after subtracting the rounding error that the base alone would have.
    pub(super) fn survived(&self) -> f64 {
        if self.delta == 0.0 { 1.0 } else { (1.0 - (self.lost - self.base) / self.delta).clamp(0.0, 1.0) }
    }
}

/// Measures what rounding did to the deltas; `after` is `before + delta`, rounded to `dtype`.
pub(super) fn measure(before: &[f32], delta: &[f32], after: &[f32], dtype: DType) -> Totals {
    // Sums over fixed chunks, added in order: the same whatever the number of threads.
    let chunks: Vec<Totals> = (before.par_chunks(CHUNK), delta.par_chunks(CHUNK), after.par_chunks(CHUNK))
        .into_par_iter()
        .map(|(before, delta, after)| {
            let mut sums = Totals { values: before.len(), ..Totals::default() };
            for ((w, d), r) in before.iter().zip(delta).zip(after) {
                let rounded = round(*w, dtype);
                sums.changed += usize::from(*r != rounded);
                let (w, d, r) = (f64::from(*w), f64::from(*d), f64::from(*r));
                let moved = r - f64::from(rounded);
                sums.delta += d * d;
                sums.along += moved * d;
                sums.written += moved * moved;
                sums.lost += (r - (w + d)).powi(2);
                sums.base += (f64::from(rounded) - w).powi(2);
                sums.largest = sums.largest.max(d.abs());
            }
            sums
        })
        .collect();
    let mut totals = Totals::default();
    chunks.iter().for_each(|chunk| totals.add(chunk));
    totals
}

/// The values of a base tensor: in the file where they can be read in place, else all in memory.
pub(super) enum Base<'m> {
    Stored(&'m [u8], DType),
    Values(Vec<f32>),
}

impl<'m> Base<'m> {
    pub(super) fn open(model: &'m Pretrained, output: &Output<'_>) -> Result<Self> {
        match output.stored {
            StoredType::Float(dtype) if !model.checkpoint().is_gguf() => {
                Ok(Self::Stored(model.checkpoint().bytes(&output.from)?, dtype))
            }
            _ => {
                let tensor: Tensor = model.read(&output.from, DType::F32, &Device::Cpu)?;
                Ok(Self::Values(tensor.flatten_all()?.to_vec1()?))
            }
        }
    }

    pub(super) fn values(&self, range: std::ops::Range<usize>) -> Cow<'_, [f32]> {
        match self {
            Self::Stored(bytes, dtype) => {
                let size = dtype.size_in_bytes();
                Cow::Owned(decode(&bytes[range.start * size..range.end * size], *dtype))
            }
            Self::Values(values) => Cow::Borrowed(&values[range]),
        }
    }
}

/// A tensor as a matrix: rows, and values in one. A bias has one value per row; matrices of several experts lie end to end.
pub(super) fn rows_of(shape: &[usize]) -> (usize, usize) {
    match shape {
        [] => (1, 1),
        [rows] => (*rows, 1),
        [rows @ .., width] => (rows.iter().product(), *width),
    }
}

/// First row and number of rows of each piece.
pub(super) fn pieces(rows: usize, width: usize) -> impl Iterator<Item = (usize, usize)> {
    let most = (PIECE / width.max(1)).max(1);
    (0..rows).step_by(most).map(move |start| (start, most.min(rows - start)))
}

fn round(value: f32, dtype: DType) -> f32 {
    match dtype {
        DType::BF16 => bf16::from_f32(value).to_f32(),
        DType::F16 => f16::from_f32(value).to_f32(),
        _ => value,
    }
}

/// Little-endian values, rounded once, to nearest, ties to even.
pub(super) fn encode(values: &[f32], dtype: DType) -> Result<Vec<u8>> {
    let size = dtype.size_in_bytes();
    let mut bytes = vec![0; values.len() * size];
    let unwritable =
        bytes.par_chunks_mut(CHUNK * size).zip(values.par_chunks(CHUNK)).find_map_first(|(bytes, values)| {
            for (bytes, value) in bytes.chunks_exact_mut(size).zip(values) {
                match dtype {
                    DType::BF16 => bytes.copy_from_slice(&bf16::from_f32(*value).to_le_bytes()),
                    DType::F16 => bytes.copy_from_slice(&f16::from_f32(*value).to_le_bytes()),
                    _ => bytes.copy_from_slice(&value.to_le_bytes()),
                }
            }
            values.iter().find(|value| !round(**value, dtype).is_finite())
        });
    match unwritable {
        None => Ok(bytes),
        Some(value) => {
            let error = Error::invalid(format!("the value {value} cannot be written as {}", dtype.as_str()));
            Err(match dtype {
                DType::F32 => {
                    error.with_hint("the adapter adds more than f32 can hold; was it trained to the end?")
                }
                _ => error.with_hint("write the merged model with `--dtype f32`, which holds larger values"),
            })
        }
    }
}

pub(super) fn decode(bytes: &[u8], dtype: DType) -> Vec<f32> {
    let pair = |b: &[u8]| [b[0], b[1]];
    match dtype {
        DType::BF16 => bytes.par_chunks_exact(2).map(|b| bf16::from_le_bytes(pair(b)).to_f32()).collect(),
        DType::F16 => bytes.par_chunks_exact(2).map(|b| f16::from_le_bytes(pair(b)).to_f32()).collect(),
        _ => bytes.par_chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
    }
}
