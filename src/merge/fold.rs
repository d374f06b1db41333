//! The merge itself. Deltas are summed in f32, added to the base's value in f32, and rounded once. Rows are folded in
//! pieces, so that memory follows the largest tensor, as it is written, and not the model.
//!
//! Nothing is believed: the output is read back before it gets its name. A tensor that an adapter goes to must hold what
//! was written and must have changed; every other tensor must be the base's, byte for byte.

use std::borrow::Cow;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::folder::{self, Sink};
use super::plan::{MergePlan, Output};
use super::receipt::{AdapterReceipt, Receipt, TensorReceipt};
use super::{Progress, RECEIPT_FILE};
use crate::adapter::hf::Adapter;
use crate::error::{Context, Error, Result};
use crate::model::Pretrained;
use crate::weights::{Checkpoint, Staged, StoredType, write_atomic};

/// How many values are folded at a time.
const PIECE: usize = 1 << 22;
/// How many of them by one thread at a time.
const CHUNK: usize = 1 << 14;

/// Writes `model` with `adapters` folded in to the new folder `output`, which any loader of the model reads.
///
/// Weights keep their types and files unless a `dtype` is asked for; of a quantized base they become f32. Tokenizer,
/// templates and generation settings are copied. `progress` is called after every tensor.
pub fn merge(
    model: &Pretrained,
    adapters: &[Adapter],
    output: &Path,
    dtype: Option<DType>,
    progress: &mut dyn FnMut(Progress),
) -> Result<Receipt> {
    folder::refuse_base(model, output)?;
    let plan = MergePlan::new(model, adapters, dtype)?;
    let staged = Staged::folder(output)?;
    let mut done = Progress { done: 0, total: plan.tensors.len() * 2 };
    let mut advance = || {
        done.done += 1;
        progress(done);
    };

    let mut sink = Sink::new(model, &plan, staged.path())?;
    let mut totals = Totals::default();
    let mut tensors = Vec::new();
    for (name, output) in &plan.tensors {
        if output.terms.is_empty() {
            if sink.needs_copies() {
                sink.write(name, &unfolded(model, output).in_tensor(name)?)?;
            }
        } else {
            let (bytes, sums) = folded(model, output).in_tensor(name)?;
            sink.write(name, &bytes)?;
            totals.add(&sums);
            tensors.push(receipt(name, output, &bytes, &sums)?);
        }
        model.checkpoint().release(&output.from);
        advance();
    }
    sink.finish()?;
    folder::write_companions(model, &plan, staged.path())?;

    let (identical, converted) = verify(model, &plan, &tensors, staged.path(), &mut advance)?;
    let receipt = Receipt {
        tool: concat!("peft ", env!("CARGO_PKG_VERSION")).to_string(),
        base: model.name().to_string(),
        adapters: adapter_receipts(adapters, &plan)?,
        tensors,
        identical,
        converted,
        values: totals.values,
        changed: totals.changed,
        kept: totals.kept(),
        lost: totals.lost(),
        untied: plan.untied,
        warnings: warnings(model, adapters),
    };
    let text = serde_json::to_string_pretty(&receipt)? + "\n";
    write_atomic(staged.path().join(RECEIPT_FILE), text.as_bytes())?;
    staged.commit()?;
    Ok(receipt)
}

/// Sums over the values of a tensor, or of all: `W` as it would be written without adapter, delta `d`, result `R`.
#[derive(Debug, Clone, Copy, Default)]
struct Totals {
    values: usize,
    changed: usize,
    /// Of `d^2`.
    delta: f64,
    /// Of `(R - W)^2`.
    kept: f64,
    /// Of `(R - (W + d))^2`.
    lost: f64,
    largest: f64,
}

impl Totals {
    fn add(&mut self, other: &Self) {
        self.values += other.values;
        self.changed += other.changed;
        self.delta += other.delta;
        self.kept += other.kept;
        self.lost += other.lost;
        self.largest = self.largest.max(other.largest);
    }

    fn kept(&self) -> f64 {
        if self.delta == 0.0 { 1.0 } else { (self.kept / self.delta).sqrt() }
    }

    fn lost(&self) -> f64 {
        if self.delta == 0.0 { 0.0 } else { (self.lost / self.delta).sqrt() }
    }
}

