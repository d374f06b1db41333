//! The feed-forward network of a layer: `down(activation(gate(x)) * up(x))`.

use candle_core::Tensor;

use super::linear::Linear;
use crate::error::Result;
use crate::ops::{Activation, Gradients, Pass, glu, linear};

/// A gated feed-forward network.
#[derive(Debug, Clone)]
pub struct FeedForward {
    /// `[width, hidden]`.
    pub gate: Linear,
    /// `[width, hidden]`.
    pub up: Linear,
    /// `[hidden, width]`.
    pub down: Linear,
    /// What the gate goes through.
    pub activation: Activation,
}

/// What the backward needs.
#[derive(Debug, Clone)]
pub struct Saved {
    gate: linear::Saved,
    up: linear::Saved,
    unit: glu::Saved,
    down: linear::Saved,
}

impl Saved {
    /// Drops the input, which [`Saved::with_input`] gives again.
    pub fn trim(&mut self) {
        for saved in [&mut self.gate, &mut self.up] {
            saved.drop_input();
        }
    }

    /// Gives the input again, if it was dropped.
    pub fn with_input(&mut self, input: impl FnOnce() -> Result<Tensor>) -> Result<()> {
        let input = self.gate.input_or(input)?;
        for saved in [&mut self.gate, &mut self.up] {
            saved.set_input(&input);
        }
        Ok(())
    }
}

impl FeedForward {
    /// `[tokens, hidden] -> [tokens, hidden]`, and what the backward needs.
    pub fn forward(&self, x: &Tensor, pass: &Pass<'_>) -> Result<(Tensor, Saved)> {
        let both = Linear::forward_of_all([&self.gate, &self.up], x, pass)?;
        let [(gate, gate_saved), (up, up_saved)] = both; // [tokens, width] each
        let (inner, unit) = glu::forward(gate, up, self.activation)?; // [tokens, width]
        let (y, mut down) = self.down.forward(&inner, pass)?; // [tokens, hidden]
        // The widest of all that could be kept: the backward gets it on the way.
        down.drop_input();
        Ok((y, Saved { gate: gate_saved, up: up_saved, unit, down }))
    }

    /// `dx` when `wants_dx`. Needs the input where [`FeedForward::needs_input`] says so.
    pub fn backward(
        &self,
        saved: Saved,
        pass: &Pass<'_>,
        dy: &Tensor,
        wants_dx: bool,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let backs = self.own_gradients(saved, pass, dy, wants_dx, gradients)?;
        if wants_dx { linear::dx(&backs, &[], dy.dtype(), pass).map(Some) } else { Ok(None) }
    }

    /// The gradients of what it holds, and what [`linear::dx`] takes, when `wants_dx`.
    pub(super) fn own_gradients(
        &self,
        saved: Saved,
        pass: &Pass<'_>,
        dy: &Tensor,
        wants_dx: bool,
        gradients: &mut Gradients,
    ) -> Result<Vec<linear::Back<'_>>> {
        let wants_product = wants_dx || self.gate.is_trained(gradients) || self.up.is_trained(gradients);
        let Saved { gate, up, unit, down } = saved;
        let (d_product, d_inner) =
            self.down.backward_without_input(&down, pass, dy, wants_product, gradients)?;
        drop(down);
        let Some(d_product) = d_product else {
            let product = glu::value(&unit, self.activation)?;
            self.down.input_gradients(&product, d_inner.as_ref(), dy, pass, gradients)?;
            return Ok(Vec::new());
        };
        let (product, d_gate, d_up) = glu::backward(&unit, self.activation, &d_product, None)?;
        drop((unit, d_product));
        self.down.input_gradients(&product, d_inner.as_ref(), dy, pass, gradients)?;
        drop(product);
        let towards = [(&self.gate, &gate, &d_gate), (&self.up, &up, &d_up)];
        Linear::own_gradients(&towards, pass, wants_dx, gradients)
    }

    /// Whether a gradient of `wanted` is computed from its input.
    #[must_use]
    pub fn needs_input(&self, wanted: &Gradients) -> bool {
        [&self.gate, &self.up].iter().any(|linear| linear.needs_input(wanted))
    }

    /// Its linear layers.
    pub fn linears(&self) -> [&Linear; 3] {
        [&self.gate, &self.up, &self.down]
    }

    /// Its linear layers.
    pub fn linears_mut(&mut self) -> [&mut Linear; 3] {
        [&mut self.gate, &mut self.up, &mut self.down]
    }
}
