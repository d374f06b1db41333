//! A sparse feed-forward network: `sum over the chosen experts of weight * expert(x)`, and the shared expert beside it.
//!
//! Tokens are grouped by expert, so that each expert's products go over the rows that are its own: the cost follows the
//! tokens that are routed, not the experts that there are. `rows` in shapes are pairs of a token and an expert of it.

use candle_core::{DType, Tensor};

use super::feed_forward::{self, FeedForward};
use super::linear::Linear;
use super::router::{self, Router, Routing, RoutingGradient};
use crate::error::Result;
use crate::ops::experts::{self, Expert};
use crate::ops::{Activation, Gradients, Groups, Pass, groups, linear};

/// A router and its experts.
#[derive(Debug, Clone)]
pub(super) struct Moe {
    pub(super) router: Router,
    pub(super) experts: Experts,
    pub(super) shared: Option<Shared>,
}

/// Gated feed-forward networks of one shape.
#[derive(Debug, Clone)]
pub(super) struct Experts {
    /// Each `[width, hidden]`.
    pub(super) gate: Vec<Linear>,
    /// Each `[width, hidden]`.
    pub(super) up: Vec<Linear>,
    /// Each `[hidden, width]`.
    pub(super) down: Vec<Linear>,
    pub(super) activation: Activation,
}

/// The expert of all tokens: `network(x)`, or `sigmoid(gate(x)) * network(x)`.
#[derive(Debug, Clone)]
pub(super) struct Shared {
    pub(super) network: FeedForward,
    /// `[1, hidden]`.
    pub(super) gate: Option<Linear>,
}

/// What the backward needs.
#[derive(Debug)]
pub(super) struct Saved {
    routing: Routing,
    router: router::Saved,
    groups: Groups,
    experts: experts::Saved,
    shared: Option<SavedShared>,
}

#[derive(Debug)]
struct SavedShared {
    network: feed_forward::Saved,
    /// What the gate needs, its logit `[tokens, 1]`, and what the network gave.
    gate: Option<(linear::Saved, Tensor, Tensor)>,
}

impl Saved {
    /// Drops the input, which [`Saved::with_input`] gives again.
    pub(super) fn trim(&mut self) {
        self.router.drop_input();
        self.experts.drop_input();
        if let Some(shared) = &mut self.shared {
            shared.network.trim();
            if let Some((gate, _, _)) = &mut shared.gate {
                gate.drop_input();
            }
        }
    }

    /// Gives the input again, if it was dropped.
    pub(super) fn with_input(&mut self, input: impl FnOnce() -> Result<Tensor>) -> Result<()> {
        if self.experts.has_input() {
            return Ok(());
        }
        let x = input()?;
        self.router.set_input(&x);
        self.experts.set_input(&x);
        if let Some(shared) = &mut self.shared {
            if let Some((gate, _, _)) = &mut shared.gate {
                gate.set_input(&x);
            }
            shared.network.with_input(|| Ok(x))?;
        }
        Ok(())
    }
}

