//! `trainer_state.json`: where a run stands, and digests by which a checkpoint that changed on disk is found.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::identity::Identity;
use crate::error::{Context, Error, Result, open_regular, read_regular};
use crate::weights::{TEMPLATES, hexadecimal, is_companion, write_atomic};

/// No record of a run has more bytes than this.
const LARGEST: u64 = 16 << 20;

/// The folder of the best evaluation.
pub const BEST: &str = "best";

/// The file in the folder of a checkpoint.
pub(super) const FILE: &str = "trainer_state.json";

/// The optimizer's state in the folder of a checkpoint. Its header repeats the identity of the run.
pub(super) const OPTIMIZER: &str = "optimizer.safetensors";

/// The identity is under this key in both files, as it was when it was one digest.
pub(super) const IDENTITY: &str = "fingerprint";

/// Files of an adapter or a model, beside its shards and companions.
const RESULTS: [&str; 6] = [
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
];

/// Files that desktops leave in each folder that somebody looks into; nobody misses them.
const OF_SYSTEMS: [&str; 3] = [".DS_Store", "Thumbs.db", "desktop.ini"];

/// Bytes of a file that are read at once.
const PART: usize = 1 << 20;

/// Where a run stands.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TrainerState {
    /// Updates made.
    pub step: u64,
    /// Tokens seen.
    pub tokens: u64,
    /// Of these tokens, so many carried a label.
    pub supervised_tokens: u64,
    /// The loss on the evaluation data before the first step.
    pub first_eval_loss: Option<f64>,
    /// The evaluation with the lowest loss.
    pub best: Option<Best>,
    /// The most tokens that are computed at once, as the run began with: another cut would round sums otherwise, and the
    /// memory that it was chosen for may be another when the run goes on.
    pub piece_tokens: usize,
    /// What must not change when the run continues: data, weights and settings.
    #[serde(rename = "fingerprint")]
    pub identity: Identity,
    /// The instructions that the run was computed with, which decide its last bits; earlier versions wrote none.
    #[serde(default)]
    pub kernel: String,
}

/// The best evaluation of a run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// After so many updates.
    pub step: u64,
    /// Mean loss per labelled token.
    pub eval_loss: f64,
}

/// Holds the contents of a checkpoint's record file.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Record {
    #[serde(flatten)]
    pub(super) state: TrainerState,
    /// SHA-256 of the other files of the checkpoint by their paths from there; earlier versions wrote none.
    #[serde(default)]
    files: BTreeMap<String, String>,
    /// Whether `files` has the further chat templates too; records of earlier builds left them out.
    #[serde(default)]
    lists_templates: bool,
    /// SHA-256 of the text of this file with an empty string in this place.
    #[serde(default)]
    sha256: String,
}

impl Record {
    /// Writes the record of a checkpoint whose other files are in `folder`.
    pub(super) fn write(state: &TrainerState, folder: &Path) -> Result<()> {
        let files = digests(folder)?;
        let record = Self { state: state.clone(), files, lists_templates: true, sha256: String::new() };
        let text = serde_json::to_string_pretty(&record)?;
        let digest = hexadecimal(&Sha256::digest(&text));
        let text = serde_json::to_string_pretty(&Self { sha256: digest, ..record })?;
        write_atomic(folder.join(FILE), text.as_bytes())
    }

    /// Reads the record in `folder` and finds out whether it is as it was written.
    pub(super) fn read(folder: &Path) -> Result<Self> {
        if fs::read_dir(folder).at(folder)?.next().is_none() {
            return Err(Error::invalid("is empty")).at(folder);
        }
        let path = folder.join(FILE);
        if !path.is_file() {
            return Err(Error::invalid(format!("has no `{FILE}`"))).at(folder);
        }
        let text = read_regular(&path, LARGEST).at(&path)?;
        let text = String::from_utf8(text).map_err(|_| Error::invalid("is not valid UTF-8")).at(&path)?;
        let record: Self = serde_json::from_str(&text).at(&path)?;
        record.verify_itself(&text).at(&path)?;
        Ok(record)
    }