/// The bytes of a tensor that no adapter goes to, in the type of the output.
fn unfolded<'m>(model: &'m Pretrained, output: &Output<'_>) -> Result<Cow<'m, [u8]>> {
    if output.is_copied() && !model.checkpoint().is_gguf() {
        return Ok(Cow::Borrowed(model.checkpoint().bytes(&output.from)?));
    }
    let dtype = writable(output)?;
    let base = Base::open(model, output)?;
    let (rows, width) = rows_of(&output.shape);
    let mut bytes = Vec::with_capacity(rows * width * dtype.size_in_bytes());
    for (start, count) in pieces(rows, width) {
        let values = base.values(start * width..(start + count) * width);
        bytes.extend(encode(&values, dtype)?);
    }
    Ok(Cow::Owned(bytes))
}

/// The bytes of `W + sum of deltas`, and what became of the deltas.
fn folded(model: &Pretrained, output: &Output<'_>) -> Result<(Vec<u8>, Totals)> {
    let dtype = writable(output)?;
    let base = Base::open(model, output)?;
    let (rows, width) = rows_of(&output.shape);
    let mut bytes = Vec::with_capacity(rows * width * dtype.size_in_bytes());
    let mut totals = Totals::default();
    for (start, count) in pieces(rows, width) {
        let before = base.values(start * width..(start + count) * width);
        let mut delta = vec![0.0_f32; count * width];
        for term in &output.terms {
            delta.iter_mut().zip(term.rows(start, count)?).for_each(|(sum, value)| *sum += value);
        }
        let exact: Vec<f32> = before.iter().zip(&delta).map(|(w, d)| w + d).collect();
        let piece = encode(&exact, dtype)?;
        totals.add(&measure(&before, &delta, &decode(&piece, dtype), dtype));
        bytes.extend(piece);
    }
    let zero = totals.delta == 0.0;
    if totals.changed == 0 && !zero {
        return Err(Error::invalid(format!(
            "the delta, at most {:e}, vanishes in {}: no value of the tensor changes",
            totals.largest,
            dtype.as_str()
        ))
        .with_hint("write the merged model with `--dtype f32`"));
    }
    Ok((bytes, totals))
}

fn measure(before: &[f32], delta: &[f32], after: &[f32], dtype: DType) -> Totals {
    // Sums over fixed chunks, added in order: the same whatever the number of threads.
    let chunks: Vec<Totals> = (before.par_chunks(CHUNK), delta.par_chunks(CHUNK), after.par_chunks(CHUNK))
        .into_par_iter()
        .map(|(before, delta, after)| {
            let mut sums = Totals { values: before.len(), ..Totals::default() };
            for ((w, d), r) in before.iter().zip(delta).zip(after) {
                let rounded = round(*w, dtype);
                let (d, r) = (f64::from(*d), f64::from(*r));
                sums.changed += usize::from(r != f64::from(rounded));
                sums.delta += d * d;
                sums.kept += (r - f64::from(rounded)).powi(2);
                sums.lost += (r - (f64::from(*w) + d)).powi(2);
                sums.largest = sums.largest.max(d.abs());
            }
            sums
        })
        .collect();
    let mut totals = Totals::default();
    chunks.iter().for_each(|chunk| totals.add(chunk));
    totals
}

fn receipt(name: &str, output: &Output<'_>, bytes: &[u8], sums: &Totals) -> Result<TensorReceipt> {
    Ok(TensorReceipt {
        name: name.to_string(),
        dtype: writable(output)?.as_str().to_string(),
        scales: output.terms.iter().map(|term| term.scale).collect(),
        values: sums.values,
        changed: sums.changed,
        delta_norm: sums.delta.sqrt(),
        delta_max: sums.largest,
        kept: sums.kept(),
        lost: sums.lost(),
        zero: sums.delta == 0.0,
        sha256: sha256(bytes),
    })
}

