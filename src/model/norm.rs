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

    pub(super) fn backward(
        &self,
        saved: &rms_norm::Saved,
        dy: &Tensor,
        gradients: &mut Gradients,
    ) -> Result<Tensor> {
        rms_norm::backward(saved, &self.weight, self.eps, dy, gradients)
    }
}
