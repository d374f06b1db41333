//! `best/`: the weights of the evaluation with the lowest loss so far.

use std::fs;
use std::path::Path;

use super::checkpoint::{Artifact, is_empty, refuse_to_replace, replace_folder};
use super::identity::Identity;
use super::record::{self, BEST, Best, Record, TrainerState};
use crate::error::{Context, Error, Result, is_there};
use crate::weights::{remove_folder, remove_stale};

/// Writes the result of the best evaluation, which is that of `state`. A sentence says so where the one before is kept.
pub(super) fn save_best(
    output: &Path,
    artifact: &dyn Artifact,
    state: &TrainerState,
) -> Result<Option<String>> {
    let path = output.join(BEST);
    refuse_to_replace(&path, &state.identity)?;
    replace_folder(&path, |folder| {
        artifact.write_result(folder)?;
        Record::write(state, folder)
    })
}

/// Copies the files of the best evaluation of the run in `output`, as its record has them, to a new folder; tells which one it
/// is. A run that was killed may have found it after the checkpoint that it went on from.
pub fn copy_best(output: &Path, to: &Path) -> Result<Option<Best>> {
    let best = output.join(BEST);
    let record = Record::read(&best)?;
    record.verify_files(&best)?;
    for path in record::results(&best)? {
        let (from, to) = (best.join(&path), to.join(&path));
        if let Some(folder) = to.parent() {
            fs::create_dir_all(folder).at(folder)?;
        }
        fs::copy(&from, &to).at(&from)?;
    }
    Ok(record.state.best)
}

/// Finds out whether the best evaluation that `state` tells of is on disk as it was written. One that is missing is written
/// again where `state` is that of its step, else it is forgotten; a sentence says so.
pub(super) fn check_best(
    output: &Path,
    artifact: &dyn Artifact,
    state: &mut TrainerState,
) -> Result<Option<String>> {
    let path = output.join(BEST);
    let found = record::identity(&path);
    // A record that is no JSON any more was one of this program before; reading it says what is wrong.
    if found.is_some() || record::is_foreign(&path) {
        let is_of_old = path.is_dir() && !is_there(&path.join(record::FILE)) && state.kernel.is_empty();
        // Earlier versions left no record in it: then `state` tells whether there was one.
        match state.best {
            Some(best) if is_of_old && best.step > 0 => {
                // A process that was killed here before may have left half a record.
                remove_stale(&path, |name| name == record::FILE)?;
                Record::write(&TrainerState { step: best.step, ..state.clone() }, &path)?;
            }
            _ => refuse_to_replace(&path, &state.identity)?,
        }
    }
    let step = state.best.map_or(0, |best| best.step);
    if is_there(&path) && !is_empty(&path) {
        // The run may have found a better one after its last checkpoint.
        let checked = Record::read(&path).and_then(|record| match record.state.step {
            found if found < step => Err(Error::invalid(format!(
                "holds the evaluation after step {found}, expected that after step {step}"
            )))
            .at(&path),
            _ => record.verify_files(&path),
        });
        return checked.map(|()| None).map_err(|error| {
            error.with_hint(format!("move `{}` to another folder and go on with `--resume`", path.display()))
        });
    }
    if step == 0 {
        return Ok(None);
    }
    let begin = format!("{}: the best evaluation, after step {step}, is missing", path.display());
    if step == state.step {
        // There is no folder here, or an empty one, so that nothing in it has to be kept.
        save_best(output, artifact, state)?;
        return Ok(Some(format!("{begin}; it is written again from the checkpoint of that step")));
    }
    state.best = state.first_eval_loss.map(|eval_loss| Best { step: 0, eval_loss });
    Ok(Some(format!("{begin}; later evaluations are no longer compared with it")))
}

/// Removes the best evaluation of a run that was killed before its first checkpoint, and begins again. One with files of
/// others stays until it is replaced.
pub(super) fn forget_best(output: &Path, run: &Identity) -> Result<()> {
    let best = output.join(BEST);
    refuse_to_replace(&best, run)?;
    if is_there(&best) && record::strangers(&best)?.is_empty() { remove_folder(best) } else { Ok(()) }
}
