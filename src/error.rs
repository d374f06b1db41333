//! The one error of this crate: what was found, what was expected, where, and what to do.
//!
//! Messages are lower case, without a full stop, names in backticks; a remedy goes into the hint.

mod files;
mod json;

use std::cell::Cell;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::Once;

#[cfg(feature = "cli")]
pub(crate) use files::allocation_may_fail;
pub(crate) use files::{
    is_there, open_regular, open_to_lock, read_regular, read_regular_text, refuse_irregular,
};
pub(crate) use json::Json;

/// The result of everything here that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The most characters of a message or a hint.
const LONGEST: usize = 2000;
/// The most characters of a path or a tensor's name in front of a message.
const LONGEST_NAME: usize = 500;

/// Everything that can go wrong. Values that a message quotes come from files and may be of any length, so long messages
/// lose their middle.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The request itself is wrong: a recipe key, a flag, a path, a target.
    #[error("{}", bounded(message, LONGEST))]
    Request {
        /// What was found and what was expected.
        message: String,
        /// What to do about it.
        hint: Option<String>,
    },
    /// A file or a tensor is not what it has to be.
    #[error("{}", bounded(message, LONGEST))]
    Invalid {
        /// What was found and what was expected.
        message: String,
        /// What to do about it.
        hint: Option<String>,
    },
    /// An error inside a file or folder.
    #[error("{}: {source}", shown(path))]
    At {
        /// The file or folder.
        path: PathBuf,
        /// What went wrong there.
        source: Box<Self>,
    },
    /// An error in one line of a file.
    #[error("{}:{line}: {source}", shown(path))]
    AtLine {
        /// The file.
        path: PathBuf,
        /// Its line, counted from one.
        line: usize,
        /// What went wrong there.
        source: Box<Self>,
    },
    /// An error about one tensor.
    #[error("tensor `{}`: {source}", bounded(name, LONGEST_NAME))]
    InTensor {
        /// The tensor's name as its file has it.
        name: String,
        /// What went wrong with it.
        source: Box<Self>,
    },
    /// Several things are wrong, in the order in which they were found.
    #[error("{}", listed(.0))]
    Several(Vec<Self>),
    /// Reading or writing failed.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// A safetensors file is broken.
    #[error("not a readable safetensors file: {}", bounded(&.0.to_string(), LONGEST))]
    Safetensors(#[from] safetensors::SafeTensorError),
    /// JSON that does not parse.
    #[error("not valid JSON: {}", bounded(&.0.to_string(), LONGEST))]
    Json(#[from] serde_json::Error),
    /// A tensor operation failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// The run was interrupted; what it has done so far is saved.
    #[error("{}", bounded(message, LONGEST))]
    Interrupted {
        /// What was saved and where.
        message: String,
        /// How to go on.
        hint: Option<String>,
    },
}

impl Error {
    /// The request is wrong (exit status 2).
    pub fn request(message: impl Into<String>) -> Self {
        Self::Request { message: message.into(), hint: None }
    }

    /// A file or a tensor is wrong (exit status 1).
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::Invalid { message: message.into(), hint: None }
    }

    /// All of `errors`, of which there is at least one.
    #[must_use]
    pub fn several(mut errors: Vec<Self>) -> Self {
        if errors.len() == 1 { errors.remove(0) } else { Self::Several(errors) }
    }

    /// Each thing that is wrong by itself: the error, or those that it holds.
    #[must_use]
    pub fn each(&self) -> &[Self] {
        match self {
            Self::Several(errors) => errors,
            one => std::slice::from_ref(one),
        }
    }

    /// The same error with a remedy. Errors that wrap another hand it on to the innermost.
    #[must_use]
    pub fn with_hint(mut self, remedy: impl Into<String>) -> Self {
        match &mut self {
            Self::Request { hint, .. } | Self::Invalid { hint, .. } | Self::Interrupted { hint, .. } => {
                *hint = Some(bounded(&remedy.into(), LONGEST));
                self
            }
            Self::At { source, .. } | Self::AtLine { source, .. } | Self::InTensor { source, .. } => {
                let inner = std::mem::replace(&mut **source, Self::request(""));
                **source = inner.with_hint(remedy);
                self
            }
            _ => Self::invalid(self.to_string()).with_hint(remedy),
        }
    }

    /// What to do about it, where there is something to do.
    #[must_use]
    pub fn hint(&self) -> Option<&str> {
        match self {
            Self::Request { hint, .. } | Self::Invalid { hint, .. } | Self::Interrupted { hint, .. } => {
                hint.as_deref()
            }
            Self::At { source, .. } | Self::AtLine { source, .. } | Self::InTensor { source, .. } => {
                source.hint()
            }
            Self::Io(error)
                if matches!(
                    error.kind(),
                    std::io::ErrorKind::StorageFull
                        | std::io::ErrorKind::QuotaExceeded
                        | std::io::ErrorKind::FileTooLarge
                ) =>
            {
                Some("free some space, or choose another output folder with `--output`")
            }
            Self::Io(error) if error.kind() == std::io::ErrorKind::OutOfMemory => Some(
                "free some memory, or raise the limit (`ulimit -v`); training holds less with a lower `train.memory_budget`",
            ),
            Self::Io(error)
                if matches!(
                    error.kind(),
                    std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem
                ) =>
            {
                Some("change the permissions, or choose an output folder that can be written with `--output`")
            }
            _ => None,
        }
    }

    /// The exit status this error stands for: 2 wrong request, 130 interrupted, 1 otherwise.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Request { .. } => 2,
            Self::Interrupted { .. } => 130,
            Self::At { source, .. } | Self::AtLine { source, .. } | Self::InTensor { source, .. } => {
                source.exit_code()
            }
            Self::Several(errors) => errors.first().map_or(1, Self::exit_code),
            _ => 1,
        }
    }
}

