//! A data file: its format, its records, and the first of them.

use std::fmt::{self, Display};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::row;
use crate::data::{self, Conversation, Format, Key, Message, Record, Records};
use crate::error::Result;
use crate::run::figures::count;

/// What there is to know of a data file without a tokenizer.
#[derive(Debug, Serialize)]
pub(super) struct Data {
    path: PathBuf,
    format: Format,
    records: usize,
    /// Messages of all records together.
    messages: usize,
    characters: Characters,
    /// Keys with text that nothing reads.
    unused: Vec<Key>,
    /// Keys that stand more than once in an object of a record.
    repeated: Vec<Key>,
    /// Who says what in the first record.
    first: Vec<Said>,
}

/// How long records are.
#[derive(Debug, Serialize)]
struct Characters {
    mean: usize,
    max: usize,
    /// The line of the longest record.
    longest_line: usize,
}

/// A part of a record.
#[derive(Debug, Serialize)]
struct Said {
    role: &'static str,
    content: String,
}

impl Data {
    pub(super) fn read(path: &Path) -> Result<Self> {
        let Records { records, format, unused, repeated } = data::read(path, Format::Auto)?;
        let parts: Vec<Vec<Said>> = records.iter().map(said).collect();
        let lengths: Vec<usize> =
            parts.iter().map(|said| said.iter().map(|part| part.content.chars().count()).sum()).collect();
        let longest = lengths.iter().enumerate().max_by_key(|(_, length)| **length);
        Ok(Self {
            path: path.to_path_buf(),
            format,
            records: records.len(),
            messages: parts.iter().map(Vec::len).sum(),
            characters: Characters {
                mean: lengths.iter().sum::<usize>().checked_div(lengths.len()).unwrap_or(0),
                max: longest.map_or(0, |(_, length)| *length),
                longest_line: longest.map_or(0, |(index, _)| records[index].line),
            },
            unused,
            repeated,
            first: parts.into_iter().next().unwrap_or_default(),
        })
    }
}

fn said(record: &Record) -> Vec<Said> {
    let part = |role, content: &str| Said { role, content: content.to_string() };
    match &record.conversation {
        Conversation::Chat { messages, .. } => messages
            .iter()
            .map(|Message { role, content, .. }| part(role.name(), content.as_deref().unwrap_or("")))
            .collect(),
        Conversation::PromptCompletion { prompt, completion } => {
            vec![part("prompt", prompt), part("completion", completion)]
        }
        Conversation::Text(text) => vec![part("text", text)],
    }
}

impl Display for Data {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Characters { mean, max, longest_line } = &self.characters;
        row(f, "data", self.path.display())?;
        row(f, "format", self.format.name())?;
        row(f, "records", count(self.records as u64))?;
        row(f, "messages", count(self.messages as u64))?;
        let (mean, max) = (count(*mean as u64), count(*max as u64));
        row(f, "characters", format_args!("{mean} on average, {max} at most (line {longest_line})"))?;
        for (what, keys) in [("not used", &self.unused), ("repeated", &self.repeated)] {
            for Key { key, records, line } in keys {
                let records = count(*records as u64);
                row(f, what, format_args!("`{key}` of {records} records (the first in line {line})"))?;
            }
        }
        for Said { role, content } in &self.first {
            row(f, role, content.trim())?;
        }
        Ok(())
    }
}
