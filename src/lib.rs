//! Parameter-efficient fine-tuning on candle.
//!
//! ```text
//! recipe.toml + overrides -> Recipe -> Plan
//!    data:    file -> Conversation -> Tokens -> Row -> Batch ─────────────────┐
//!    weights: folder | gguf | hub id -> family(config) -> Decoder             │
//!    adapter: LoraConfig -> attach(&mut model) -> trainable, sorted by name   │
//!                           Event -> Reporter <── train::run <────────────────┘ -> checkpoint, PEFT's files
//! merge:      weights + adapter -> fold, tensor by tensor -> weights
//! ```
//!
//! | room | what it does | may use |
//! |---|---|---|
//! | [`error`] | the one error of all rooms | |
//! | [`ops`] | what training spends its time in, each a forward and a backward | |
//! | [`weights`] | folders, GGUF files and Hub ids: lazy reads, atomic writes | |
//! | [`data`] | files to batches; knows tokenizers, never the model | |
//! | [`model`] | one decoder for all families | ops, weights |
//! | [`adapter`] | adapters as something done to a model, and PEFT's files | model, ops, weights |
//! | [`eval`] | how well a model predicts | model, data, ops |
//! | [`generate`] | cached decoding and sampling | model, data |
//! | [`train`] | the loop, the optimizer, checkpoints | model, adapter, eval, data, ops, weights |
//! | [`merge`](mod@merge) | adapters folded into weights | model, adapter, weights |
//! | [`recipe`] | text to plan to run | all above |
//! | [`cli`] | the command line, the only room that prints | all |

pub mod adapter;
pub mod cli;
pub mod data;
pub mod error;
pub mod eval;
pub mod generate;
pub mod merge;
pub mod model;
pub mod ops;
pub mod recipe;
pub mod train;
pub mod weights;

pub use error::{Error, Result};
