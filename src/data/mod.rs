//! Text into batches: file -> conversation -> tokens -> row -> batch. Knows tokenizers, never the model.
//!
//! [`Text`] holds the tokenizer and the chat template. [`Dataset::load`] reads the sources of a recipe and turns
//! their records into [`Row`]s; a [`Sampler`] says which of them batch number `n` of the run holds.

mod batch;
mod chance;
mod conversation;
mod dataset;
mod mix;
mod pack;
mod sampler;
mod source;
mod template;
mod text;
mod tokens;

pub use batch::{Batch, Row, eval_batches, fingerprint};
pub use conversation::{Conversation, Message, Role};
pub use dataset::{Counts, Dataset, Lengths, Preparation, Warning, load, preview};
pub use mix::Part;
pub use sampler::{Order, Sampler};
pub use source::{Format, Record, Source, read};
pub use text::{DecodeStream, TemplateParts, Text};

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
