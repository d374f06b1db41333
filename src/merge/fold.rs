//! The merge itself. Deltas are summed in f32, added to the base's value in f32, and rounded once. Rows are folded in
//! pieces, so that memory follows the largest tensor, as it is written, and not the model.
//!
//! The output is read back before it gets its name. A tensor that an adapter goes to must hold what was written and must
//! have changed; every other tensor must be the base's, byte for byte. NaN and infinity are refused in all of them.

use std::borrow::Cow;
use std::path::Path;

use candle_core::DType;
use sha2::{Digest, Sha256};

use super::folder::{self, Sink};
use super::plan::{MergePlan, Output};
use super::receipt::{AdapterReceipt, Receipt, TensorReceipt};
use super::text::MergedText;
use super::values::{Base, Totals, decode, encode, measure, pieces, rows_of};
use super::{Progress, RECEIPT_FILE};
use crate::adapter::hf::Adapter;
use crate::error::{Context, Error, Result};
use crate::model::Pretrained;
use crate::weights::output::refuse_full_disk;
use crate::weights::{Checkpoint, Staged, hexadecimal, write_atomic};

/// A merge warns where rounding loses more than this share of the delta. The rounding error then has half its norm.
const SIZEABLE: f64 = 0.25;

/// Writes `model` with `adapters` folded in to the new folder `output`, which any loader of the model reads.
///
/// Weights keep their types and files unless a `dtype` is asked for; of a quantized base they become f32. Tokenizer,
/// templates and generation settings are copied; tokenizer and templates of an adapter take the place of others. `progress`
/// is called after every tensor, and between the parts in which large files are copied; `false` from there ends the merge,
/// and nothing of it stays.
pub fn merge(
    model: &Pretrained,
    adapters: &[Adapter],
    output: &Path,
    dtype: Option<DType>,
    progress: &mut dyn FnMut(Progress) -> bool,
) -> Result<Receipt> {
    folder::refuse_base(model, output)?;
    write(model, adapters, output, dtype, progress).map_err(|error| model.checkpoint().explain(error))
}

fn write(
    model: &Pretrained,
    adapters: &[Adapter],
    output: &Path,
    dtype: Option<DType>,
    progress: &mut dyn FnMut(Progress) -> bool,
) -> Result<Receipt> {
    model.check_companions()?;
    let text = MergedText::of(model, adapters)?;
    let plan = MergePlan::new(model, adapters, dtype)?;
    let staged = Staged::folder(output)?;
    refuse_full_disk(output, plan.bytes(model)?)?;
    let mut done = Progress { done: 0, total: plan.tensors.len() * 2 };
    let mut sink = Sink::new(model, &plan, staged.path(), &mut || go_on(progress(done)))?;
    let mut advance = || {
        done.done += 1;
        go_on(progress(done))
    };
    let mut totals = Totals::default();
    let mut tensors = Vec::new();
    for (name, output) in &plan.tensors {
        // Values of a GGUF file are looked at when they are dequantized.
        if !model.checkpoint().is_gguf() {
            model.checkpoint().refuse_not_finite(&output.from)?;
        }
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
        advance()?;
    }
    sink.finish()?;
    folder::write_companions(model, adapters, &text, &plan, staged.path())?;

    let (identical, converted) = verify(model, &plan, &tensors, staged.path(), &mut advance)?;
    let receipts = adapter_receipts(adapters, &plan)?;
    let receipt = Receipt {
        tool: concat!("peft ", env!("CARGO_PKG_VERSION")).to_string(),
        base: model.name().to_string(),
        tensors,
        identical,
        converted,
        values: totals.values,
        changed: totals.changed,
        kept: totals.kept(),
        written: totals.written(),
        lost: totals.lost(),
        survived: totals.survived(),
        untied: plan.untied,
        text: text.said(),
        warnings: warnings(model, adapters, &text, &receipts, &totals, &plan)?,
        adapters: receipts,
    };
    let text = serde_json::to_string_pretty(&receipt)? + "\n";
    write_atomic(staged.path().join(RECEIPT_FILE), text.as_bytes())?;
    model.checkpoint().refuse_changed()?;
    staged.commit()?;
    Ok(receipt)
}

