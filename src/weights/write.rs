//! Writing so that a reader sees all of it or nothing: everything goes to a temporary sibling, is synced, and is renamed.
//!
//! ```no_run
//! use peft::weights::{Staged, write_atomic};
//!
//! let staged = Staged::folder("runs/first")?;
//! std::fs::write(staged.path().join("config.json"), "{}")?;
//! staged.commit()?; // before this line there is no `runs/first`; an error or a drop leaves nothing behind
//! write_atomic("runs/first/notes.json", b"{}")?;
//! # Ok::<(), peft::Error>(())
//! ```

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use tempfile::{NamedTempFile, TempDir};

use super::output::{new_folder, parent, refuse_below_file, refuse_occupied};
use crate::error::{Context, Result};

/// How the names of temporaries end: `.checkpoint-20.Ab12Cd.partial`.
const SUFFIX: &str = ".partial";
/// Random characters in them.
const RANDOM: usize = 6;
/// What a folder is called while another takes its place, inside a temporary.
const PREVIOUS: &str = "previous";
/// What it is called while it is removed.
const REMOVED: &str = "removed";

/// A folder that is being written beside the place it will have.
#[derive(Debug)]
pub struct Staged {
    target: PathBuf,
    temporary: TempDir,
    replace: bool,
    /// The lock that tells others that the temporary folder is in use, where folders can be locked.
    _lock: Option<File>,
}

impl Staged {
    /// A folder to be. Refuses a target that exists and holds something.
    pub fn folder(target: impl AsRef<Path>) -> Result<Self> {
        Self::new(target.as_ref(), false)
    }

    /// A folder to be, which takes the place of what is there.
    pub fn replacing(target: impl AsRef<Path>) -> Result<Self> {
        Self::new(target.as_ref(), true)
    }

    fn new(asked: &Path, replace: bool) -> Result<Self> {
        let target = match replace {
            true => asked.to_path_buf(),
            false => new_folder(asked)?,
        };
        refuse_below_file(&target)?;
        let parent = parent(&target)?;
        if !replace {
            fs::create_dir_all(parent).at(parent)?;
            let name = target.file_name();
            // Room is all that is gained by this: what cannot be removed stays.
            let _ = remove_stale(parent, |stale| name.is_some_and(|name| name == stale));
        }
        loop {
            let temporary = named(&target, &mut |builder| shared(builder, 0o777).tempdir_in(parent))?;
            let lock = File::open(temporary.path()).ok().filter(|folder| folder.lock().is_ok());
            // Before it was locked, somebody else may have taken it for the rest of a killed process.
            if temporary.path().exists() {
                return Ok(Self { target, temporary, replace, _lock: lock });
            }
        }
    }

    /// Where to write until [`Self::commit`].
    #[must_use]
    pub fn path(&self) -> &Path {
        self.temporary.path()
    }

    /// Where the folder will be.
    #[must_use]
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Syncs what was written and gives it its name.
    pub fn commit(self) -> Result<()> {
        sync_all(self.path())?;
        let parent = parent(&self.target)?;
        if !self.replace {
            refuse_occupied(&self.target)?;
        }
        // A rename takes the place of an empty folder, but not of a full one.
        let previous = if self.replace && self.target.exists() {
            let aside = named(&self.target, &mut |builder| builder.tempdir_in(parent))?;
            fs::rename(&self.target, aside.path().join(PREVIOUS)).at(&self.target)?;
            Some(aside)
        } else {
            None
        };
        if let Err(error) = fs::rename(self.temporary.path(), &self.target) {
            if let Some(aside) = &previous {
                fs::rename(aside.path().join(PREVIOUS), &self.target).at(&self.target)?;
            }
            return Err(error).at(&self.target);
        }
        // The folder has its name, so there is nothing temporary left to remove.
        let _ = self.temporary.keep();
        sync_folder(parent)
    }

    /// Syncs what was written and moves it, file by file, into the folder that the new one would be in: each file is
    /// replaced whole, weights first, and what else is there stays.
    pub fn commit_files(self) -> Result<()> {
        sync_all(self.path())?;
        let parent = parent(&self.target)?;
        move_files(self.path(), parent)
    }
}

/// Removes a folder that others may look for: it loses its name first, so that nobody sees half of it.
pub fn remove_folder(path: impl AsRef<Path>) -> Result<()> {
    let path = path.as_ref();
    let parent = parent(path)?;
    let aside = named(path, &mut |builder| builder.tempdir_in(parent))?;
    fs::rename(path, aside.path().join(REMOVED)).at(path)?;
    aside.close().at(path)
}

