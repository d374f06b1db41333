//! The cache of the Hub's files, as Python's tools have it, with names that are looked at before they become paths.
//!
//! ```text
//! models--org--name/blobs/<ETag>                      the bytes, once each
//! models--org--name/snapshots/<commit>/config.json    a link to its blob
//! models--org--name/refs/main                         the commit that the branch was last seen at
//! .locks/models--org--name/<ETag>.lock                held by the process that fetches the blob
//! ```

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use hf_hub::{Cache, CacheRepo, Repo, RepoType};

use super::{HubId, HubSettings};
use crate::error::{Context, Error, Result, open_to_lock};
use crate::weights::folder::{INDEX, SINGLE};
use crate::weights::write_atomic;

/// Another downloading process is given up after standing still for this many times the longest silence.
const STANDSTILL: u32 = 10;

/// A name that the Hub gives to the bytes of a file, fit to be the name of a file here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Etag(String);

impl Etag {
    /// Reads a header such as `"abc"` or `W/"abc"`; refuses what could be a path.
    pub(super) fn read(header: &str) -> Result<Self> {
        let plain = header.strip_prefix("W/").unwrap_or(header).trim_matches('"');
        let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if plain.is_empty() || plain.len() > 128 || plain.starts_with('.') || !plain.chars().all(fits) {
            let start: String = plain.chars().take(80).collect();
            return Err(Error::invalid(format!(
                "the ETag `{}` cannot be the name of a file, expected letters and digits",
                start.escape_debug()
            ))
            .with_hint("the server is broken or means harm; check HF_ENDPOINT"));
        }
        Ok(Self(plain.to_string()))
    }

    /// The SHA-256 of the file's bytes, where the name is one: large files have it, small ones a hash of git's.
    pub(super) fn sha256(&self) -> Option<&str> {
        (self.0.len() == 64 && self.0.bytes().all(|byte| byte.is_ascii_hexdigit())).then_some(&self.0)
    }
}

/// Whether this is the name of a commit: 40 hexadecimal digits.
pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Refuses the name of a repository's file that could be something else on this machine.
pub(super) fn check_name(name: &str) -> Result<()> {
    let is_odd = |c: char| c.is_control() || r#"/\:*?"<>|"#.contains(c);
    if name.is_empty() || name.len() > 200 || name.starts_with('.') || name.contains(is_odd) {
        let start: String = name.chars().take(80).collect();
        return Err(Error::invalid(format!(
            "the repository has a file `{}`, whose name is not plain",
            start.escape_debug()
        ))
        .with_hint("download the repository by other means, and give the local folder"));
    }
    Ok(())
}

/// One repository in the cache.
pub(super) struct Repository<'a> {
    settings: &'a HubSettings,
    id: &'a HubId,
    local: CacheRepo,
    folder: String,
}

impl<'a> Repository<'a> {
    pub(super) fn new(settings: &'a HubSettings, id: &'a HubId) -> Self {
        let repo = Repo::with_revision(id.id.clone(), RepoType::Model, id.revision.clone());
        let folder = repo.folder_name();
        Self { settings, id, local: Cache::new(settings.cache.clone()).repo(repo), folder }
    }

