//! A linear layer of the model: `y = x W^T + bias`, and the low-rank term beside it where an adapter put one.

use crate::ops::{LowRank, Parameter, Weight};

/// A linear layer, plain data.
#[derive(Debug, Clone)]
pub struct Linear {
    /// Module path, as Hugging Face has it.
    pub path: String,
    /// `[out, in]`.
    pub weight: Weight,
    /// `[out]`.
    pub bias: Option<Parameter>,
    /// What an adapter adds.
    pub low_rank: Option<LowRank>,
}
