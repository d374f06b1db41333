//! Adapters folded into the weights they were trained beside: `W + sum of scale * B A`, tensor by tensor.
//!
//! ```no_run
//! use std::path::Path;
//!
//! use peft::adapter::hf::Adapter;
//! use peft::merge::merge;
//! use peft::model::Pretrained;
//!
//! let model = Pretrained::open("path/to/model")?;
//! let adapter = Adapter::read(Path::new("path/to/adapter"), &candle_core::Device::Cpu)?;
//! let receipt = merge(&model, &[adapter], Path::new("merged"), None, &mut |_| true)?;
//! assert!(receipt.tensors.iter().all(|tensor| tensor.changed > 0));
//! # Ok::<(), peft::Error>(())
//! ```

mod fold;
mod folder;
mod plan;
mod receipt;
mod text;
mod values;

pub use fold::merge;
pub use receipt::{AdapterReceipt, Receipt, TensorReceipt};

/// How far a merge has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Tensors done, written and then verified.
    pub done: usize,
    /// Tensors to write and to verify.
    pub total: usize,
}

/// The file in the merged folder that tells what was done.
pub const RECEIPT_FILE: &str = "merge.json";
