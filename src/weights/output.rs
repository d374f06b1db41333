//! Looks at the place of an output before the work: whether its name can be meant, whether it can be written to, and
//! whether the disk has room for it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use crate::error::{Context, Error, Result};

/// A folder that outputs are told to take the shape of.
const EXAMPLE: &str = "runs/first";

/// Gives the folder that `asked` names, with links resolved, or refuses a name that cannot be meant as an output.
pub fn output_folder(asked: &Path) -> Result<PathBuf> {
    if asked.to_string_lossy().trim().is_empty() {
        return Err(Error::request("`output` is empty or blank")
            .with_hint(format!("name a folder, such as `{EXAMPLE}`")));
    }
    refuse_unexpanded(asked)?;
    // Collecting the parts leaves out a last `.`, to which nothing can be renamed.
    let plain: PathBuf = asked.components().collect();
    refuse_dangling(&plain)?;
    let shown = asked.display();
    let is = |folder: Option<PathBuf>| {
        let folder = folder.and_then(|folder| fs::canonicalize(folder).ok());
        folder.is_some() && fs::canonicalize(&plain).ok() == folder
    };
    let refused = |what: &str, example: PathBuf| {
        Err(Error::request(format!("the output `{shown}` is {what}"))
            .with_hint(format!("name a folder of its own, such as `{}`", example.display())))
    };
    if fs::canonicalize(&plain).is_ok_and(|folder| folder.parent().is_none()) {
        return refused("the root of the file system", EXAMPLE.into());
    }
    if is(std::env::home_dir()) {
        return refused("your home folder", plain.join(EXAMPLE));
    }
    if is(Some(".".into())) {
        return refused("the folder that the command runs in", EXAMPLE.into());
    }
    if plain.file_name().is_none() {
        return refused("no name of a folder, for it ends with `..`", plain.join(EXAMPLE));
    }
    if plain.is_symlink() { fs::canonicalize(&plain).at(&plain) } else { Ok(plain) }
}

/// Gives the folder that a new model is to be written to, or says why there can be none.
pub fn new_folder(asked: &Path) -> Result<PathBuf> {
    let target = output_folder(asked)?;
    refuse_below_file(&target)?;
    refuse_occupied(&target)?;
    if is_mount_point(&target) {
        return Err(Error::request(format!(
            "the output `{}` is a mount point, and no folder can be renamed to it",
            target.display()
        ))
        .with_hint(format!("name a folder in it, such as `{}`", target.join("model").display())));
    }
    refuse_unwritable(parent(&target)?)
        .map_err(|error| Error::At { path: target.clone(), source: error.into() })?;
    Ok(target)
}

/// Refuses a path that only a shell would have completed: `~/runs`, `$HOME/runs`.
pub fn refuse_unexpanded(asked: &Path) -> Result<()> {
    let shown = asked.display();
    let parts = || asked.components().filter_map(|part| part.as_os_str().to_str());
    if let Some(first) = parts().next().filter(|first| first.starts_with('~')) {
        let error = Error::request(format!(
            "the output `{shown}` begins with `{first}`, which only a shell replaces with a home folder"
        ));
        let rest: PathBuf = asked.components().skip(1).collect();
        return Err(match std::env::home_dir().filter(|_| first == "~") {
            Some(home) => error.with_hint(format!(
                "write `{}`, or `./{shown}` for a folder of that name",
                home.join(rest).display()
            )),
            None => error.with_hint(format!("write the path out, or `./{shown}` for a folder of that name")),
        });
    }
    let names_variable = |part: &&str| {
        part.match_indices('$').any(|(at, _)| {
            part[at + 1..].starts_with(|next: char| next == '{' || next == '_' || next.is_ascii_alphabetic())
        })
    };
    match parts().find(names_variable) {
        None => Ok(()),
        Some(part) => Err(Error::request(format!(
            "the output `{shown}` has `{part}` in it, and only a shell replaces variables"
        ))
        .with_hint("write the path out")),
    }
}

/// Refuses a path that leads through a link to nothing: no folder can be made there.
fn refuse_dangling(plain: &Path) -> Result<()> {
    let dangling = plain.ancestors().find(|path| path.is_symlink() && fs::metadata(path).is_err());
    let Some(link) = dangling else { return Ok(()) };
    let to = fs::read_link(link).at(link)?;
    Err(Error::request(format!("is a link to `{}`, which is not there", to.display()))
        .with_hint("make that folder first, or choose another one with `--output`"))
    .at(link)
}

