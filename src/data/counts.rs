//! Counts what data sources contain.

use std::path::PathBuf;

use super::source::{Format, Key};
use super::warning::Noticed;

/// Counts what one data source contains.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Counts {
    /// The file.
    pub path: PathBuf,
    /// The format, as given or as told from the first record.
    pub format: Format,
    /// Records in the file.
    pub records: usize,
    /// Documents kept.
    pub rows: usize,
    /// Their tokens.
    pub tokens: usize,
    /// The number of these tokens that are learned.
    pub supervised: usize,
    /// Documents that went through the chat template; the others are plain text.
    pub templated: usize,
    /// Documents that were longer than the maximum, dropped ones included.
    pub truncated: usize,
    /// Documents dropped because truncation left no token to learn.
    pub dropped_by_truncation: usize,
    /// Documents dropped because they never had a token to learn.
    pub dropped_without_labels: usize,
    /// The line of the first dropped document.
    pub first_dropped: Option<usize>,
    /// Documents so long that only their beginning was encoded: their lengths count as that of the beginning.
    pub cut: usize,
    /// Documents of which the chat template leaves out text.
    pub lost: Noticed,
    /// Documents that hold control tokens in what was written, and the first of these tokens.
    pub controls: Noticed,
    /// The control tokens in them.
    pub control_tokens: usize,
    /// The lengths of all documents before truncation.
    pub lengths: Lengths,
    /// Keys of records with text that nothing reads.
    pub unused: Vec<Key>,
    /// Keys that stand more than once in an object of a record.
    pub repeated: Vec<Key>,
    /// Keys that records hand to the chat template, and that it does not read.
    pub unread: Vec<Key>,
}

/// Says how documents became text; prompts to the trained model should have the same layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// Every document went through the chat template.
    Template,
    /// Every document is used as it is.
    Plain,
    /// Some documents went through the chat template and others are used as they are.
    Mixed,
}

impl Layout {
    /// Every layout that there is.
    pub const ALL: [Self; 3] = [Self::Template, Self::Plain, Self::Mixed];

    /// Determines the layout that all documents of these sources have together.
    #[must_use]
    pub fn of(counts: &[Counts]) -> Self {
        let (templated, rows) = counts.iter().fold((0, 0), |(t, r), c| (t + c.templated, r + c.rows));
        match templated {
            0 => Self::Plain,
            all if all == rows => Self::Template,
            _ => Self::Mixed,
        }
    }

    /// The word for it in files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Template => "template",
            Self::Plain => "plain",
            Self::Mixed => "mixed",
        }
    }

    /// Returns the layout with this name; `None` for any other word.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|layout| layout.name() == name)
    }
}

/// Summarizes the lengths of documents in tokens.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Lengths {
    /// Half of them have at most so many.
    pub p50: usize,
    /// 95 of 100 have at most so many.
    pub p95: usize,
    /// The longest.
    pub max: usize,
}

impl Lengths {
    pub(super) fn of(mut lengths: Vec<usize>) -> Self {
        lengths.sort_unstable();
        let at = |share: usize| {
            lengths.get((lengths.len() * share).div_ceil(100).max(1) - 1).copied().unwrap_or(0)
        };
        Self { p50: at(50), p95: at(95), max: at(100) }
    }
}