    fn verify_itself(&self, text: &str) -> Result<()> {
        let is_as_written = match text.rfind(&self.sha256) {
            // Earlier versions knew no digests.
            _ if self.sha256.is_empty() => self.files.is_empty(),
            None => false,
            Some(at) => {
                let end = at + self.sha256.len();
                hexadecimal(&Sha256::digest(format!("{}{}", &text[..at], &text[end..]))) == self.sha256
            }
        };
        if !is_as_written {
            return Err(Error::invalid("was changed after it was written: its SHA-256 is another"));
        }
        match self.state.piece_tokens {
            0 => Err(Error::invalid("`piece_tokens` is 0, expected a whole number above 0")),
            _ => Ok(()),
        }
    }

    /// Finds out whether the other files in `folder` are as they were written.
    pub(super) fn verify_files(&self, folder: &Path) -> Result<()> {
        self.files.par_iter().try_for_each(|(name, digest)| {
            let path = folder.join(name);
            if !path.is_file() {
                return Err(Error::invalid("is missing")).at(&path);
            }
            if digest_of(&path)? == *digest {
                return Ok(());
            }
            Err(Error::invalid("was changed after it was written: its SHA-256 is another")).at(&path)
        })
    }
}

/// The identity that the record in `folder` holds, whatever else became of it.
pub(super) fn identity(folder: &Path) -> Option<Identity> {
    serde_json::from_value(parsed(folder)?.get(IDENTITY)?.clone()).ok()
}

/// The record in `folder` as JSON, whether it is as it was written or not.
fn parsed(folder: &Path) -> Option<Value> {
    serde_json::from_slice(&read_regular(&folder.join(FILE), LARGEST).ok()?).ok()
}

/// Whether a run writes a file or folder of this name into its result.
#[must_use]
pub fn is_result(name: &str) -> bool {
    let is_shard = name.starts_with("model-") && name.ends_with(".safetensors");
    is_shard || RESULTS.contains(&name) || is_companion(name) || name == TEMPLATES
}

/// Whether a run writes a file of this path into a checkpoint, its record left out.
fn is_written(path: &str) -> bool {
    match path.split_once('/') {
        None => path == OPTIMIZER || (is_result(path) && path != TEMPLATES),
        Some((_, template)) => template.ends_with(".jinja"),
    }
}

/// Lists what this program did not write into `folder`, as paths from there. Where its record names no files, their names
/// tell.
pub(super) fn strangers(folder: &Path) -> Result<Vec<PathBuf>> {
    let record = parsed(folder);
    let field = |key: &str| record.as_ref().and_then(|record| record.get(key));
    let files = field("files").and_then(Value::as_object);
    let lists_templates = field("lists_templates") == Some(&Value::Bool(true));
    let is_ours = |path: &str| match files {
        _ if [FILE, OPTIMIZER].contains(&path) => true,
        Some(files) if lists_templates || !path.contains('/') => files.contains_key(path),
        _ => is_written(path),
    };
    let is_of_system =
        |path: &Path| path.file_name().and_then(OsStr::to_str).is_some_and(|name| OF_SYSTEMS.contains(&name));
    let mut strangers = entries(folder)?;
    strangers.retain(|path| !is_of_system(path) && !path.to_str().is_some_and(is_ours));
    Ok(strangers)
}

/// Lists the files of the result in `folder`, as sorted paths from there: what the run wrote into it but for its record.
pub(super) fn results(folder: &Path) -> Result<Vec<PathBuf>> {
    let (mut files, strangers) = (entries(folder)?, strangers(folder)?);
    files.retain(|path| !strangers.contains(path) && path != Path::new(FILE) && folder.join(path).is_file());
    Ok(files)
}

