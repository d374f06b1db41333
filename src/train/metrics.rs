//! `metrics.jsonl`: a line per step and per evaluation.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;

use crate::error::{Context, Result, read_regular};
use crate::weights::output::OpenPath;
use crate::weights::write_atomic;

/// The file in a run folder.
pub(super) const FILE: &str = "metrics.jsonl";

/// No run has more bytes of metrics than this: 4 GiB.
const LARGEST: u64 = 1 << 32;

/// The file, open for appending.
#[derive(Debug)]
pub(super) struct Metrics {
    path: PathBuf,
    file: File,
    /// The run directory, which somebody may move while the run goes on.
    folder: OpenPath,
    /// The file itself, which an editor replaces when it saves.
    opened: OpenPath,
    /// Lines that could not be read and were left out, counted from one.
    pub(super) unreadable: Vec<usize>,
}

impl Metrics {
    /// Opens the file of a run that stands after `step`; lines of later steps, which are made again, are taken out, and so
    /// are lines that cannot be read.
    pub(super) fn open(output: &Path, step: u64) -> Result<Self> {
        let path = output.join(FILE);
        let mut unreadable = Vec::new();
        if path.exists() {
            let earlier = read_regular(&path, LARGEST).at(&path)?;
            let mut kept = Vec::new();
            for (index, line) in earlier.split_inclusive(|byte| *byte == b'\n').enumerate() {
                match step_of(line) {
                    Some(found) if found <= step && step > 0 => kept.extend(line),
                    Some(_) => {}
                    // A process that was killed leaves half a line at the end.
                    None if !line.ends_with(b"\n") => {}
                    None => unreadable.push(index + 1),
                }
            }
            write_atomic(&path, &kept)?;
        }
        let file = OpenOptions::new().create(true).append(true).open(&path).at(&path)?;
        let (folder, opened) = (OpenPath::of(output), OpenPath::of(&path));
        Ok(Self { path, file, folder, opened, unreadable })
    }

    pub(super) fn append(&mut self, line: &impl Serialize) -> Result<()> {
        if self.opened.refuse_moved().is_err() && self.folder.refuse_moved().is_ok() {
            self.file = OpenOptions::new().create(true).append(true).open(&self.path).at(&self.path)?;
            self.opened = OpenPath::of(&self.path);
        }
        let mut text = serde_json::to_string(line)?;
        text.push('\n');
        self.file.write_all(text.as_bytes()).at(&self.path)
    }

    /// Makes the lines so far durable: a checkpoint must not outlive the lines of its steps.
    pub(super) fn sync(&self) -> Result<()> {
        self.file.sync_data().at(&self.path)
    }

    /// Refuses to save anything when the run directory was removed or renamed.
    pub(super) fn refuse_moved(&self) -> Result<()> {
        self.folder.refuse_moved()
    }
}

/// The step that a line is of.
fn step_of(line: &[u8]) -> Option<u64> {
    serde_json::from_slice::<Value>(line).ok()?.get("step")?.as_u64()
}
