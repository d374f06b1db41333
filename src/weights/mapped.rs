//! Mapped files: read-only views of files, and what is needed to notice that such a file has changed under the view.
//!
//! A mapped file is read when a value of it is touched, which can be hours after it was opened. So each file is compared
//! with what it was before anything that was computed from it is published, and the addresses of all mapped files are in a
//! table: a read that fails raises a signal, whose handler knows an address and nothing else.

use std::fs::Metadata;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::time::SystemTime;

use memmap2::Mmap;

use crate::error::{Context, Error, Result, open_regular};

/// A read-only view of a file.
#[derive(Debug)]
pub(super) struct MappedFile {
    /// Before the map, so that the addresses leave the table before anything else can get them.
    _listed: Option<Listed>,
    map: Mmap,
    path: PathBuf,
    identity: Identity,
}

impl MappedFile {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let file = open_regular(path).at(path)?;
        let identity = Identity::of(&file.metadata().at(path)?);
        // SAFETY: the map is read-only, and files are replaced by renaming here. A file that another process cuts raises a
        // signal, which ends the program; one that it overwrites changes values, never memory of ours, and is noticed by
        // `refuse_changed`.
        let map = unsafe { Mmap::map(&file) }.at(path)?;
        let _listed = Listed::new(path, map.as_ptr() as usize, map.len());
        Ok(Self { _listed, map, path: path.to_path_buf(), identity })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Drops the pages of a range, so that what was read and converted is not in memory twice.
    pub(super) fn release(&self, start: usize, end: usize) {
        #[cfg(unix)]
        if end > start {
            // SAFETY: the map is a read-only view of a file; dropped pages are read from the file again when touched.
            // An error leaves the pages where they are, which is correct too.
            let _ = unsafe {
                self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, end - start)
            };
        }
        #[cfg(not(unix))]
        let _ = (start, end);
    }

    /// An error if the file of this path is another one now, or was written to. One that was removed keeps its content
    /// for as long as it is mapped.
    pub(super) fn refuse_changed(&self) -> Result<()> {
        let now = match std::fs::metadata(&self.path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            now => Identity::of(&now.at(&self.path)?),
        };
        let what = self.identity.difference(&now);
        let Some(what) = what else { return Ok(()) };
        Err(Error::invalid(format!("the file was changed while it was in use: {what}"))
            .with_hint("what was computed from it may be wrong and is not saved; begin again with a file that stays as it is"))
        .at(&self.path)
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}

/// Identifies a file in its present state; another file, or a later change, differs.
#[derive(Debug, PartialEq, Eq)]
struct Identity {
    len: u64,
    modified: Option<SystemTime>,
    /// Device and inode.
    #[cfg(unix)]
    number: (u64, u64),
}

impl Identity {
    fn of(metadata: &Metadata) -> Self {
        #[cfg(unix)]
        use std::os::unix::fs::MetadataExt;
        Self {
            len: metadata.len(),
            modified: metadata.modified().ok(),
            #[cfg(unix)]
            number: (metadata.dev(), metadata.ino()),
        }
    }

    fn difference(&self, now: &Self) -> Option<String> {
        #[cfg(unix)]
        if self.number != now.number {
            return Some("another file has taken its place".to_string());
        }
        if self.len != now.len {
            return Some(format!("it had {} bytes and has {}", self.len, now.len));
        }
        (self.modified != now.modified).then(|| "it was written to".to_string())
    }
}

/// Files in the table at most; further ones are mapped all the same.
const FILES: usize = 512;
/// Bytes of a path that are remembered: the last ones, which tell more.
const PATH: usize = 512;

/// An entry of the table. All of it is atomic, because a signal handler cannot wait for a lock.
struct Slot {
    taken: AtomicBool,
    start: AtomicUsize,
    /// 0 for an entry that is not complete.
    end: AtomicUsize,
    len: AtomicUsize,
    path: [AtomicU8; PATH],
}

static TABLE: [Slot; FILES] = [const { Slot::empty() }; FILES];

