//! Companions of a model's weights: tokenizer, chat templates and generation settings, which go into every copy of it.
//!
//! A copy is often published, so a companion must be a file of the model. A link to somewhere else is refused, since it
//! could put any file of this machine into the result.

use std::path::{Path, PathBuf};

use super::{LARGEST_JSON, LARGEST_TOKENIZER};
use crate::error::{Context, Error, Result, is_there, read_regular};

/// The folder of chat templates beside the default, by their names. transformers saves them there.
pub const TEMPLATES: &str = "additional_chat_templates";

/// The most chat templates beside the default; published models have one or two.
const MOST_TEMPLATES: usize = 64;

/// The most bytes of a chat template; those of published models have some tens of thousands.
pub(super) const LONGEST_TEMPLATE: u64 = 1 << 20;

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

/// The name of a file that holds a chat template beside the default, written as its path in the model's folder.
#[cfg(feature = "hub")]
pub(super) fn template_name(path: &str) -> Option<&str> {
    let name = path.strip_prefix(TEMPLATES)?.strip_prefix('/')?;
    (name.ends_with(".jinja") && !name.contains('/')).then_some(name)
}

/// Lists the companions in a folder, sorted. Folders with such a name are none, but for that of further chat templates.
pub(super) fn companions(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = files_of(folder, is_companion)?;
    files.extend(further_templates(&folder.join(TEMPLATES))?);
    Ok(files)
}

/// Lists the files in the folder of further chat templates, sorted; none where there is no such folder.
fn further_templates(templates: &Path) -> Result<Vec<PathBuf>> {
    if !is_there(templates) {
        return Ok(Vec::new());
    }
    let files = files_of(templates, |name| name.ends_with(".jinja"))?;
    if files.len() > MOST_TEMPLATES {
        let found = files.len();
        return Err(Error::invalid(format!(
            "holds {found} chat templates, expected at most {MOST_TEMPLATES}"
        ))
        .with_hint("leave those that the model needs; conversations with tools take `tool_use.jinja`"))
        .at(templates);
    }
    Ok(files)
}

/// Lists the names of the further chat templates, sorted.
pub(super) fn names_of_templates(templates: &Path) -> Result<Vec<String>> {
    let name = |path: &PathBuf| Some(path.file_stem()?.to_str()?.to_string());
    Ok(further_templates(templates)?.iter().filter_map(name).collect())
}

fn files_of(folder: &Path, belongs: impl Fn(&str) -> bool) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).at(folder)? {
        let path = entry.at(folder)?.path();
        if !path.is_dir() && path.file_name().and_then(|name| name.to_str()).is_some_and(&belongs) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Reads a companion of the model in `folder` that is to be copied: it has to be a regular file of this model, and JSON
/// has to parse.
pub(super) fn read(path: &Path, folder: &Path) -> Result<Vec<u8>> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let most = match path.parent() {
        Some(parent) if parent != folder => LONGEST_TEMPLATE,
        _ if name.starts_with("tokenizer") => LARGEST_TOKENIZER,
        _ => LARGEST_JSON,
    };
    let bytes = read_regular(path, most).at(path)?;
    refuse_foreign(path, folder).at(path)?;
    if name.ends_with(".json") {
        serde_json::from_slice::<serde::de::IgnoredAny>(&bytes).at(path)?;
    }
    Ok(bytes)
}

/// Copies the companions of the model in `folder` into another one, byte for byte.
pub(super) fn copy(folder: &Path, target: &Path) -> Result<()> {
    companions(folder)?.iter().try_for_each(|path| copy_file(path, folder, target))
}

/// Copies a companion of the model in `folder` to its place in another folder.
pub(super) fn copy_file(path: &Path, folder: &Path, target: &Path) -> Result<()> {
    let bytes = read(path, folder)?;
    let copy = target.join(path.strip_prefix(folder).unwrap_or(path));
    if let Some(parent) = copy.parent().filter(|parent| *parent != target) {
        std::fs::create_dir_all(parent).at(parent)?;
    }
    // Not `fs::copy`, which would follow any link, and make a read-only copy of a read-only file.
    std::fs::write(&copy, bytes).at(&copy)
}

/// Refuses a link that leads out of the folder of a model or an adapter. In the Hub's cache, the repository's own blobs belong to it.
fn refuse_foreign(path: &Path, folder: &Path) -> Result<()> {
    // A link that leads nowhere is an error when the file is opened.
    let Ok(target) = path.canonicalize() else { return Ok(()) };
    let folder = folder.canonicalize()?;
    let snapshots = folder.parent().filter(|above| above.ends_with("snapshots"));
    let blobs = snapshots.and_then(|snapshots| snapshots.with_file_name("blobs").canonicalize().ok());
    if target.starts_with(&folder) || blobs.is_some_and(|blobs| target.starts_with(blobs)) {
        return Ok(());
    }
    let link = std::fs::read_link(path).unwrap_or(target);
    Err(Error::invalid(format!(
        "is a link to `{}`, outside of its folder, and would be copied into the result",
        link.display()
    ))
    .with_hint("replace the link with a copy of the file if it belongs there, else remove the link"))
}
