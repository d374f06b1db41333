//! The feed-forward network of a layer, of either kind.

use candle_core::Tensor;

use super::feed_forward::{self, FeedForward};
use super::linear::Linear;
use super::moe::{self, Moe};
use super::router::{Routing, RoutingGradient};
use crate::error::Result;
use crate::ops::{Gradients, Pass, add};

#[derive(Debug, Clone)]
pub(super) enum Network {
    Dense(Box<FeedForward>),
    Sparse(Box<Moe>),
}

/// What the backward needs.
#[derive(Debug)]
pub(super) enum Saved {
    Dense(feed_forward::Saved),
    Sparse(Box<moe::Saved>),
}

impl Saved {
    pub(super) fn trim(&mut self) {
        match self {
            Self::Dense(saved) => saved.trim(),
            Self::Sparse(saved) => saved.trim(),
        }
    }

    pub(super) fn with_input(&mut self, input: impl FnOnce() -> Result<Tensor>) -> Result<()> {
        match self {
            Self::Dense(saved) => saved.with_input(input),
            Self::Sparse(saved) => saved.with_input(input),
        }
    }
}

impl Network {
    /// `[tokens, hidden] -> [tokens, hidden]`, with `residual` added.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        residual: Option<&Tensor>,
        pass: &Pass<'_>,
    ) -> Result<(Tensor, Option<Routing>, Saved)> {
        match self {
            Self::Dense(network) => {
                let (y, saved) = network.forward(x, pass)?;
                let y = if let Some(residual) = residual { add(residual, &y)? } else { y };
                Ok((y, None, Saved::Dense(saved)))
            }
            Self::Sparse(network) => {
                let (y, routing, saved) = network.forward(x, residual, pass)?;
                Ok((y, Some(routing), Saved::Sparse(Box::new(saved))))
            }
        }
    }

    /// `dx` when `wants_dx`; `of_losses` is what losses on the router add.
    pub(super) fn backward(
        &self,
        saved: Saved,
        pass: &Pass<'_>,
        dy: &Tensor,
        of_losses: Option<&RoutingGradient>,
        wants_dx: bool,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        match (self, saved) {
            (Self::Dense(network), Saved::Dense(saved)) => {
                network.backward(saved, pass, dy, wants_dx, gradients)
            }
            (Self::Sparse(network), Saved::Sparse(saved)) => {
                network.backward(*saved, pass, dy, of_losses, wants_dx, gradients)
            }
            _ => unreachable!("a network's own forward has saved this"),
        }
    }

    /// Whether a gradient of `wanted` is computed from its input.
    pub(super) fn needs_input(&self, wanted: &Gradients) -> bool {
        match self {
            Self::Dense(network) => network.needs_input(wanted),
            Self::Sparse(network) => network.needs_input(wanted),
        }
    }

    /// Whether any of its values is trained.
    pub(super) fn is_trained(&self, gradients: &Gradients) -> bool {
        let of_router = match self {
            Self::Dense(_) => false,
            Self::Sparse(network) => network.router.is_trained(gradients),
        };
        of_router || self.linears().iter().any(|linear| linear.is_trained(gradients))
    }

    pub(super) fn linears(&self) -> Vec<&Linear> {
        match self {
            Self::Dense(network) => network.linears().to_vec(),
            Self::Sparse(network) => network.linears(),
        }
    }

    pub(super) fn linears_mut(&mut self) -> Vec<&mut Linear> {
        match self {
            Self::Dense(network) => network.linears_mut().into_iter().collect(),
            Self::Sparse(network) => network.linears_mut(),
        }
    }
}
