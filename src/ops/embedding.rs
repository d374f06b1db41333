//! Embedding: `y[t] = weight[ids[t]]`, `weight` is `[vocab, d]`. Of a quantized weight only these rows are dequantized.

use candle_core::{DType, Tensor};

use super::{Gradients, Weight};
use crate::error::Result;

/// `[tokens, d]`. The backward needs `ids` only.
pub fn forward(ids: &Tensor, weight: &Weight) -> Result<Tensor> {
    match weight {
        Weight::Dense(parameter) => Ok(parameter.tensor().index_select(ids, 0)?),
        Weight::Quantized(quantized) => quantized.select(&ids.to_vec1()?),
    }
}

/// Adds `dy` to the rows of the weight's gradient that were looked up, when it is wanted.
pub fn backward(ids: &Tensor, weight: &Weight, dy: &Tensor, gradients: &mut Gradients) -> Result<()> {
    let Some(weight) = gradients.wanted(weight) else { return Ok(()) };
    let zeros = Tensor::zeros(weight.tensor().dims(), DType::F32, dy.device())?;
    let rows = zeros.index_add(ids, &dy.to_dtype(DType::F32)?, 0)?;
    drop(zeros);
    gradients.add(weight, &rows)
}
