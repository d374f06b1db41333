//! Text into batches: file -> conversation -> tokens -> row -> batch. Knows tokenizers, never the model.
//!
//! [`Text`] holds the tokenizer and the chat template. [`Dataset::load`] reads the sources of a recipe and turns
//! their records into [`Row`]s; a [`Sampler`] says which of them batch number `n` of the run holds.
//!
//! ```
//! use peft::data::{Order, Part, Row, Sampler};
//!
//! let row = |document| Row { tokens: vec![1, 2, 3], supervised: vec![false, true, true], document };
//! let parts = [Part { rows: (0..5).map(row).collect(), weight: 1.0 }];
//! let mut sampler = Sampler::new(&parts, Order { seed: 42, batch_size: 2, pack: false, max_length: 8 });
//! assert_eq!(sampler.batches_in(0), 3);
//! assert_eq!(sampler.batch(0).offsets, [0, 3, 6]);
//! ```

mod batch;
mod chance;
mod chat;
mod container;
mod conversation;
mod counts;
mod dataset;
mod encode;
mod expand;
mod foreign;
mod lost;
mod message;
mod mix;
mod pack;
mod prompts;
mod record;
mod sampler;
mod source;
mod special;
mod stream;
mod template;
mod text;
mod tokens;
mod value;
mod warning;

pub(crate) use chance::{generator, shuffle};

pub use batch::{Batch, Row, eval_batches, fingerprint};
pub use conversation::{Conversation, Message, Role};
pub use counts::{Counts, Layout, Lengths};
pub use dataset::{Dataset, Preparation, load, load_for_perplexity, preview};
pub use foreign::kind_of_file;
pub use mix::Part;
pub use prompts::{Asked, read_prompts};
pub use sampler::{Order, Sampler};
pub use source::{Format, Key, Record, Records, Source, read};
pub use special::SpecialTokens;
pub use stream::DecodeStream;
pub use text::{TemplateParts, Text};
pub use warning::{Noticed, Warning};

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
