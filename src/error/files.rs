//! Opens files that others wrote: a device, a pipe or a file that is too large is an error, never a wait without end.
//!
//! Links are followed, because the Hub's cache is made of them; what they lead to has to be a regular file.

use std::cell::Cell;
use std::fs::{self, File, FileType, OpenOptions};
use std::io::{ErrorKind, Read};
use std::path::Path;

use super::{Error, Result};

/// Opens a regular file. A file that is not there is an [`Error::Io`], so that callers can give a hint of their own.
pub(crate) fn open_regular(path: &Path) -> Result<File> {
    let found = fs::metadata(path).map_err(|error| match (error.kind(), fs::read_link(path)) {
        (ErrorKind::NotFound, Ok(target)) => {
            Error::invalid(format!("is a link to `{}`, which is not there", target.display()))
                .with_hint("put the file there, or replace the link with the file itself")
        }
        _ => Error::from(error),
    })?;
    // Looked at before it is opened too, because opening a device can have effects of its own.
    refuse_special(found.file_type())?;
    let mut options = OpenOptions::new();
    options.read(true);
    // A pipe that took the file's place since then must not block; on regular files the flag has no effect.
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NONBLOCK | libc::O_NOCTTY);
    let file = options.open(path)?;
    refuse_special(file.metadata()?.file_type())?;
    Ok(file)
}

/// Opens a regular file to be locked, and makes it where there is none.
pub(crate) fn open_to_lock(path: &Path) -> Result<File> {
    refuse_irregular(path)?;
    let mut options = OpenOptions::new();
    options.create(true).truncate(false).write(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NONBLOCK | libc::O_NOCTTY);
    let file = options.open(path)?;
    refuse_special(file.metadata()?.file_type())?;
    Ok(file)
}

/// Refuses a folder, a pipe or a device in the place of a regular file. It is no error if nothing is there.
pub(crate) fn refuse_irregular(path: &Path) -> Result<()> {
    fs::metadata(path).map_or(Ok(()), |found| refuse_special(found.file_type()))
}

/// Reads a regular file of at most `most` bytes whole.
pub(crate) fn read_regular(path: &Path, most: u64) -> Result<Vec<u8>> {
    let file = open_regular(path)?;
    let size = file.metadata()?.len();
    let too_large = |size: u64| {
        Error::invalid(format!("has {size} bytes, expected at most {most}"))
            .with_hint("such a file is read whole into memory; is it the right file?")
    };
    if size > most {
        return Err(too_large(size));
    }
    let mut bytes = Vec::new();
    let room = usize::try_from(size).unwrap_or(usize::MAX);
    let no_memory = || {
        Error::invalid(format!("has {size} bytes, and the system has no memory to read them into"))
            .with_hint("is it the right file? Otherwise free some memory, or raise the limit (`ulimit -v`)")
    };
    let read = may_fail(|| {
        bytes.try_reserve_exact(room).map_err(|_| std::io::Error::from(ErrorKind::OutOfMemory))?;
        // Another program may still be writing, and some files of the system do not know their size.
        file.take(most.saturating_add(1)).read_to_end(&mut bytes)
    });
    if let Err(error) = read {
        return Err(if error.kind() == ErrorKind::OutOfMemory { no_memory() } else { error.into() });
    }
    if bytes.len() as u64 > most {
        return Err(too_large(bytes.len() as u64));
    }
    Ok(bytes)
}

thread_local! {
    static MAY_FAIL: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work`, whose allocations may fail: it gives an error then, which names what the memory was for.
fn may_fail<T>(work: impl FnOnce() -> T) -> T {
    let outer = MAY_FAIL.replace(true);
    let done = work();
    MAY_FAIL.set(outer);
    done
}

/// Whether the calling thread gives an error of its own where the system has no memory.
#[cfg(feature = "cli")]
pub(crate) fn allocation_may_fail() -> bool {
    // An allocator may be called when a thread has ended; nothing may fail then.
    MAY_FAIL.try_with(Cell::get).unwrap_or(false)
}

/// Reads a regular file of text as [`read_regular`] does.
pub(crate) fn read_regular_text(path: &Path, most: u64) -> Result<String> {
    String::from_utf8(read_regular(path, most)?).map_err(|error| {
        Error::invalid(format!("not valid UTF-8 at byte {}", error.utf8_error().valid_up_to()))
            .with_hint("is this a compressed or binary file?")
    })
}

/// Whether something has this name, be it a link that leads nowhere: whoever opens it then says what is wrong with it.
pub(crate) fn is_there(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

fn refuse_special(found: FileType) -> Result<()> {
    if found.is_file() {
        return Ok(());
    }
    if found.is_dir() {
        return Err(Error::invalid("is a folder, expected a file"));
    }
    Err(Error::invalid(format!("is {}, expected a regular file", special(found)))
        .with_hint("write what is to be read into a file, and put that in its place"))
}

#[cfg(unix)]
fn special(found: FileType) -> &'static str {
    use std::os::unix::fs::FileTypeExt;
    match found {
        found if found.is_fifo() => "a named pipe",
        found if found.is_socket() => "a socket",
        found if found.is_block_device() => "a block device",
        _ => "a character device",
    }
}

#[cfg(not(unix))]
fn special(_: FileType) -> &'static str {
    "a device"
}

#[cfg(all(test, unix))]
#[expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
mod tests {
    use super::*;

    fn told<T>(result: Result<T>) -> String {
        result.err().unwrap().to_string()
    }

    #[test]
    fn only_regular_files_are_opened() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("file"), "text").unwrap();
        std::os::unix::fs::symlink(path("file"), path("link")).unwrap();
        std::os::unix::fs::symlink("/dev/zero", path("zero")).unwrap();
        std::os::unix::fs::symlink("nowhere", path("dangling")).unwrap();
        let made = std::process::Command::new("mkfifo").arg(path("pipe")).status().unwrap();
        assert!(made.success());
        assert_eq!(read_regular(&path("link"), 4).unwrap(), b"text");
        assert_eq!(told(open_regular(&path("zero"))), "is a character device, expected a regular file");
        assert_eq!(told(open_regular(&path("pipe"))), "is a named pipe, expected a regular file");
        assert_eq!(told(open_to_lock(&path("pipe"))), "is a named pipe, expected a regular file");
        assert_eq!(told(open_regular(folder.path())), "is a folder, expected a file");
        assert_eq!(told(open_to_lock(folder.path())), "is a folder, expected a file");
        assert!(open_to_lock(&path("lock")).is_ok() && path("lock").is_file());
        assert_eq!(told(open_regular(&path("dangling"))), "is a link to `nowhere`, which is not there");
        assert!(is_there(&path("dangling")) && !is_there(&path("absent")));
        let absent = open_regular(&path("absent")).unwrap_err();
        assert!(matches!(absent, Error::Io(error) if error.kind() == ErrorKind::NotFound));
    }

    #[test]
    fn large_files_are_refused_before_they_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("large");
        File::create(&path).unwrap().set_len(1 << 40).unwrap();
        assert_eq!(told(read_regular(&path, 1000)), "has 1099511627776 bytes, expected at most 1000");
        fs::write(&path, [0xff, 0xfe]).unwrap();
        assert_eq!(told(read_regular_text(&path, 1000)), "not valid UTF-8 at byte 0");
    }
}
