//! One layer: `x + attention(norm(x))`, then `x + feed_forward(norm(x))`.

use candle_core::Tensor;

use super::attention::{self, Attention};
use super::cache::KeyValues;
use super::linear::Linear;
use super::network::{self, Network};
use super::norm::Norm;
use super::router::{Router, Routing, RoutingGradient};
use crate::error::Result;
use crate::ops::rotary::Angles;
use crate::ops::{Gradients, Parameter, Pass, add, rms_norm};

/// `x * factor`; `x` itself where the factor is 1.
pub(super) fn scaled(x: Tensor, factor: f64) -> Result<Tensor> {
    if factor == 1.0 { Ok(x) } else { Ok((x * factor)?) }
}

#[derive(Debug, Clone)]
pub(super) struct Block {
    pub(super) input_norm: Norm,
    pub(super) attention: Attention,
    pub(super) post_norm: Norm,
    pub(super) feed_forward: Network,
    /// What both terms of the residual stream are multiplied with.
    pub(super) residual: f64,
}

/// What the backward needs.
#[derive(Debug)]
pub(super) struct Saved {
    input_norm: rms_norm::Saved,
    attention: attention::Saved,
    post_norm: rms_norm::Saved,
    feed_forward: network::Saved,
}

impl Saved {
    /// Drops what is soon computed again: what the norms gave, and the product of the gated unit.
    pub(super) fn trim(&mut self) {
        self.attention.trim();
        self.feed_forward.trim();
    }
}

impl Block {
    /// `[tokens, hidden] -> [tokens, hidden]`, what a router decided, and what the backward needs.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        angles: &Angles,
        pass: &Pass<'_>,
        caches: &mut [&mut KeyValues],
    ) -> Result<(Tensor, Option<Routing>, Saved)> {
        let (normalised, input_norm) = self.input_norm.forward(x)?;
        let (mixed, attention) = self.attention.forward(&normalised, angles, pass, caches)?;
        let (x, normalised, post_norm) = self.post_norm.forward_of_sum(x, &self.scaled(mixed)?)?;
        // A plain sum is the network's: a mixture adds it while it sums its rows.
        let plain = (self.residual == 1.0).then_some(&x);
        let (y, routing, feed_forward) = self.feed_forward.forward(&normalised, plain, pass)?;
        let y = if plain.is_some() { y } else { add(&x, &self.scaled(y)?)? };
        let saved = Saved { input_norm, attention, post_norm, feed_forward };
        Ok((y, routing, saved))
    }

    /// The input of the feed-forward network in a forward pass.
    pub(super) fn network_input(&self, saved: &Saved) -> Result<Tensor> {
        self.post_norm.value(&saved.post_norm)
    }

    fn scaled(&self, term: Tensor) -> Result<Tensor> {
        scaled(term, self.residual)
    }

    /// `dx` when `wants_dx`; `of_losses` is what losses on the router add. What was saved is freed on the way.
    pub(super) fn backward(
        &self,
        saved: Saved,
        angles: &Angles,
        pass: &Pass<'_>,
        (dy, of_losses): (&Tensor, Option<&RoutingGradient>),
        wants_dx: bool,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let wants_input_norm = wants_dx || gradients.wants(&self.input_norm.weight);
        let wants_middle = wants_input_norm || self.attention.is_trained(gradients);
        let wants_post_norm = wants_middle || gradients.wants(&self.post_norm.weight);
        let Saved { input_norm, mut attention, post_norm, mut feed_forward } = saved;
        if self.feed_forward.needs_input(gradients) {
            feed_forward.with_input(|| self.post_norm.value(&post_norm))?;
        }
        let d_term = self.scaled(dy.clone())?;
        let normalised =
            self.feed_forward.backward(feed_forward, pass, &d_term, of_losses, wants_post_norm, gradients)?;
        drop(d_term);
        let Some(normalised) = normalised else { return Ok(None) };
        let dy = self.post_norm.backward(&post_norm, &normalised, Some(dy), gradients)?;
        drop((post_norm, normalised));
        if !wants_middle {
            return Ok(None);
        }
        if self.attention.needs_input(gradients) {
            attention.with_input(|| self.input_norm.value(&input_norm))?;
        }
        let normalised = self.attention.backward(
            attention,
            angles,
            pass,
            &self.scaled(dy.clone())?,
            wants_input_norm,
            gradients,
        )?;
        let Some(normalised) = normalised else { return Ok(None) };
        let dx = self.input_norm.backward(&input_norm, &normalised, Some(&dy), gradients)?;
        Ok(wants_dx.then_some(dx))
    }

    pub(super) fn is_trained(&self, gradients: &Gradients) -> bool {
        self.attention.is_trained(gradients)
            || self.feed_forward.is_trained(gradients)
            || [&self.input_norm, &self.post_norm].iter().any(|norm| gradients.wants(&norm.weight))
    }

    pub(super) fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.attention.linears().into_iter().chain(self.feed_forward.linears())
    }

    pub(super) fn linears_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        self.attention.linears_mut().into_iter().chain(self.feed_forward.linears_mut())
    }

    pub(super) fn router_mut(&mut self) -> Option<&mut Router> {
        match &mut self.feed_forward {
            Network::Dense(_) => None,
            Network::Sparse(moe) => Some(&mut moe.router),
        }
    }

    /// Those of routed experts.
    pub(super) fn routed_linears(&self) -> Vec<&Linear> {
        match &self.feed_forward {
            Network::Dense(_) => Vec::new(),
            Network::Sparse(moe) => moe.experts.linears().collect(),
        }
    }

    /// Every value of the model in this layer, without the adapter's.
    pub(super) fn base_parameters_mut(&mut self) -> impl Iterator<Item = &mut Parameter> {
        let head_norms = self.attention.qk_norm.iter_mut().flat_map(|(q, k)| [&mut q.weight, &mut k.weight]);
        let norms = [&mut self.input_norm.weight, &mut self.post_norm.weight].into_iter().chain(head_norms);
        let [q, k, v, o] =
            [&mut self.attention.q, &mut self.attention.k, &mut self.attention.v, &mut self.attention.o];
        let linears = [q, k, v, o].into_iter().chain(self.feed_forward.linears_mut());
        norms.chain(linears.flat_map(Linear::base_parameters_mut))
    }
}