/// Lists what is in `folder`, as sorted paths from there. The folder of further chat templates is the only one that a run
/// writes, so each file in it is listed instead.
fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).at(folder)? {
        let entry = entry.at(folder)?;
        let name = entry.file_name();
        let templates = if name == TEMPLATES && entry.file_type().at(folder)?.is_dir() {
            // One that cannot be looked into counts as what others made.
            fs::read_dir(entry.path()).and_then(Iterator::collect::<std::io::Result<Vec<_>>>).ok()
        } else {
            None
        };
        match templates {
            None => paths.push(PathBuf::from(name)),
            // Records have this separator on every system.
            Some(templates) => paths.extend(
                templates.iter().map(|entry| Path::new(&format!("{TEMPLATES}/")).join(entry.file_name())),
            ),
        }
    }
    paths.sort();
    Ok(paths)
}

/// SHA-256 of the files that the run wrote into `folder`, as its record has them. A record that has none is of version
/// 0.1.0; then what is there is read.
pub(super) fn recorded_digests(folder: &Path) -> Result<Vec<String>> {
    let record = parsed(folder);
    match record.as_ref().and_then(|record| record.get("files")?.as_object()) {
        Some(files) => Ok(files.values().filter_map(|digest| Some(digest.as_str()?.to_string())).collect()),
        None => Ok(digests(folder)?.into_values().collect()),
    }
}

/// Whether `folder` is of the run with this identity. Where its record cannot be read, the optimizer's header tells.
pub(super) fn is_of(folder: &Path, run: &Identity) -> bool {
    identity(folder).or_else(|| identity_of_optimizer(folder)).is_some_and(|found| found.is_same(run))
}

/// The identity in the header of the optimizer's state; earlier versions wrote none.
fn identity_of_optimizer(folder: &Path) -> Option<Identity> {
    let path = folder.join(OPTIMIZER);
    // Opening anything but a regular file may wait for ever.
    if !fs::metadata(&path).ok()?.is_file() {
        return None;
    }
    let mut file = File::open(&path).ok()?;
    let mut length = [0; 8];
    file.read_exact(&mut length).ok()?;
    let length = u64::from_le_bytes(length);
    if length > LARGEST {
        return None;
    }
    let mut header = vec![0; length as usize];
    file.read_exact(&mut header).ok()?;
    let header: Value = serde_json::from_slice(&header).ok()?;
    Identity::parse(header.get("__metadata__")?.get(IDENTITY)?.as_str()?)
}

/// Whether a folder of the name of a checkpoint shows no sign of this program. Other trainers use the same names.
pub(super) fn is_foreign(folder: &Path) -> bool {
    let Ok(mut entries) = fs::read_dir(folder) else { return true };
    if entries.next().is_none() || folder.join(OPTIMIZER).is_file() {
        return false;
    }
    match read_regular(&folder.join(FILE), LARGEST) {
        Err(_) => true,
        Ok(text) => serde_json::from_slice::<Value>(&text).is_ok_and(|state| state.get(IDENTITY).is_none()),
    }
}

/// SHA-256 of each file in `folder` that has a path of what a run writes.
fn digests(folder: &Path) -> Result<BTreeMap<String, String>> {
    let is_file = |path: &str| fs::symlink_metadata(folder.join(path)).is_ok_and(|found| found.is_file());
    let paths = entries(folder)?.into_iter().filter_map(|path| Some(path.to_str()?.to_string()));
    paths
        .filter(|path| is_written(path) && is_file(path))
        .collect::<Vec<_>>()
        .into_par_iter()
        .map(|path| {
            let digest = digest_of(&folder.join(&path))?;
            Ok((path, digest))
        })
        .collect()
}

/// SHA-256 of a regular file.
pub fn digest_of(path: &Path) -> Result<String> {
    let mut file = open_regular(path).at(path)?;
    let mut part = vec![0; PART];
    let mut hash = Sha256::new();
    loop {
        match file.read(&mut part).at(path)? {
            0 => return Ok(hexadecimal(&hash.finalize())),
            count => hash.update(&part[..count]),
        }
    }
}
