//! Checkpoints: what is trained, the optimizer's state and where the run stands, written whole or not at all.
//!
//! `checkpoint-N/` holds the adapter (or the model), `optimizer.safetensors` and `trainer_state.json`. Data order,
//! schedule and dropout are pure functions of the step, so the step is all that has to be remembered of them. `best/` has
//! `trainer_state.json` too. Only folders with the identity of the run are written over or removed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};

use super::identity::Identity;
use super::metrics::FILE as METRICS;
use super::optimizer::AdamW;
use super::record::{self, BEST, Record, TrainerState};
use crate::error::{Context, Error, Result, is_there, open_regular};
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

/// A number with 15 digits, as many as survive being written as JSON and read again.
pub(super) fn restorable(number: f64) -> f64 {
    format!("{number:.14e}").parse().unwrap_or(number)
}

const PREFIX: &str = "checkpoint-";
/// The checkpoints in a run folder with their steps, oldest first.
pub fn list(output: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    if !output.is_dir() {
        return Ok(found);
    }
    for entry in fs::read_dir(output).at(output)? {
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
    let digits = name.strip_prefix(PREFIX)?;
    let step: u64 = digits.parse().ok()?;
    // A name that the loop would write differently is not its own.
    (step.to_string() == digits).then_some(step)
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

/// The identity of the run in `output`; one without a checkpoint has none and may go on with anything.
pub fn identity_of_run(output: &Path) -> Result<Option<Identity>> {
    Ok(list(output)?.iter().rev().find_map(|(_, path)| record::identity(path)))
}

/// SHA-256 of the files that the run with this identity wrote into its checkpoints and its best evaluation.
pub fn digests_of_run(output: &Path, run: &Identity) -> Result<BTreeSet<String>> {
    let mut folders: Vec<PathBuf> = list(output)?.into_iter().map(|(_, path)| path).collect();
    folders.push(output.join(BEST));
    folders.retain(|path| record::is_of(path, run));
    // A folder that cannot be read tells nothing; whoever goes on from it says what is wrong.
    Ok(folders.iter().filter_map(|path| record::recorded_digests(path).ok()).flatten().collect())
}

/// Refuses a run folder with a checkpoint that this program did not make. Other trainers use the same names.
pub fn refuse_foreign(output: &Path) -> Result<()> {
    match list(output)?.into_iter().find(|(_, path)| record::is_foreign(path)) {
        None => Ok(()),
        Some((_, path)) => Err(Error::request("is not a checkpoint of this program")
            .with_hint("move it to another folder, or choose another run directory with `--output`"))
        .at(path),
    }
}

/// Writes a checkpoint and removes all but the last `keep`. Sentences name the folders that are kept because others put
/// files into them.
pub(super) fn save(
    output: &Path,
    artifact: &dyn Artifact,
    optimizer: &AdamW,
    state: &TrainerState,
    keep: usize,
) -> Result<(PathBuf, Vec<String>)> {
    let path = output.join(format!("{PREFIX}{}", state.step));
    refuse_to_replace(&path, &state.identity)?;
    let metadata = BTreeMap::from([(record::IDENTITY.to_string(), serde_json::to_string(&state.identity)?)]);
    let kept = replace_folder(&path, |folder| {
        artifact.write(folder)?;
        optimizer.write(&folder.join(record::OPTIMIZER), &metadata)?;
        Record::write(state, folder)
    })?;
    let spared = prune(output, keep, state)?;
    Ok((path, kept.into_iter().chain(spared).collect()))
}

/// Refuses a folder that the run did not make and would write over. An empty one is nobody's loss.
pub(super) fn refuse_to_replace(path: &Path, run: &Identity) -> Result<()> {
    if !is_there(path) || record::is_of(path, run) || is_empty(path) {
        return Ok(());
    }
    Err(Error::invalid("was not made by this run, and the run would write over it")
        .with_hint("move it to another folder and go on with `--resume`"))
    .at(path)
}

pub(super) fn is_empty(folder: &Path) -> bool {
    fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_none())
}

/// Removes all checkpoints of the run up to the step of `state` but the last `keep`, and empty folders before these. Later
/// ones are not whole, or the run would have gone on from them; so are those without a record, which count for none. A
/// folder with files of others is kept. A sentence names the newest that is too old and no older one, so that each is named
/// when it becomes too old and not again after each later checkpoint.
pub(super) fn prune(output: &Path, keep: usize, state: &TrainerState) -> Result<Option<String>> {
    let mut all = list(output)?;
    all.retain(|(step, _)| *step <= state.step);
    let has_record = |path: &Path| record::identity(path).is_some_and(|found| found.is_same(&state.identity));
    let whole: Vec<u64> = all.iter().filter(|(_, path)| has_record(path)).map(|(step, _)| *step).collect();
    let first = whole.get(whole.len().saturating_sub(keep.max(1))).copied().unwrap_or(0);
    let mut spared = None;
    for (_, path) in all.iter().filter(|(step, _)| *step < first) {
        spared = None;
        if !record::is_of(path, &state.identity) {
            // This removes nothing but an empty folder.
            let _ = fs::remove_dir(path);
        } else if let Some(stranger) = record::strangers(path)?.first() {
            let (path, stranger) = (path.display(), stranger.display());
            spared = Some(format!("{path} is kept, because the run did not write `{stranger}` in it"));
        } else {
            remove_folder(path)?;
        }
    }
    Ok(spared)
}

/// Restores what is trained and the optimizer from the checkpoint of `step` at `path`, and gives the run's state. Nothing
/// that changed on disk is taken: an error of exit status 1 says what is wrong with this checkpoint.
pub(super) fn restore(
    (step, path): (u64, &Path),
    artifact: &dyn Artifact,
    optimizer: &mut AdamW,
    trainables: &Trainables,
    run: &Identity,
) -> Result<TrainerState> {
    let record = Record::read(path)?;
    if !record.state.identity.is_same(run) {
        return Err(Error::request("the run was started with other data or other settings").with_hint(
            "resume with the recipe and the files it was started with, or start anew with another `--output`",
        ))
        .at(path);
    }
    if record.state.step != step {
        return Err(Error::invalid(format!("`{}` says step {}", record::FILE, record.state.step))).at(path);
    }
    record.verify_files(path)?;
    artifact.restore(path)?;
    trainables.iter().try_for_each(|(name, value)| refuse_not_finite(name, value)).at(path)?;
    let file = path.join(record::OPTIMIZER);
    let tensors = candle_core::safetensors::load(&file, &Device::Cpu).at(&file)?;
    tensors.iter().try_for_each(|(name, value)| refuse_not_finite(name, value)).at(&file)?;
    optimizer.restore(step, tensors.into_iter().collect(), trainables).at(&file)?;
    Ok(record.state)
}

/// Training that goes on from NaN or infinity fails a step later, for a reason that looks like another.
fn refuse_not_finite(name: &str, values: &Tensor) -> Result<()> {
    let values: Vec<f32> = values.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
    match values.iter().find(|value| !value.is_finite()) {
        None => Ok(()),
        Some(value) => Err(Error::invalid(format!("holds {value}, expected finite numbers"))).in_tensor(name),
    }
}

/// Writes a folder beside `path` and puts it in its place when it is whole. What others put into the one before is in the
/// new one too; where that cannot be, the one before is kept under another name, and a sentence says so.
pub(super) fn replace_folder(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<Option<String>> {
    let staged = Staged::replacing(path)?;
    write(staged.path())?;
    let Err(error) = carry_strangers(path, staged.path()) else { return staged.commit().map(|()| None) };
    let kept = keep_aside(path)?;
    staged.commit()?;
    let (path, kept) = (path.display(), kept.display());
    Ok(Some(format!(
        "the folder that was {path} before is kept as {kept}, because not all of it could be carried over: {error}"
    )))
}

/// Gives the folder at `path` a name that nothing has yet, and tells that.
fn keep_aside(path: &Path) -> Result<PathBuf> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let mut names = (1_u64..).map(|number| path.with_file_name(format!("{name}-kept-{number}")));
    let kept = names.find(|kept| !is_there(kept)).unwrap_or_default();
    fs::rename(path, &kept).at(path)?;
    Ok(kept)
}

/// Takes what others put into the folder `from` over into `to`, all of it or an error that names what cannot be taken.
fn carry_strangers(from: &Path, to: &Path) -> Result<()> {
    if !from.is_dir() || from.is_symlink() {
        return Ok(());
    }
    let link = |from: &Path, to: &Path| fs::hard_link(from, to);
    record::strangers(from)?.iter().try_for_each(|path| carry(&from.join(path), &to.join(path), &link))
}

/// Gives a file, or all that is in a folder, a second name through `link`. The first one is left, so that nothing is lost
/// when the process is killed.
fn carry(from: &Path, to: &Path, link: &dyn Fn(&Path, &Path) -> io::Result<()>) -> Result<()> {
    if from.is_dir() && !from.is_symlink() {
        fs::create_dir_all(to).at(from)?;
        for entry in fs::read_dir(from).at(from)? {
            let name = entry.at(from)?.file_name();
            carry(&from.join(&name), &to.join(&name), link)?;
        }
        return Ok(());
    }
    if is_there(to) {
        return Err(Error::invalid("has the name of a file in the new one")).at(from);
    }
    if let Some(folder) = to.parent() {
        fs::create_dir_all(folder).at(from)?;
    }
    // Some file systems have no second names, and the system may refuse one for a file of somebody else.
    if link(from, to).is_ok() {
        return Ok(());
    }
    let copied = match fs::read_link(from) {
        #[cfg(unix)]
        Ok(target) => std::os::unix::fs::symlink(target, to).map_err(Error::from),
        _ => open_regular(from).and_then(|mut file| {
            io::copy(&mut file, &mut File::create(to)?)?;
            Ok(())
        }),
    };
    if copied.is_err() {
        // The disk may be full; half a file helps nobody, and the whole one is still there.
        let _ = fs::remove_file(to);
    }
    copied.at(from)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A user's file whose name the new folder needs stays in the old folder, and a warning names that folder.
    #[test]
    fn a_folder_is_kept_where_its_files_cannot_be_carried_over() {
        let folder = tempfile::tempdir().unwrap();
        let best = folder.path().join(BEST);
        let write = |folder: &Path| fs::write(folder.join("notes.txt"), "new").at(folder);
        fs::create_dir(&best).unwrap();
        fs::write(best.join("notes.txt"), "mine").unwrap();
        fs::write(best.join("a.txt"), "mine").unwrap();
        for number in [1, 2] {
            let kept = folder.path().join(format!("best-kept-{number}"));
            let (path, at) = (best.display(), kept.display());
            let said = replace_folder(&best, write).unwrap();
            let wanted = format!(
                "the folder that was {path} before is kept as {at}, because not all of it could be carried over: \
                 {path}/notes.txt: has the name of a file in the new one"
            );
            assert_eq!(said.unwrap(), wanted);
            assert_eq!(fs::read_to_string(best.join("notes.txt")).unwrap(), "new");
            assert_eq!(fs::read_to_string(kept.join("a.txt")).unwrap(), "mine");
        }
        assert_eq!(fs::read_to_string(folder.path().join("best-kept-1/notes.txt")).unwrap(), "mine");
    }

    /// Links stay links where files have one name only, and a pipe is an error, which ends in no wait.
    #[cfg(unix)]
    #[test]
    fn links_are_made_again_where_the_file_system_has_no_second_names() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("from"), folder.path().join("to"));
        fs::create_dir_all(from.join("folder")).unwrap();
        fs::write(from.join("folder/file"), "mine").unwrap();
        let links = [("to-file", "folder/file"), ("to-folder", "folder"), ("dangling", "nowhere")];
        for (name, target) in links {
            std::os::unix::fs::symlink(target, from.join(name)).unwrap();
        }
        let refuse = |_: &Path, _: &Path| Err(io::Error::from(io::ErrorKind::Unsupported));
        carry(&from, &to, &refuse).unwrap();
        assert_eq!(fs::read_to_string(to.join("folder/file")).unwrap(), "mine");
        for (name, target) in links {
            assert_eq!(fs::read_link(to.join(name)).unwrap(), Path::new(target));
        }
        let pipe = from.join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let error = carry(&pipe, &to.join("pipe"), &refuse).unwrap_err().to_string();
        assert_eq!(error, format!("{}: is a named pipe, expected a regular file", pipe.display()));
        assert!(!is_there(&to.join("pipe")));
    }
}
