//! Parameter-efficient fine-tuning on [candle](candle_core): pretrained weights are loaded and frozen, small low-rank
//! adapters are trained beside them, and folded back. Reads and writes what Hugging Face's tools read and write.
//!
//! The shortest way is the one the program takes: a plan, made in code or from a recipe, becomes a run.
//!
//! ```no_run
//! use std::sync::atomic::AtomicBool;
//!
//! use peft::recipe::Plan;
//! use peft::run::finetune;
//! use peft::train::{Event, Reporter};
//!
//! struct Silent;
//! impl Reporter for Silent {
//!     fn report(&mut self, _: &Event) {}
//! }
//!
//! let plan = Plan::finetune("examples/tiny-llama").rank(16).data("datasets/quickstart.jsonl").build()?;
//! let summary = finetune(&plan, false, &AtomicBool::new(false), &mut Silent)?;
//! println!("{:?}", summary.last_eval_loss);
//! # Ok::<(), peft::Error>(())
//! ```
//!
//! The programs in `examples/` are to be read: `01_finetune` is such a run, `02_merge` folds an adapter into its model, `03_upcycle`
//! turns a dense model into a mixture of experts, and `04_own_loop` is a training loop by hand.
//!
//! The rooms, and what flows between them:
//!
//! ```text
//! data     file -> conversation -> tokens -> row -> batch ─────────────────┐
//! weights  folder | GGUF file | Hub id ─> model: family(config) -> decoder │
//! adapter  configuration -> attach to the decoder -> trainables            │
//!                            events -> reporter <── train <────────────────┘ ─> checkpoint, adapter
//! merge    weights + adapter -> tensor by tensor -> weights
//! upcycle  dense weights + calibration text -> experts and routers -> weights
//! ```
//!
//! [`ops`] holds the arithmetic, each operation a forward and the backward that belongs to it; [`model`] composes them;
//! [`recipe`] is the text of an experiment, and [`run`] does its work; [`cli`] alone knows the terminal. [`generate`] and
//! [`eval`] use a decoder without training it.

pub mod adapter;
#[cfg(feature = "cli")]
pub mod cli;
pub mod data;
pub mod error;
pub mod eval;
pub mod generate;
pub mod merge;
pub mod model;
pub mod ops;
pub mod recipe;
pub mod run;
pub mod train;
pub mod upcycle;
pub mod weights;

pub use error::{Error, Result};
