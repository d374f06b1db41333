//! The room on disk that a run takes at most, predicted from the plan and the headers of its files.

use std::fs;
use std::path::Path;

use candle_core::DType;

use super::prepared::{Prepared, Trainee};
use crate::error::Result;
use crate::recipe::Plan;
use crate::weights::output::refuse_full_disk;

/// Bytes of a line of `metrics.jsonl`, counted generously.
const LINE: u64 = 1024;
/// Bytes of the tokenizer's files per token of the vocabulary, where these files are made of a GGUF file.
const PER_TOKEN: u64 = 64;

/// Bytes that a run writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Disk {
    /// All that is in the run directory at once, at most.
    pub(super) bytes: u64,
}

impl Disk {
    /// Counts checkpoints, one more than are kept while the oldest is not yet removed, the best evaluation, which is there
    /// twice while it is replaced, and the result.
    pub(super) fn of(plan: &Plan, prepared: &Prepared) -> Self {
        let trainable = prepared.trainable().trainable;
        let base = &prepared.base;
        let stored = base.compute_dtype();
        let (weights, optimizer) = match &prepared.trained {
            Trainee::Adapter(_) => (4 * trainable, 8 * trainable),
            // Where values are rounded in the model's files, the optimizer's hold them in f32.
            Trainee::Full if stored == DType::F32 => (4 * trainable, 8 * trainable),
            Trainee::Full => (stored.size_in_bytes() as u64 * trainable, 12 * trainable),
        };
        let result = weights + companion_bytes(prepared);
        let saves = prepared.steps.checked_div(plan.train.save_every).unwrap_or(0) + 1;
        let checkpoints = saves.min(plan.train.keep.max(1) as u64 + 1);
        let best = if prepared.dataset.eval.is_empty() { 0 } else { 2 };
        let checkpoint = result.saturating_add(optimizer);
        let all = checkpoints.saturating_mul(checkpoint).saturating_add(result.saturating_mul(best + 1));
        Self { bytes: all.saturating_add(prepared.steps.saturating_mul(LINE)) }
    }

    /// Refuses a run that the disk has no room for; what the run directory holds already is counted as room.
    pub(super) fn refuse_excess(self, output: &Path) -> Result<()> {
        refuse_full_disk(output, self.bytes.saturating_sub(bytes_below(output))).map_err(|error| {
            error.with_hint(
                "free some space, keep fewer checkpoints with `train.keep`, or choose another output folder with \
                 `--output`",
            )
        })
    }
}

/// Bytes of the tokenizer, templates and settings that lie beside every copy of the weights.
fn companion_bytes(prepared: &Prepared) -> u64 {
    let checkpoint = prepared.base.checkpoint();
    if checkpoint.is_gguf() {
        return PER_TOKEN * prepared.base.config().vocab_size as u64;
    }
    let companions = checkpoint.companions().unwrap_or_default();
    companions.iter().filter_map(|path| Some(fs::metadata(path).ok()?.len())).sum()
}

fn bytes_below(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let sizes = entries.map(|entry| match entry.metadata() {
        Ok(found) if found.is_dir() => bytes_below(&entry.path()),
        Ok(found) => found.len(),
        Err(_) => 0,
    });
    sizes.sum()
}
