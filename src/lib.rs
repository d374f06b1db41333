//! Parameter-efficient fine-tuning on candle.

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