impl Moe {
    /// `[tokens, hidden] -> [tokens, hidden]` with `residual` added, what the router decided, and what the backward needs.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        residual: Option<&Tensor>,
        pass: &Pass<'_>,
    ) -> Result<(Tensor, Routing, Saved)> {
        let of_routed = || -> Result<_> {
            let (routing, router) = self.router.forward(x, pass)?;
            let groups = routing.groups();
            let (of_rows, experts) =
                experts::forward(x, &self.experts.layers(), self.experts.activation, &groups, pass)?;
            Ok((of_rows, routing, router, groups, experts))
        };
        // Side by side: of few tokens each product is too small for all threads, of many a thread that is done with its part
        // of one has the other.
        let (shared, routed) = match &self.shared {
            Some(shared) => rayon::join(|| shared.forward(x, pass).map(Some), of_routed),
            None => (Ok(None), of_routed()),
        };
        let ((of_rows, routing, router, groups, experts), shared) = (routed?, shared?);
        let (term, shared) = shared.unzip();
        let others: Vec<&Tensor> = residual.into_iter().chain(&term).collect();
        let y = groups::combine(&of_rows, &routing.weights, &groups, &others)?;
        let saved = Saved { routing: routing.clone(), router, groups, experts, shared };
        Ok((y, routing, saved))
    }

    /// `dx` when `wants_dx`; `of_losses` is what losses on the router add. Needs the input where
    /// [`Moe::needs_input`] says so.
    pub(super) fn backward(
        &self,
        saved: Saved,
        pass: &Pass<'_>,
        dy: &Tensor,
        of_losses: Option<&RoutingGradient>,
        wants_dx: bool,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let Saved { routing, router, groups, experts, shared } = saved;
        let wants_router = wants_dx || self.router.is_trained(gradients);
        let routed = (routing.weights.as_slice(), &groups);
        let through_experts = |gradients: &mut Gradients| {
            let layers = self.experts.layers();
            let networks = (layers.as_slice(), self.experts.activation);
            experts::backward(experts, networks, routed, pass, dy, (wants_dx, wants_router), gradients)
        };
        // Side by side, as in the forward.
        let (mut backs, experts::Backward { of_rows, of_tokens, d_weights }) = match (&self.shared, shared) {
            (Some(shared), Some(saved)) => {
                let parameters = shared.linears().flat_map(Linear::parameters);
                let mut of_shared = gradients.take(parameters);
                let (backs, routed) = rayon::join(
                    || shared.own_gradients(saved, pass, dy, wants_dx, &mut of_shared),
                    || through_experts(gradients),
                );
                gradients.put_back(of_shared)?;
                (backs?, routed?)
            }
            _ => (Vec::new(), through_experts(gradients)?),
        };
        if let Some(d_weights) = d_weights {
            let through = (d_weights.as_slice(), of_losses);
            let decided = (&routing, &router);
            backs.extend(self.router.own_gradients(decided, pass, through, wants_dx, gradients)?);
        }
        let Some(of_rows) = of_rows else { return Ok(None) };
        if backs.is_empty() && of_tokens.is_none() {
            return groups::sum(&of_rows, &groups, &[]).map(Some);
        }
        // Tokens meet the shared expert, the router and what is one for all experts: one product for all of them.
        let of_tokens = linear::dx(&backs, of_tokens.as_slice(), dy.dtype(), pass)?;
        groups::sum(&of_rows, &groups, &[&of_tokens]).map(Some)
    }

    /// Whether a gradient of `wanted` is computed from its input.
    pub(super) fn needs_input(&self, wanted: &Gradients) -> bool {
        let Experts { gate, up, .. } = &self.experts;
        let shared = self.shared.iter().any(|shared| {
            shared.network.needs_input(wanted) || shared.gate.iter().any(|gate| gate.needs_input(wanted))
        });
        shared
            || self.router.needs_input(wanted)
            || gate.iter().chain(up).any(|linear| linear.needs_input(wanted))
    }

    /// Its linear layers, in the order of the configuration.
    pub(super) fn linears(&self) -> Vec<&Linear> {
        let experts = self.experts.linears();
        let shared = self.shared.iter().flat_map(Shared::linears);
        std::iter::once(&self.router.linear).chain(experts).chain(shared).collect()
    }

    /// Its linear layers, in the order of the configuration.
    pub(super) fn linears_mut(&mut self) -> Vec<&mut Linear> {
        let Experts { gate, up, down, .. } = &mut self.experts;
        let experts = gate.iter_mut().zip(up).zip(down).flat_map(|((gate, up), down)| [gate, up, down]);
        let shared = self
            .shared
            .iter_mut()
            .flat_map(|Shared { network, gate }| network.linears_mut().into_iter().chain(gate.iter_mut()));
        std::iter::once(&mut self.router.linear).chain(experts).chain(shared).collect()
    }
}

impl Experts {
    /// Of each expert gate, up and down.
    pub(super) fn linears(&self) -> impl Iterator<Item = &Linear> {
        let Self { gate, up, down, .. } = self;
        gate.iter().zip(up).zip(down).flat_map(|((gate, up), down)| [gate, up, down])
    }

    fn layers(&self) -> Vec<Expert<'_>> {
        let layers = self.gate.iter().zip(&self.up).zip(&self.down);
        layers
            .map(|((gate, up), down)| Expert { gate: gate.layer(), up: up.layer(), down: down.layer() })
            .collect()
    }
}

impl Shared {
    fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.network.linears().into_iter().chain(&self.gate)
    }

    fn forward(&self, x: &Tensor, pass: &Pass<'_>) -> Result<(Tensor, SavedShared)> {
        let (y, network) = self.network.forward(x, pass)?;
        let Some(gate) = &self.gate else { return Ok((y, SavedShared { network, gate: None })) };
        let (logit, saved) = gate.forward(x, pass)?; // [tokens, 1]
        let gated = (y.to_dtype(DType::F32)?.broadcast_mul(&sigmoid(&logit)?)?).to_dtype(y.dtype())?;
        Ok((gated, SavedShared { network, gate: Some((saved, logit, y)) }))
    }

    /// The gradients of what it holds, and what [`linear::dx`] takes, when `wants_dx`.
    ///
    /// With `s = sigmoid(gate)`: `d_network = s dy` and `d_gate = s (1 - s) <network, dy>`.
    fn own_gradients(
        &self,
        saved: SavedShared,
        pass: &Pass<'_>,
        dy: &Tensor,
        wants_dx: bool,
        gradients: &mut Gradients,
    ) -> Result<Vec<linear::Back<'_>>> {
        let SavedShared { network, gate: saved_gate } = saved;
        let (Some(gate), Some((saved_gate, logit, y))) = (&self.gate, saved_gate) else {
            return self.network.own_gradients(network, pass, dy, wants_dx, gradients);
        };
        let wide = dy.to_dtype(DType::F32)?;
        let s = sigmoid(&logit)?;
        let product = (y.to_dtype(DType::F32)? * &wide)?.sum_keepdim(1)?;
        let d_logit = ((&s - s.sqr()?)? * product)?.to_dtype(dy.dtype())?;
        let d_network = wide.broadcast_mul(&s)?.to_dtype(dy.dtype())?;
        drop(wide);
        let mut backs = self.network.own_gradients(network, pass, &d_network, wants_dx, gradients)?;
        backs.extend(Linear::own_gradients(&[(gate, &saved_gate, &d_logit)], pass, wants_dx, gradients)?);
        Ok(backs)
    }
}

fn sigmoid(logit: &Tensor) -> Result<Tensor> {
    Ok((logit.to_dtype(DType::F32)?.neg()?.exp()? + 1.0)?.recip()?)
}
