//! Companions of a model's weights: tokenizer, chat templates and generation settings, which go into every copy of it.
//!
//! A copy is often published, so a companion must be a file of the model. A link to somewhere else is refused, since it
//! could put any file of this machine into the result.

use std::path::{Path, PathBuf};

use super::{LARGEST_JSON, LARGEST_TOKENIZER};
use crate::error::{Context, Error, Result, read_regular};

/// Whether a file belongs to a copy of the model with other weights: tokenizer, templates, generation settings.
#[must_use]
pub fn is_companion(name: &str) -> bool {
    const EXACT: [&str; 7] = [
        "generation_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "spiece.model",
    ];
    name.starts_with("tokenizer")
        || name.starts_with("chat_template")
        || name.ends_with(".jinja")
        || EXACT.contains(&name)
}

/// Lists the companions in a folder, sorted. Folders with such a name are none.
pub(super) fn companions(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).at(folder)? {
        let path = entry.at(folder)?.path();
        if !path.is_dir() && path.file_name().and_then(|name| name.to_str()).is_some_and(is_companion) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Reads a companion that is to be copied: it has to be a regular file of this model, and JSON has to parse.
pub(super) fn read(path: &Path) -> Result<Vec<u8>> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let most = if name.starts_with("tokenizer") { LARGEST_TOKENIZER } else { LARGEST_JSON };
    let bytes = read_regular(path, most).at(path)?;
    refuse_foreign(path).at(path)?;
    if name.ends_with(".json") {
        serde_json::from_slice::<serde::de::IgnoredAny>(&bytes).at(path)?;
    }
    Ok(bytes)
}

/// Refuses a link that leads out of the model's folder. In the Hub's cache, the repository's own blobs belong to it.
fn refuse_foreign(path: &Path) -> Result<()> {
    let (Ok(link), Some(folder)) = (std::fs::read_link(path), path.parent()) else { return Ok(()) };
    // A link that leads nowhere is an error when the file is opened.
    let Ok(target) = path.canonicalize() else { return Ok(()) };
    let folder = folder.canonicalize()?;
    let snapshots = folder.parent().filter(|above| above.ends_with("snapshots"));
    let blobs = snapshots.and_then(|snapshots| snapshots.with_file_name("blobs").canonicalize().ok());
    if target.starts_with(&folder) || blobs.is_some_and(|blobs| target.starts_with(blobs)) {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "is a link to `{}`, outside of the model's folder, and would be copied into the result",
        link.display()
    ))
    .with_hint("replace the link with a copy of the file if it belongs to the model, else remove the link"))
}