/// The messages of errors on a line each, with the remedies between them.
fn listed(errors: &[Error]) -> String {
    let lines = errors.iter().flat_map(|error| {
        let hint = error.hint().map(|hint| format!("hint: {hint}"));
        std::iter::once(error.to_string()).chain(hint)
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// Leaves out the middle of a text that is longer than about `most` characters. What it gives is short enough to stay as it
/// is when it becomes a part of another message.
fn bounded(text: &str, most: usize) -> String {
    let limit = most + 64;
    let count = if text.len() <= limit { text.len() } else { text.chars().count() };
    if count <= limit {
        return text.to_string();
    }
    let start: String = text.chars().take(most / 2).collect();
    let end: String = text.chars().skip(count - most / 2).collect();
    format!("{start} [.. {} characters left out ..] {end}", count - most / 2 * 2)
}

fn shown(path: &Path) -> String {
    match path.as_os_str().is_empty() {
        true => "the path ``".to_string(),
        false => bounded(&path.display().to_string(), LONGEST_NAME),
    }
}

/// The most lines of one kind that are said of a file.
const MOST_LINES: usize = 10;

/// The first lines of many, and one that says how many more of `what` there are.
pub(crate) fn first_lines(mut lines: Vec<String>, what: &str) -> Vec<String> {
    let more = lines.len().saturating_sub(MOST_LINES);
    lines.truncate(MOST_LINES);
    if more > 0 {
        lines.push(format!("and {more} more {what}"));
    }
    lines
}

/// Says where an error happened.
pub trait Context<T> {
    /// In this file or folder.
    fn at(self, path: impl AsRef<Path>) -> Result<T>;
    /// In this line (counted from one) of this file.
    fn at_line(self, path: impl AsRef<Path>, line: usize) -> Result<T>;
    /// In this tensor.
    fn in_tensor(self, name: &str) -> Result<T>;
}

impl<T, E: Into<Error>> Context<T> for Result<T, E> {
    fn at(self, path: impl AsRef<Path>) -> Result<T> {
        self.map_err(|e| Error::At { path: path.as_ref().to_path_buf(), source: Box::new(e.into()) })
    }

    fn at_line(self, path: impl AsRef<Path>, line: usize) -> Result<T> {
        self.map_err(|e| Error::AtLine {
            path: path.as_ref().to_path_buf(),
            line,
            source: Box::new(e.into()),
        })
    }

    fn in_tensor(self, name: &str) -> Result<T> {
        self.map_err(|e| Error::InTensor { name: name.to_string(), source: Box::new(e.into()) })
    }
}

/// The path that is there and spelt most like `wanted`, part by part; its end has to fit.
pub fn nearest_path(wanted: &Path, fits: impl Fn(&Path) -> bool) -> Option<PathBuf> {
    let mut found = PathBuf::new();
    for part in wanted.components() {
        let next = found.join(part);
        if next.exists() {
            found = next;
            continue;
        }
        let folder = if found.as_os_str().is_empty() { Path::new(".") } else { &found };
        let names =
            std::fs::read_dir(folder).ok()?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let names: Vec<String> = names.filter(|name| !name.starts_with('.')).collect();
        let near = nearest(part.as_os_str().to_str()?, names.iter().map(String::as_str), 1);
        found.push(near.first()?);
    }
    Some(found).filter(|path| fits(path))
}

/// Of `candidates`, those nearest to `wanted` in spelling, nearest first, at most `most`.
pub fn nearest<'a>(wanted: &str, candidates: impl IntoIterator<Item = &'a str>, most: usize) -> Vec<&'a str> {
    let mut scored: Vec<(f64, &str)> = candidates
        .into_iter()
        .map(|candidate| (strsim::jaro_winkler(wanted, candidate), candidate))
        .filter(|(score, _)| *score > 0.7)
        .collect();
    scored.sort_by(|x, y| y.0.total_cmp(&x.0).then_with(|| x.1.cmp(y.1)));
    scored.dedup_by(|x, y| x.1 == y.1);
    scored.into_iter().take(most).map(|(_, candidate)| candidate).collect()
}

thread_local! {
    static IS_CAUGHT: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work`, and returns its result or the message of its panic, which is not printed. Some crates panic on
/// malformed files.
pub fn caught<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    static SILENCE: Once = Once::new();

    SILENCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !IS_CAUGHT.get() {
                before(panic);
            }
        }));
    });
    let outer = IS_CAUGHT.replace(true);
    let done = std::panic::catch_unwind(AssertUnwindSafe(work));
    IS_CAUGHT.set(outer);
    done.map_err(|panic| {
        let said =
            panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref().copied());
        said.unwrap_or("it panics").lines().next().unwrap_or_default().to_string()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_values_of_a_file_leave_both_ends_of_a_message() {
        let value = "é".repeat(100_000);
        let message = format!("`model_type` is `{value}`, expected `llama`");
        let text = Err::<(), _>(Error::invalid(&message)).at("config.json").unwrap_err().to_string();
        assert!(text.starts_with("config.json: `model_type` is `éé"), "{text}");
        assert!(text.ends_with("éé`, expected `llama`"), "{text}");
        let left_out = message.chars().count() - LONGEST;
        assert!(text.contains(&format!(" [.. {left_out} characters left out ..] ")), "{text}");

        let json = serde_json::from_str::<bool>(&format!("\"{value}\"")).unwrap_err();
        let wrapped = Err::<(), _>(json).in_tensor(&value).at(&value).unwrap_err();
        assert!(wrapped.to_string().chars().count() < LONGEST + 2 * LONGEST_NAME + 200, "{wrapped}");
        let hint = wrapped.with_hint(&value).hint().map(|hint| hint.chars().count());
        assert!(hint.is_some_and(|count| count < LONGEST + 50), "{hint:?}");
    }

    #[test]
    fn an_empty_path_is_named() {
        let error = Err::<(), _>(Error::request("there is no such file")).at("").unwrap_err();
        assert_eq!(error.to_string(), "the path ``: there is no such file");
    }
}