/// Refuses a folder that cannot be made because something above it is a file.
pub fn refuse_below_file(target: &Path) -> Result<()> {
    let above = target.ancestors().skip(1).find_map(|folder| Some((folder, fs::metadata(folder).ok()?)));
    match above {
        Some((file, found)) if !found.is_dir() => {
            Err(Error::request("is a file, so there can be no folder in it")
                .with_hint("choose another folder with `--output`"))
            .at(file)
        }
        _ => Ok(()),
    }
}

/// An error if `target` is there and holds something.
pub fn refuse_occupied(target: &Path) -> Result<()> {
    match fs::read_dir(target).map(Iterator::count) {
        Ok(0) => Ok(()),
        Ok(_) => Err(Error::request(format!("`{}` exists and is not empty", target.display()))
            .with_hint("choose another folder with `--output`, or remove this one")),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(_) if target.exists() => {
            Err(Error::request(format!("`{}` exists and is not a folder", target.display()))
                .with_hint("choose another folder with `--output`"))
        }
        Err(error) => Err(error).at(target),
    }
}

/// Refuses a folder in which, or in whose nearest ancestor that is there, this process may make nothing.
pub fn refuse_unwritable(folder: &Path) -> Result<()> {
    let Some(there) = nearest_there(folder) else { return Ok(()) };
    #[cfg(unix)]
    {
        use std::os::unix::ffi::OsStrExt;
        let Ok(name) = std::ffi::CString::new(there.as_os_str().as_bytes()) else { return Ok(()) };
        // SAFETY: the name ends with a zero byte and lives until the call returns.
        if unsafe { libc::access(name.as_ptr(), libc::W_OK | libc::X_OK) } != 0 {
            return Err(std::io::Error::last_os_error().into());
        }
    }
    #[cfg(not(unix))]
    let _ = there;
    Ok(())
}

/// Refuses to write `bytes` below `target` where the disk has less room.
pub fn refuse_full_disk(target: &Path, bytes: u64) -> Result<()> {
    match free_bytes(target) {
        Some(free) if free < bytes => Err(Error::invalid(format!(
            "the disk has {} free, and {} are going to be written",
            in_units(free),
            in_units(bytes)
        ))
        .with_hint("free some space, or choose another output folder with `--output`"))
        .at(target),
        _ => Ok(()),
    }
}

/// Bytes that this process can still write to the disk that `target` is or will be on, where the system tells.
#[must_use]
pub fn free_bytes(target: &Path) -> Option<u64> {
    #[cfg(unix)]
    {
        use std::os::unix::ffi::OsStrExt;
        let name = std::ffi::CString::new(nearest_there(target)?.as_os_str().as_bytes()).ok()?;
        // SAFETY: all zeros are a valid value of this plain structure.
        let mut found: libc::statvfs = unsafe { std::mem::zeroed() };
        // SAFETY: the name ends with a zero byte, and the structure is ours to be written.
        if unsafe { libc::statvfs(name.as_ptr(), &raw mut found) } != 0 {
            return None;
        }
        #[expect(clippy::useless_conversion, reason = "the widths of these fields differ between systems")]
        let (blocks, size) = (u64::from(found.f_bavail), u64::from(found.f_frsize));
        Some(blocks.saturating_mul(size))
    }
    #[cfg(not(unix))]
    {
        let _ = target;
        None
    }
}

fn in_units(bytes: u64) -> String {
    let (mebi, gibi) = (f64::from(1 << 20), f64::from(1 << 30));
    match bytes as f64 {
        bytes if bytes < gibi => format!("{:.1} MiB", bytes / mebi),
        bytes => format!("{:.1} GiB", bytes / gibi),
    }
}

/// The path itself or the folder above it that is there, the current one for a bare name.
fn nearest_there(path: &Path) -> Option<&Path> {
    path.ancestors()
        .map(|folder| if folder.as_os_str().is_empty() { Path::new(".") } else { folder })
        .find(|folder| folder.exists())
}

/// Whether another file system begins at `folder`; nothing can be renamed to such a place.
fn is_mount_point(folder: &Path) -> bool {
    let (Ok(folder), Ok(mounts)) = (fs::canonicalize(folder), fs::read_to_string("/proc/self/mountinfo"))
    else {
        return false;
    };
    // The fifth word is the place, with blanks written in octal.
    let mut places = mounts.lines().filter_map(|line| line.split(' ').nth(4));
    places.any(|place| Path::new(&place.replace("\\040", " ")) == folder)
}

/// The folder something is in; `.` for a bare name.
pub(super) fn parent(path: &Path) -> Result<&Path> {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Ok(Path::new(".")),
        Some(parent) => Ok(parent),
        None => Err(Error::request(format!("`{}` cannot be written to", path.display()))),
    }
}