/// Removes the temporaries that a killed process left in `folder`; `is_ours` is asked for the names of what they were to
/// become. A folder that had been put aside for another, which then did not come, gets its name back. What a process that
/// still runs is writing stays.
pub fn remove_stale(folder: impl AsRef<Path>, is_ours: impl Fn(&str) -> bool) -> Result<()> {
    let folder = folder.as_ref();
    for entry in fs::read_dir(folder).at(folder)? {
        let entry = entry.at(folder)?;
        let name = entry.file_name();
        let Some(target) = name.to_str().and_then(target_of).filter(|target| is_ours(target)) else {
            continue;
        };
        let (path, target) = (entry.path(), folder.join(target));
        if !entry.file_type().at(&path)?.is_dir() {
            fs::remove_file(&path).at(&path)?;
            continue;
        }
        let held = File::open(&path);
        // Where there are no locks, nobody can tell whether a process still writes there.
        if held.as_ref().is_ok_and(|folder| folder.try_lock().is_err()) {
            continue;
        }
        let previous = path.join(PREVIOUS);
        if previous.exists() && !target.exists() {
            fs::rename(&previous, &target).at(&target)?;
        }
        fs::remove_dir_all(&path).at(&path)?;
    }
    Ok(())
}

/// `best` of `.best.Ab12Cd.partial`.
fn target_of(temporary: &str) -> Option<&str> {
    let (target, random) = temporary.strip_prefix('.')?.strip_suffix(SUFFIX)?.rsplit_once('.')?;
    let is_random = random.len() == RANDOM && random.bytes().all(|byte| byte.is_ascii_alphanumeric());
    is_random.then_some(target)
}

/// Writes a file whole or not at all; folders above it are made.
pub fn write_atomic(path: impl AsRef<Path>, bytes: &[u8]) -> Result<()> {
    let path = path.as_ref();
    replace_file(path, |file| Ok(file.write_all(bytes)?))
}

/// Writes a file through `write`, which gets it empty, whole or not at all.
pub(super) fn replace_file(path: &Path, write: impl FnOnce(&mut File) -> Result<()>) -> Result<()> {
    let folder = parent(path)?;
    fs::create_dir_all(folder).at(folder)?;
    let mut file: NamedTempFile = named(path, &mut |builder| shared(builder, 0o666).tempfile_in(folder))?;
    write(file.as_file_mut()).at(path)?;
    file.as_file().sync_all().at(path)?;
    file.persist(path).map_err(|error| error.error).at(path)?;
    sync_folder(folder)
}

/// Makes something temporary whose name tells what it was to become.
fn named<T>(
    target: &Path,
    make: &mut dyn FnMut(&mut tempfile::Builder<'_, '_>) -> std::io::Result<T>,
) -> Result<T> {
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    let prefix = format!(".{name}.");
    make(tempfile::Builder::new().prefix(&prefix).rand_bytes(RANDOM).suffix(SUFFIX)).at(target)
}

/// Gives what other programs would, before the process's mask; temporary files are private otherwise.
fn shared<'a, 'b, 'c>(
    builder: &'a mut tempfile::Builder<'b, 'c>,
    mode: u32,
) -> &'a mut tempfile::Builder<'b, 'c> {
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(mode));
    #[cfg(not(unix))]
    let _ = mode;
    builder
}

/// Whether a file of this name holds weights.
fn is_weights(name: &OsStr) -> bool {
    Path::new(name).extension().is_some_and(|ending| ending == "safetensors")
}

/// Moves the files of one folder, and those of folders in it, to where they belong in another: weights first.
fn move_files(from: &Path, to: &Path) -> Result<()> {
    let mut entries = fs::read_dir(from).at(from)?.collect::<std::io::Result<Vec<_>>>().at(from)?;
    entries.sort_by_key(|entry| !is_weights(&entry.file_name()));
    for entry in entries {
        let target = to.join(entry.file_name());
        if entry.file_type().at(from)?.is_dir() && target.is_dir() {
            move_files(&entry.path(), &target)?;
        } else {
            fs::rename(entry.path(), &target).at(&target)?;
        }
    }
    sync_folder(to)
}

fn sync_all(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder).at(folder)? {
        let entry = entry.at(folder)?;
        let (path, found) = (entry.path(), entry.file_type().at(folder)?);
        if found.is_dir() {
            sync_all(&path)?;
        } else if found.is_file() {
            // Opening anything else, which a user may have put there, could wait for ever.
            match File::open(&path).and_then(|file| file.sync_all()) {
                // A file of a user that this process may not read is none that it wrote.
                Err(error) if error.kind() == ErrorKind::PermissionDenied => (),
                synced => synced.at(&path)?,
            }
        }
    }
    sync_folder(folder)
}

/// Makes names durable; only Unix can open a folder to sync it.
fn sync_folder(folder: &Path) -> Result<()> {
    if cfg!(unix) {
        File::open(folder).and_then(|folder| folder.sync_all()).at(folder)?;
    }
    Ok(())
}