fn go_on(wanted: bool) -> Result<()> {
    let message = "interrupted; nothing was written".to_string();
    if wanted { Ok(()) } else { Err(Error::Interrupted { message, hint: None }) }
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

/// Computes the bytes of `W + sum of deltas`, and measures how much of the deltas survives rounding.
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
            term.add_to(&mut delta, start, count)?;
        }
        let exact: Vec<f32> = before.iter().zip(&delta).map(|(w, d)| w + d).collect();
        let piece = encode(&exact, dtype)?;
        totals.add(&measure(&before, &delta, &decode(&piece, dtype), dtype));
        bytes.extend(piece);
    }
    let zero = totals.delta == 0.0;
    if totals.changed == 0 && !zero {
        let error = Error::invalid(format!(
            "the delta, at most {:e}, vanishes in {}: no value of the tensor changes",
            totals.largest,
            dtype.as_str()
        ));
        return Err(match dtype {
            DType::F32 => error,
            _ => error.with_hint("write the merged model with `--dtype f32`"),
        });
    }
    Ok((bytes, totals))
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
        written: sums.written(),
        lost: sums.lost(),
        survived: sums.survived(),
        zero: sums.delta == 0.0,
        sha256: hexadecimal(&Sha256::digest(bytes)),
    })
}

/// Reads the output back. Gives how many tensors are the base's byte for byte, and how many its values in another type.
fn verify(
    model: &Pretrained,
    plan: &MergePlan<'_>,
    tensors: &[TensorReceipt],
    folder: &Path,
    advance: &mut dyn FnMut() -> Result<()>,
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
            folded.next().is_some_and(|tensor| {
                tensor.name == *name && tensor.sha256 == hexadecimal(&Sha256::digest(found))
            })
        };
        if !right || written.info(name)?.shape != output.shape {
            return Err(Error::invalid("is not what was written, read back from the output").with_hint(
                "the disk or the memory of this machine is at fault; nothing was kept, try again",
            ))
            .in_tensor(name);
        }
        written.release(name);
        model.checkpoint().release(&output.from);
        advance()?;
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

/// Collects the warnings about the adapters and about this merge.
fn warnings(
    model: &Pretrained,
    adapters: &[Adapter],
    text: &MergedText,
    receipts: &[AdapterReceipt],
    totals: &Totals,
    plan: &MergePlan<'_>,
) -> Result<Vec<String>> {
    let mut warnings = model.warnings().to_vec();
    for (adapter, receipt) in adapters.iter().zip(receipts) {
        warnings.extend(adapter.warnings.iter().cloned());
        warnings.extend(adapter.base_mismatch(model.name()));
        if receipt.zero {
            warnings.push(format!("the adapter `{}` is zero: it changes nothing", adapter.source));
        }
    }
    let lost = 1.0 - totals.survived();
    if lost > SIZEABLE {
        let dtype = plan.main_dtype().as_str();
        let percent = 100.0 * lost;
        warnings.push(format!(
            "rounding to {dtype} lost {percent:.0}% of what the adapter adds; `--dtype f32` keeps all of it, as the \
             unmerged adapter does"
        ));
    }
    warnings.extend(text.disagreements(adapters)?);
    warnings.extend(not_converted(plan));
    if plan.untied {
        warnings.push(
            "`lm_head` shared the embedding's weight and has its own now: `tie_word_embeddings` is false"
                .to_string(),
        );
    }
    Ok(warnings)
}

/// A warning that names the tensors that are neither f32, f16 nor bf16, which no `--dtype` converts.
fn not_converted(plan: &MergePlan<'_>) -> Option<String> {
    let others = plan.tensors.iter().filter(|(_, output)| output.dtype.is_none());
    let named: Vec<String> = others.map(|(name, output)| format!("`{name}` ({})", output.stored)).collect();
    let (first, rest) = named.split_first()?;
    let more = if rest.is_empty() { String::new() } else { format!(" and {} more tensors", rest.len()) };
    Some(format!(
        "{first}{more}: not f32, f16 or bf16, so the bytes are copied and no `--dtype` converts them"
    ))
}

fn writable(output: &Output<'_>) -> Result<DType> {
    output.dtype.ok_or_else(|| {
        Error::invalid(format!(
            "is stored as {}, and only f32, f16 and bf16 can be merged into",
            output.stored
        ))
    })
}