/// A file or folder that is kept open, so that one notices when its path comes to lead elsewhere.
#[derive(Debug)]
pub struct OpenPath {
    path: PathBuf,
    /// Systems that cannot open folders have none.
    open: Option<File>,
}

impl OpenPath {
    /// Opens what `path` leads to now.
    #[must_use]
    pub fn of(path: &Path) -> Self {
        Self { path: path.to_path_buf(), open: File::open(path).ok() }
    }

    /// Refuses to go on when the file or folder was removed, renamed or replaced.
    pub fn refuse_moved(&self) -> Result<()> {
        if self.is_there() {
            return Ok(());
        }
        Err(Error::invalid("was removed or renamed while the run went on, and nothing more is saved")
            .with_hint("put it back under this name and go on with `--resume`, or start anew"))
        .at(&self.path)
    }

    fn is_there(&self) -> bool {
        let Ok(found) = fs::metadata(&self.path) else { return false };
        #[cfg(unix)]
        {
            use std::os::unix::fs::MetadataExt;
            let same = |opened: fs::Metadata| (opened.dev(), opened.ino()) == (found.dev(), found.ino());
            self.open.as_ref().is_none_or(|file| file.metadata().is_ok_and(same))
        }
        #[cfg(not(unix))]
        {
            let _ = (found, &self.open);
            true
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(asked: &str) -> String {
        let error = output_folder(Path::new(asked)).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        format!("{error}; {}", error.hint().unwrap())
    }

    #[test]
    fn names_that_cannot_be_meant() {
        let home = std::env::home_dir().unwrap();
        let home = home.to_str().unwrap();
        for root in ["/", "//", "/.", "/..", "/usr/.."] {
            assert_eq!(
                refusal(root),
                format!(
                    "the output `{root}` is the root of the file system; name a folder of its own, such as `runs/first`"
                )
            );
        }
        for here in [".", "./", "src/.."] {
            assert!(refusal(here).contains("` is the folder that the command runs in; "), "{here}");
        }
        assert!(refusal("..").contains("`..` is no name of a folder, for it ends with `..`; "));
        assert!(refusal(home).contains("is your home folder; "));
        assert_eq!(
            refusal("~/runs/x"),
            format!(
                "the output `~/runs/x` begins with `~`, which only a shell replaces with a home folder; write \
                 `{home}/runs/x`, or `./~/runs/x` for a folder of that name"
            )
        );
        for unexpanded in ["~", "~/..", "~somebody/x", "$HOME/x", "runs/${NAME}", "runs/a-$NAME"] {
            assert!(refusal(unexpanded).contains("only a shell replaces"), "{unexpanded}");
        }
    }

    #[test]
    fn names_that_can_be_meant() {
        for (asked, understood) in [
            ("runs/first", "runs/first"),
            ("new/.", "new"),
            ("./~/x", "./~/x"),
            ("a$", "a$"),
            ("a$1", "a$1"),
            ("a~b", "a~b"),
            ("../new", "../new"),
        ] {
            assert_eq!(output_folder(Path::new(asked)).unwrap(), Path::new(understood), "{asked}");
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn mount_points_are_known() {
        assert!(is_mount_point(Path::new("/proc")));
        assert!(!is_mount_point(Path::new("/proc/self")));
        assert!(!is_mount_point(Path::new("nowhere")));
    }

    #[cfg(unix)]
    #[test]
    fn a_disk_that_is_too_small() {
        let target = Path::new("nowhere/at/all");
        let free = free_bytes(target).unwrap();
        assert!(free > 0);
        refuse_full_disk(target, 1).unwrap();
        let error = refuse_full_disk(target, u64::MAX).unwrap_err();
        assert!(error.to_string().starts_with("nowhere/at/all: the disk has "), "{error}");
        assert!(
            error.to_string().ends_with(" free, and 17179869184.0 GiB are going to be written"),
            "{error}"
        );
        assert_eq!(error.exit_code(), 1);
    }

    #[cfg(unix)]
    #[test]
    fn what_was_moved_is_noticed() {
        let place = tempfile::tempdir().unwrap();
        let (run, other) = (place.path().join("run"), place.path().join("other"));
        fs::create_dir(&run).unwrap();
        let open = OpenPath::of(&run);
        open.refuse_moved().unwrap();
        fs::rename(&run, &other).unwrap();
        assert!(open.refuse_moved().is_err());
        fs::create_dir(&run).unwrap();
        assert!(open.refuse_moved().is_err(), "another folder has taken its place");
        fs::remove_dir(&run).unwrap();
        fs::rename(&other, &run).unwrap();
        open.refuse_moved().unwrap();
    }
}