    /// The folder of a commit's files.
    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.local.pointer_path(commit)
    }

    /// Finds the model's folder, if its configuration and weights are there.
    pub(super) fn cached(&self) -> Option<PathBuf> {
        // A commit that Python's tools fetched by its hash has no reference of its own.
        let folder = match self.local.get("config.json") {
            Some(config) => config.parent()?.to_path_buf(),
            None => self.snapshot(&self.id.revision),
        };
        let has = |name: &str| folder.join(name).is_file();
        (has("config.json") && (has(SINGLE) || has(INDEX))).then_some(folder)
    }

    /// Whether the bytes are there, as many as promised.
    pub(super) fn has_blob(&self, etag: &Etag, size: Option<u64>) -> bool {
        let found = fs::metadata(self.local.blob_path(&etag.0));
        found.is_ok_and(|found| found.is_file() && size.is_none_or(|size| found.len() == size))
    }

    /// Where the bytes are collected while they come.
    pub(super) fn part(&self, etag: &Etag) -> Result<PathBuf> {
        let blob = self.local.blob_path(&etag.0);
        let folder = blob.with_file_name("");
        fs::create_dir_all(&folder).at(&folder)?;
        Ok(blob.with_file_name(format!("{}.part", etag.0)))
    }

    /// Gives the collected bytes their name. They are on the disk first, so that the name never means less.
    pub(super) fn keep(&self, etag: &Etag, part: &Path, file: &File) -> Result<()> {
        file.sync_all().at(part)?;
        let blob = self.local.blob_path(&etag.0);
        fs::rename(part, &blob).at(blob)
    }

    /// Waits until no other process fetches the same bytes. `waiting` is told how many that one has.
    pub(super) fn lock(&self, etag: &Etag, mut waiting: impl FnMut(u64)) -> Result<Option<File>> {
        let folder = self.settings.cache.join(".locks").join(&self.folder);
        fs::create_dir_all(&folder).at(&folder)?;
        let path = folder.join(format!("{}.lock", etag.0));
        let file = open_to_lock(&path).at(&path)?;
        // Ours, and that of Python's tools, which hold the same lock.
        let parts = [self.part(etag)?, self.local.blob_path(&format!("{}.incomplete", etag.0))];
        let patience = self.settings.silence * STANDSTILL;
        let (mut seen, mut since) = (0, Instant::now());
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Some(file)),
                // Some file systems have no locks. The digest of what arrives then has to do.
                Err(TryLockError::Error(_)) => return Ok(None),
                Err(TryLockError::WouldBlock) => {}
            }
            let lengths = parts.iter().map(|part| fs::metadata(part).map_or(0, |part| part.len()));
            let length = lengths.max().unwrap_or(0);
            if length != seen {
                (seen, since) = (length, Instant::now());
                waiting(length);
            } else if since.elapsed() > patience {
                return Err(Error::invalid(format!(
                    "another process is fetching this file, and nothing of it has come for {} s",
                    patience.as_secs_f64()
                ))
                .with_hint("end the other process, or wait until it is done"))
                .at(path);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Puts a file into a commit's folder: a link to its bytes.
    pub(super) fn link(&self, etag: &Etag, commit: &str, name: &str) -> Result<()> {
        let (blob, path) = (self.local.blob_path(&etag.0), self.snapshot(commit).join(name));
        let (folder, base) = (path.with_file_name(""), name.rsplit('/').next().unwrap_or(name));
        fs::create_dir_all(&folder).at(&folder)?;
        // A link is made under another name first, because there may be one that leads nowhere. The name is of this thread
        // alone: several may fetch one model.
        static LINKS: AtomicU64 = AtomicU64::new(0);
        let number = LINKS.fetch_add(1, Ordering::Relaxed);
        let temporary = folder.join(format!(".{base}.{}.{number}.partial", std::process::id()));
        let _ = fs::remove_file(&temporary);
        let up = "../".repeat(2 + name.matches('/').count());
        let relative = Path::new(&up).join("blobs").join(&etag.0);
        #[cfg(unix)]
        let made = std::os::unix::fs::symlink(&relative, &temporary);
        #[cfg(windows)]
        let made = std::os::windows::fs::symlink_file(&relative, &temporary);
        #[cfg(not(any(unix, windows)))]
        let made: std::io::Result<()> = Err(std::io::ErrorKind::Unsupported.into());
        if let Err(error) = made {
            // Windows lets only some users make links.
            if cfg!(unix) {
                return Err(error).at(path);
            }
            fs::copy(blob, &temporary).at(&path)?;
        }
        fs::rename(&temporary, &path).at(path)
    }

    /// Notes the commit of a branch or tag. A commit is its own reference.
    pub(super) fn refer(&self, commit: &str) -> Result<()> {
        if self.id.revision == commit {
            return Ok(());
        }
        let path = self.settings.cache.join(&self.folder).join("refs").join(&self.id.revision);
        write_atomic(path, commit.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_be_paths_are_refused() {
        assert_eq!(Etag::read("W/\"a-b_c.0\"").unwrap(), Etag("a-b_c.0".to_string()));
        let long = "a".repeat(129);
        for etag in ["", "\"\"", ".", "..", ".bashrc", "/etc/x", "a/b", "a\\b", "a b", "a\0", "\u{e4}", &long]
        {
            let error = Etag::read(etag).unwrap_err().to_string();
            assert!(error.contains("cannot be the name of a file"), "{etag}: {error}");
        }
        assert_eq!(Etag::read(&"a".repeat(64)).unwrap().sha256().unwrap().len(), 64);
        assert_eq!(Etag::read(&"g".repeat(64)).unwrap().sha256(), None);
        for name in
            ["", ".", "..", ".x", "a/b", "tokenizer\\..\\x", "tokenizer\0", "tokenizer:x", "a\u{1b}[2J"]
        {
            assert!(check_name(name).is_err(), "{name:?}");
        }
        check_name("model-00001-of-00002.safetensors").unwrap();
        check_name("chat_template (1).jinja").unwrap();
        assert!(is_commit(&"0af".repeat(14)[..40]));
        for commit in ["main", "/x", "", &"0".repeat(39), &"0".repeat(41), &"g".repeat(40)] {
            assert!(!is_commit(commit), "{commit}");
        }
    }
}
