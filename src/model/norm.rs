//! A norm of the model: its weight and epsilon.

use candle_core::Tensor;

use crate::error::Result;
use crate::ops::{Gradients, Parameter, rms_norm};

/// RMSNorm over the last dimension.
#[derive(Debug, Clone)]
pub(super) struct Norm {
    pub(super) weight: Parameter,
    pub(super) eps: f64,
}

impl Norm {
    pub(super) fn forward(&self, x: &Tensor) -> Result<(Tensor, rms_norm::Saved)> {
        rms_norm::forward(x, &self.weight, self.eps)
    }

    /// The norm of `x + delta`: the sum, and the normalised sum.
    pub(super) fn forward_of_sum(
        &self,
        x: &Tensor,
        delta: &Tensor,
    ) -> Result<(Tensor, Tensor, rms_norm::Saved)> {
        rms_norm::forward_of_sum(x, delta, &self.weight, self.eps)
    }

    /// What the forward gave, again.
    pub(super) fn value(&self, saved: &rms_norm::Saved) -> Result<Tensor> {
        rms_norm::value(saved, &self.weight, self.eps)
    }

    /// `residual + dx`, or `dx` alone.
    pub(super) fn backward(
        &self,
        saved: &rms_norm::Saved,
        dy: &Tensor,
        residual: Option<&Tensor>,
        gradients: &mut Gradients,
    ) -> Result<Tensor> {
        rms_norm::backward(saved, &self.weight, self.eps, dy, residual, gradients)
    }
}