/// Reads the output back. Gives how many tensors are the base's byte for byte, and how many its values in another type.
fn verify(
    model: &Pretrained,
    plan: &MergePlan<'_>,
    tensors: &[TensorReceipt],
    folder: &Path,
    advance: &mut dyn FnMut(),
) -> Result<(usize, usize)> {
    let written = Checkpoint::open(&folder.display().to_string())?;
    let names: Vec<&String> = written.tensors().keys().collect();
    if !plan.tensors.keys().eq(names.iter().copied()) {
        return Err(Error::invalid(format!(
            "the output read back has {} tensors, expected {}",
            names.len(),
            plan.tensors.len()
        )));
    }
    let (mut identical, mut converted) = (0, 0);
    let mut folded = tensors.iter();
    for (name, output) in &plan.tensors {
        let found = written.bytes(name)?;
        let right = if output.terms.is_empty() {
            *if output.is_copied() { &mut identical } else { &mut converted } += 1;
            *found == *unfolded(model, output)?
        } else {
            folded.next().is_some_and(|tensor| tensor.name == *name && tensor.sha256 == sha256(found))
        };
        if !right || written.info(name)?.shape != output.shape {
            return Err(Error::invalid("is not what was written, read back from the output").with_hint(
                "the disk or the memory of this machine is at fault; nothing was kept, try again",
            ))
            .in_tensor(name);
        }
        written.release(name);
        model.checkpoint().release(&output.from);
        advance();
    }
    Ok((identical, converted))
}

fn adapter_receipts(adapters: &[Adapter], plan: &MergePlan<'_>) -> Result<Vec<AdapterReceipt>> {
    let mut receipts = Vec::new();
    for (index, adapter) in adapters.iter().enumerate() {
        let mut zero = true;
        for term in
            plan.tensors.values().flat_map(|output| &output.terms).filter(|term| term.adapter == index)
        {
            zero &= term.is_zero()?;
        }
        receipts.push(AdapterReceipt {
            source: adapter.source.clone(),
            base_model: adapter.base_model.clone(),
            rank: adapter.config.rank,
            alpha: adapter.config.alpha(),
            rslora: adapter.config.rslora,
            layers: plan.layers[index],
            zero,
        });
    }
    Ok(receipts)
}

fn warnings(model: &Pretrained, adapters: &[Adapter]) -> Vec<String> {
    adapters
        .iter()
        .flat_map(|adapter| adapter.warnings.iter().cloned().chain(adapter.base_mismatch(model.name())))
        .collect()
}

/// The values of a base tensor: in the file where they can be read in place, else all in memory.
enum Base<'m> {
    Stored(&'m [u8], DType),
    Values(Vec<f32>),
}

impl<'m> Base<'m> {
    fn open(model: &'m Pretrained, output: &Output<'_>) -> Result<Self> {
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

    fn values(&self, range: std::ops::Range<usize>) -> Cow<'_, [f32]> {
        match self {
            Self::Stored(bytes, dtype) => {
                let size = dtype.size_in_bytes();
                Cow::Owned(decode(&bytes[range.start * size..range.end * size], *dtype))
            }
            Self::Values(values) => Cow::Borrowed(&values[range]),
        }
    }
}

fn writable(output: &Output<'_>) -> Result<DType> {
    output.dtype.ok_or_else(|| {
        Error::invalid(format!(
            "is stored as {}, and only f32, f16 and bf16 can be merged into",
            output.stored
        ))
    })
}

/// A tensor as a matrix: rows, and values in one. A bias has one value per row.
fn rows_of(shape: &[usize]) -> (usize, usize) {
    let rows = shape.first().copied().unwrap_or(1);
    (rows, shape.iter().skip(1).product())
}

/// First row and number of rows of each piece.
fn pieces(rows: usize, width: usize) -> impl Iterator<Item = (usize, usize)> {
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
fn encode(values: &[f32], dtype: DType) -> Result<Vec<u8>> {
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
            Err(Error::invalid(format!("the value {value} cannot be written as {}", dtype.as_str())))
        }
    }
}

fn decode(bytes: &[u8], dtype: DType) -> Vec<f32> {
    let pair = |b: &[u8]| [b[0], b[1]];
    match dtype {
        DType::BF16 => bytes.par_chunks_exact(2).map(|b| bf16::from_le_bytes(pair(b)).to_f32()).collect(),
        DType::F16 => bytes.par_chunks_exact(2).map(|b| f16::from_le_bytes(pair(b)).to_f32()).collect(),
        _ => bytes.par_chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
    }
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
