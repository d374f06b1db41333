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
    /// Drops the input, which [`Saved::with_input`] gives again, and that of `down`: the widest of all, and soon computed
    /// again from gate and up.
    pub fn trim(&mut self) {
        for saved in [&mut self.gate, &mut self.up, &mut self.down] {
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
        let (gate, gate_saved) = self.gate.forward(x, pass)?; // [tokens, width]
        let (up, up_saved) = self.up.forward(x, pass)?; // [tokens, width]
        let (inner, unit) = glu::forward(gate, up, self.activation)?; // [tokens, width]
        let (y, down) = self.down.forward(&inner, pass)?; // [tokens, hidden]
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
        let wants_inner = wants_dx || self.gate.is_trained(gradients) || self.up.is_trained(gradients);
        let Saved { gate, up, unit, mut down } = saved;
        if self.down.needs_input(gradients) {
            let inner = down.input_or(|| glu::value(&unit, self.activation))?;
            down.set_input(&inner);
        }
        let Some(d_inner) = self.down.backward(&down, pass, dy, wants_inner, gradients)? else {
            return Ok(None);
        };
        drop(down);
        let (d_gate, d_up) = glu::backward(&unit, self.activation, &d_inner)?;
        drop((unit, d_inner));
        let towards = [(&self.gate, &gate, &d_gate), (&self.up, &up, &d_up)];
        Linear::backward_of_all(&towards, pass, wants_dx, gradients)
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
