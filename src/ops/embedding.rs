//! Embedding: `y[t] = weight[ids[t]]`, `weight` is `[vocab, d]`.

use candle_core::{DType, Tensor};

use super::{Gradients, Parameter};
use crate::error::Result;

/// `[tokens, d]`. The backward needs `ids` only.
pub fn forward(ids: &Tensor, weight: &Parameter) -> Result<Tensor> {
    Ok(weight.tensor().index_select(ids, 0)?)
}

/// Adds `dy` to the rows of the weight's gradient that were looked up, when it is wanted.
pub fn backward(ids: &Tensor, weight: &Parameter, dy: &Tensor, gradients: &mut Gradients) -> Result<()> {
    if !gradients.wants(weight) {
        return Ok(());
    }
    let zeros = Tensor::zeros(weight.tensor().dims(), DType::F32, dy.device())?;
    gradients.add(weight, &zeros.index_add(ids, &dy.to_dtype(DType::F32)?, 0)?)
}
