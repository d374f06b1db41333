//! Text into batches: file -> conversation -> tokens -> row -> batch. Knows tokenizers, never the model.

use std::path::PathBuf;

/// One document as the model will see it: its tokens, and which of them are to be learned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Token ids; at least two.
    pub tokens: Vec<u32>,
    /// For each token whether the loss counts its prediction (from the tokens before it). The first is never counted.
    pub supervised: Vec<bool>,
    /// The stable number of the document in its data set.
    pub document: u64,
}

/// Documents end to end, without padding: what one forward pass sees.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Batch {
    /// Token ids of all documents.
    pub tokens: Vec<u32>,
    /// As in [`Row`].
    pub supervised: Vec<bool>,
    /// Where each document begins, and the end: `num_documents + 1` entries.
    pub offsets: Vec<usize>,
    /// The stable number of each document.
    pub documents: Vec<u64>,
}

/// A data file of the recipe.
#[derive(Debug, Clone, PartialEq)]
pub struct Source {
    /// A `.jsonl` or `.json` file.
    pub path: PathBuf,
    /// How often each of its documents is seen per epoch: 2 is twice, 0.5 a seeded half.
    pub weight: f64,
    /// What its records look like; `Auto` reads the first.
    pub format: Format,
}

/// What the records of a data file look like.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// Told from the keys of the first record.
    #[default]
    Auto,
    /// `{"messages": [{"role": "user", "content": "…"}, …]}`
    Messages,
    /// `{"instruction": "…", "input": "…", "output": "…"}`
    Alpaca,
    /// `{"prompt": "…", "completion": "…"}`
    PromptCompletion,
    /// `{"text": "…"}`
    Text,
}

/// Which tokens are learned.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TrainOn {
    /// The assistant's tokens and their end token.
    #[default]
    Completion,
    /// Every token but the first of a document.
    All,
}