impl Slot {
    const fn empty() -> Self {
        Self {
            taken: AtomicBool::new(false),
            start: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
            len: AtomicUsize::new(0),
            path: [const { AtomicU8::new(0) }; PATH],
        }
    }
}

/// A place in the table, given back when it is dropped.
#[derive(Debug)]
struct Listed(usize);

impl Listed {
    /// `None` where the table is full.
    fn new(path: &Path, start: usize, len: usize) -> Option<Self> {
        let free = |slot: &Slot| !slot.taken.swap(true, Ordering::AcqRel);
        let number = TABLE.iter().position(free)?;
        let slot = &TABLE[number];
        let path = path.as_os_str().as_encoded_bytes();
        let path = &path[path.len().saturating_sub(PATH)..];
        for (to, from) in slot.path.iter().zip(path) {
            to.store(*from, Ordering::Relaxed);
        }
        slot.len.store(path.len(), Ordering::Relaxed);
        slot.start.store(start, Ordering::Relaxed);
        slot.end.store(start + len, Ordering::Release);
        Some(Self(number))
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        TABLE[self.0].end.store(0, Ordering::Release);
        TABLE[self.0].taken.store(false, Ordering::Release);
    }
}

/// Calls `f` with each byte of the path of the file that is mapped at `address`; `false` where none is.
///
/// Made for signal handlers: it takes no lock and allocates nothing. Of a very long path only the end is known.
pub fn mapped_path_at(address: usize, mut f: impl FnMut(u8)) -> bool {
    let holds = |slot: &&Slot| {
        address < slot.end.load(Ordering::Acquire) && slot.start.load(Ordering::Relaxed) <= address
    };
    let Some(slot) = TABLE.iter().find(holds) else { return false };
    slot.path.iter().take(slot.len.load(Ordering::Relaxed)).for_each(|byte| f(byte.load(Ordering::Relaxed)));
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path_at(address: usize) -> Option<String> {
        let mut path = Vec::new();
        mapped_path_at(address, |byte| path.push(byte)).then(|| String::from_utf8(path).unwrap())
    }

    #[test]
    fn an_address_leads_to_the_file_for_as_long_as_it_is_mapped() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights");
        std::fs::write(&path, [7; 9000]).unwrap();
        let file = MappedFile::open(&path).unwrap();
        let start = file.as_ptr() as usize;
        for address in [start, start + 8999] {
            assert_eq!(path_at(address).as_deref(), path.to_str());
        }
        assert_ne!(path_at(start + 9000).as_deref(), path.to_str());
        drop(file);
        assert_ne!(path_at(start).as_deref(), path.to_str());
    }

    #[test]
    fn a_file_that_was_written_to_cut_or_replaced_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights");
        let write = |path: &Path, byte: u8, len: usize| std::fs::write(path, vec![byte; len]).unwrap();
        let open = || {
            write(&path, 1, 100);
            // Times have steps of some milliseconds.
            let earlier = SystemTime::now() - std::time::Duration::from_secs(60);
            std::fs::File::options().write(true).open(&path).unwrap().set_modified(earlier).unwrap();
            MappedFile::open(&path).unwrap()
        };
        let found = |file: &MappedFile| file.refuse_changed().unwrap_err().to_string();

        let file = open();
        file.refuse_changed().unwrap();
        write(&path, 2, 100);
        assert_eq!(
            found(&file),
            format!("{}: the file was changed while it was in use: it was written to", path.display())
        );
        let file = open();
        write(&path, 1, 120);
        assert!(found(&file).ends_with("it had 100 bytes and has 120"), "{}", found(&file));
        let file = open();
        let other = folder.path().join("other");
        write(&other, 1, 100);
        std::fs::rename(&other, &path).unwrap();
        #[cfg(unix)]
        assert!(found(&file).ends_with("another file has taken its place"), "{}", found(&file));
        let file = open();
        std::fs::remove_file(&path).unwrap();
        file.refuse_changed().unwrap();
    }
}
