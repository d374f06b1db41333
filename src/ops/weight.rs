//! What a linear layer computes with, as plain data: a weight, and a low-rank term beside it.

use std::sync::Arc;

use candle_core::{DType, Tensor};

use super::{Operand, Quantized};

/// A named tensor of the model. Whether it is trained is not its own affair: see [`super::Gradients::wants`].
#[derive(Debug, Clone)]
pub struct Parameter {
    name: Arc<str>,
    tensor: Tensor,
}

impl Parameter {
    /// `name` is the tensor's name in a Hugging Face checkpoint or adapter.
    ///
    /// Of a variable, the storage is shared and the variable's updates are seen, but candle's autograd is kept out: it
    /// would hold every intermediate tensor alive.
    pub fn new(name: impl Into<Arc<str>>, tensor: &Tensor) -> Self {
        Self { name: name.into(), tensor: tensor.detach() }
    }

    /// The tensor's name in a Hugging Face checkpoint or adapter.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The values.
    #[must_use]
    pub fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// Puts other values of the same shape under the same name.
    ///
    /// # Panics
    ///
    /// Where the shape is another one.
    pub fn replace(&mut self, tensor: &Tensor) {
        assert_eq!(self.tensor.shape(), tensor.shape(), "the shape of `{}`", self.name);
        self.tensor = tensor.detach();
    }
}

/// The weight of a linear layer, `[out, in]`.
#[derive(Debug, Clone)]
pub enum Weight {
    /// Plain values in the compute type.
    Dense(Parameter),
    /// Quantized values, which are never trained.
    Quantized(Quantized),
}

impl Weight {
    /// `(out, in)`.
    pub fn dims(&self) -> candle_core::Result<(usize, usize)> {
        match self {
            Self::Dense(parameter) => parameter.tensor().dims2(),
            Self::Quantized(quantized) => Ok(quantized.dims()),
        }
    }

    /// The type that products with it are computed in.
    #[must_use]
    pub fn dtype(&self) -> DType {
        match self {
            Self::Dense(parameter) => parameter.tensor().dtype(),
            Self::Quantized(quantized) => quantized.dtype(),
        }
    }

    /// The tensor's name in a Hugging Face checkpoint.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Dense(parameter) => parameter.name(),
            Self::Quantized(quantized) => quantized.name(),
        }
    }

    /// Its plain values, which training may change.
    #[must_use]
    pub fn parameter(&self) -> Option<&Parameter> {
        match self {
            Self::Dense(parameter) => Some(parameter),
            Self::Quantized(_) => None,
        }
    }

    /// As [`Self::parameter`].
    pub fn parameter_mut(&mut self) -> Option<&mut Parameter> {
        match self {
            Self::Dense(parameter) => Some(parameter),
            Self::Quantized(_) => None,
        }
    }

    /// With rows and columns exchanged, as the right side of a product.
    #[must_use]
    pub fn t(&self) -> Operand<'_> {
        Operand::from(self).t()
    }
}

/// A low-rank term beside a weight: `y += scale * (dropout(x) A^T B^T + bias)`, values in f32.
#[derive(Debug, Clone)]
pub struct LowRank {
    /// `[rank, in]`.
    pub a: Parameter,
    /// `[out, rank]`.
    pub b: Parameter,
    /// `[out]`, inside the scale (PEFT's `lora_bias`).
    pub bias: Option<Parameter>,
    /// `alpha / rank`, or `alpha / sqrt(rank)`.
    pub scale: f64,
    /// What happens to `x` in training.
    pub dropout: Dropout,
}

impl LowRank {
    /// Rows of `A`.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.a.tensor().dims()[0]
    }
}

/// Inverted dropout: each value is zero with probability `probability`, else divided by `1 - probability`.
///
/// The mask is a pure function of seed, step, module, document, position and column.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// Probability that a value is dropped; 0 leaves all as it is.
    pub probability: f64,
    /// The run's dropout seed.
    pub seed: u64,
    /// The number of the module among all linear layers of the model, in the order of their paths.
    pub module: u64,
}

impl Dropout {
    /// No dropout.
    pub const NONE: Self = Self { probability: 0.0, seed: 0, module: 0 };
}
