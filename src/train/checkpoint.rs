//! Checkpoints: what is trained, the optimizer's state and where the run stands, written whole or not at all.
//!
//! `checkpoint-N/` holds the adapter (or the model), `optimizer.safetensors` and `trainer_state.json`. Data order,
//! schedule and dropout are pure functions of the step, so the step is all that has to be remembered of them.

use std::path::{Path, PathBuf};

use candle_core::Device;
use serde::{Deserialize, Serialize};

use super::metrics::FILE as METRICS;
use super::optimizer::AdamW;
use crate::error::{Context, Error, Result};
use crate::ops::Trainables;
use crate::weights::{Staged, remove_folder};

/// What a run trains, on disk.
pub trait Artifact {
    /// Writes it into an existing folder.
    fn write(&self, folder: &Path) -> Result<()>;
    /// Writes it as others load it, which may be a layout that training does not go on from.
    fn write_result(&self, folder: &Path) -> Result<()> {
        self.write(folder)
    }
    /// Takes the values that [`Artifact::write`] wrote.
    fn restore(&self, folder: &Path) -> Result<()>;
    /// Whether the written values are the trained ones to the bit; otherwise the optimizer's state holds those.
    fn is_exact(&self) -> bool;
}

/// Where a run stands.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TrainerState {
    /// Updates made.
    pub step: u64,
    /// Tokens seen.
    pub tokens: u64,
    /// Of these, the tokens that carried a label.
    pub supervised_tokens: u64,
    /// The loss on the evaluation data before the first step.
    pub first_eval_loss: Option<f64>,
    /// The evaluation with the lowest loss.
    pub best: Option<Best>,
    /// The most tokens that are computed at once, as the run began with: another cut would round sums otherwise, and the
    /// memory that it was chosen for may be another when the run goes on.
    pub piece_tokens: usize,
    /// What must not change when the run goes on: a digest of data and settings.
    pub fingerprint: String,
}

/// The best evaluation of a run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// After so many updates.
    pub step: u64,
    /// Mean loss per labelled token.
    pub eval_loss: f64,
}

/// A number with 15 digits, as many as survive being written as JSON and read again.
pub(super) fn restorable(number: f64) -> f64 {
    format!("{number:.14e}").parse().unwrap_or(number)
}

const PREFIX: &str = "checkpoint-";
/// The folder of the best evaluation.
pub(super) const BEST: &str = "best";

/// The checkpoints in a run folder with their steps, oldest first.
pub fn list(output: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    if !output.is_dir() {
        return Ok(found);
    }
    for entry in std::fs::read_dir(output).at(output)? {
        let entry = entry.at(output)?;
        let name = entry.file_name();
        if let Some(step) = name.to_str().and_then(step_of) {
            found.push((step, entry.path()));
        }
    }
    found.sort();
    Ok(found)
}

fn step_of(name: &str) -> Option<u64> {
    name.strip_prefix(PREFIX)?.parse().ok()
}

/// Whether the loop writes something of this name into the run folder.
#[must_use]
pub fn is_of_run(name: &str) -> bool {
    name == BEST || name == METRICS || step_of(name).is_some()
}

/// Whether a run has begun in `folder`.
#[must_use]
pub fn is_run(folder: &Path) -> bool {
    folder.join(METRICS).is_file()
}

/// The fingerprint of the run in `output`; one without a checkpoint has none and may go on with anything.
pub fn fingerprint(output: &Path) -> Result<Option<String>> {
    match list(output)?.pop() {
        None => Ok(None),
        Some((_, path)) => Ok(Some(read_state(&path)?.fingerprint)),
    }
}

fn read_state(path: &Path) -> Result<TrainerState> {
    let file = path.join("trainer_state.json");
    serde_json::from_slice(&std::fs::read(&file).at(&file)?).at(&file)
}

/// Writes a checkpoint and removes all but the last `keep`.
pub(super) fn save(
    output: &Path,
    artifact: &dyn Artifact,
    optimizer: &AdamW,
    state: &TrainerState,
    keep: usize,
) -> Result<PathBuf> {
    let path = output.join(format!("{PREFIX}{}", state.step));
    replace_folder(&path, |folder| {
        artifact.write(folder)?;
        optimizer.write(&folder.join("optimizer.safetensors"))?;
        let file = folder.join("trainer_state.json");
        std::fs::write(&file, serde_json::to_vec_pretty(state)?).at(&file)
    })?;
    prune(output, keep)?;
    Ok(path)
}

/// Removes all checkpoints but the last `keep`.
pub(super) fn prune(output: &Path, keep: usize) -> Result<()> {
    let all = list(output)?;
    all[..all.len().saturating_sub(keep.max(1))].iter().try_for_each(|(_, old)| remove_folder(old))
}

/// Removes the best evaluation of a run that was killed before its first checkpoint, and begins again.
pub(super) fn forget_best(output: &Path) -> Result<()> {
    let best = output.join(BEST);
    if best.join("adapter_config.json").exists() || best.join("config.json").exists() {
        remove_folder(best)?;
    }
    Ok(())
}

/// Restores what is trained and the optimizer from the checkpoint at `path`, and gives the run's state.
pub(super) fn restore(
    path: &Path,
    artifact: &dyn Artifact,
    optimizer: &mut AdamW,
    trainables: &Trainables,
    fingerprint: &str,
) -> Result<TrainerState> {
    let state = read_state(path)?;
    if state.fingerprint != fingerprint {
        return Err(Error::request("the run was started with other data or other settings").with_hint(
            "resume with the recipe and the files it was started with, or start anew with another `--output`",
        ))
        .at(path);
    }
    artifact.restore(path)?;
    let file = path.join("optimizer.safetensors");
    let tensors = candle_core::safetensors::load(&file, &Device::Cpu).at(&file)?;
    optimizer.restore(state.step, tensors.into_iter().collect(), trainables).at(&file)?;
    Ok(state)
}

/// Writes a folder beside `path` and puts it in its place when it is whole.
pub(super) fn replace_folder(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let staged = Staged::replacing(path)?;
    write(staged.path())?;
    staged.commit()
}
