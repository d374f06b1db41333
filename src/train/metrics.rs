//! `metrics.jsonl`: a line per step and per evaluation.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;

use crate::error::{Context, Result};
use crate::weights::write_atomic;

/// The file in a run folder.
pub(super) const FILE: &str = "metrics.jsonl";

/// The file, open for appending.
#[derive(Debug)]
pub(super) struct Metrics {
    path: PathBuf,
    file: File,
}

impl Metrics {
    /// Opens the file of a run that stands after `step`; lines of later steps, which are made again, are taken out.
    pub(super) fn open(output: &Path, step: u64) -> Result<Self> {
        let path = output.join(FILE);
        if path.exists() {
            let earlier = std::fs::read_to_string(&path).at(&path)?;
            let kept: String =
                earlier.lines().filter(|line| is_until(line, step)).fold(String::new(), |mut kept, line| {
                    kept.push_str(line);
                    kept.push('\n');
                    kept
                });
            write_atomic(&path, kept.as_bytes())?;
        }
        let file = OpenOptions::new().create(true).append(true).open(&path).at(&path)?;
        Ok(Self { path, file })
    }

    pub(super) fn append(&mut self, line: &impl Serialize) -> Result<()> {
        let mut text = serde_json::to_string(line)?;
        text.push('\n');
        self.file.write_all(text.as_bytes()).at(&self.path)
    }

    /// Makes the lines so far durable: a checkpoint must not outlive the lines of its steps.
    pub(super) fn sync(&self) -> Result<()> {
        self.file.sync_data().at(&self.path)
    }
}

/// Whether a line belongs to the steps up to `step`; a line cut off by a crash does not.
fn is_until(line: &str, step: u64) -> bool {
    let parsed: Option<Value> = serde_json::from_str(line).ok();
    parsed.and_then(|value| value.get("step")?.as_u64()).is_some_and(|found| found <= step && step > 0)
}
