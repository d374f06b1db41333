//! A linear layer of the model: `y = x W^T + bias`, and the low-rank term beside it where an adapter put one.

use candle_core::Tensor;
use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::ops::{Gradients, LowRank, Parameter, Pass, Weight, linear};

/// A linear layer, plain data.
#[derive(Debug, Clone)]
pub struct Linear {
    /// Module path, as Hugging Face has it.
    pub path: String,
    /// `[out, in]`.
    pub weight: Weight,
    /// `[out]`.
    pub bias: Option<Parameter>,
    /// What an adapter adds.
    pub low_rank: Option<LowRank>,
}

impl Linear {
    /// `[tokens, in] -> [tokens, out]`, and what the backward needs.
    pub fn forward(&self, x: &Tensor, pass: &Pass<'_>) -> Result<(Tensor, linear::Saved)> {
        linear::forward(x, &self.layer(), pass)
    }

    /// The same of layers with one input. Of a single token they are computed side by side: then each is too small for all
    /// threads.
    pub fn forward_of_all<const N: usize>(
        layers: [&Self; N],
        x: &Tensor,
        pass: &Pass<'_>,
    ) -> Result<[(Tensor, linear::Saved); N]> {
        let all: Vec<_> = if x.dim(0)? == 1 {
            layers.par_iter().map(|layer| layer.forward(x, pass)).collect::<Result<_>>()?
        } else {
            linear::forward_of_all(x, &layers.map(Self::layer), pass)?
        };
        all.try_into().map_err(|_| Error::invalid("as many results as layers"))
    }

    /// `dx` when `wants_dx`.
    pub fn backward(
        &self,
        saved: &linear::Saved,
        pass: &Pass<'_>,
        dy: &Tensor,
        wants_dx: bool,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        linear::backward_of_all(&[(self.layer(), saved, dy)], pass, wants_dx, gradients)
    }

    /// The sum of the `dx` of layers with one input, when `wants_dx`: `(layer, saved, dy)` of each.
    pub fn backward_of_all(
        layers: &[(&Self, &linear::Saved, &Tensor)],
        pass: &Pass<'_>,
        wants_dx: bool,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let layers: Vec<_> = layers.iter().map(|(layer, saved, dy)| (layer.layer(), *saved, *dy)).collect();
        linear::backward_of_all(&layers, pass, wants_dx, gradients)
    }

    /// Of [`Linear::backward_of_all`] the gradients of what the layers hold, and what [`linear::dx`] takes.
    pub(super) fn own_gradients<'l>(
        layers: &[(&'l Self, &linear::Saved, &Tensor)],
        pass: &Pass<'_>,
        wants_dx: bool,
        gradients: &mut Gradients,
    ) -> Result<Vec<linear::Back<'l>>> {
        let layers: Vec<_> = layers.iter().map(|(layer, saved, dy)| (layer.layer(), *saved, *dy)).collect();
        linear::own_gradients(&layers, pass, wants_dx, gradients)
    }

    /// As [`Linear::backward`] for a layer whose input was dropped: `dx`, and what [`Linear::input_gradients`] takes.
    pub(super) fn backward_without_input(
        &self,
        saved: &linear::Saved,
        pass: &Pass<'_>,
        dy: &Tensor,
        wants_dx: bool,
        gradients: &mut Gradients,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        linear::backward_without_input(saved, &self.layer(), pass, dy, wants_dx, gradients)
    }

    /// The gradients that take the layer's input.
    pub(super) fn input_gradients(
        &self,
        x: &Tensor,
        d_inner: Option<&Tensor>,
        dy: &Tensor,
        pass: &Pass<'_>,
        gradients: &mut Gradients,
    ) -> Result<()> {
        linear::input_gradients(&self.layer(), x, d_inner, dy, pass, gradients)
    }

    /// Whether a gradient of `wanted` is computed from the layer's input.
    pub(super) fn needs_input(&self, wanted: &Gradients) -> bool {
        self.layer().needs_input(wanted)
    }

    pub(super) fn layer(&self) -> linear::Layer<'_> {
        let (bias, low_rank) = (self.bias.as_ref(), self.low_rank.as_ref());
        linear::Layer { weight: &self.weight, bias, low_rank }
    }

    /// Whether any of its values is trained.
    #[must_use]
    pub fn is_trained(&self, gradients: &Gradients) -> bool {
        self.parameters().any(|parameter| gradients.wants(parameter))
    }

    /// Weight and bias of the model and of the adapter; a quantized weight is none of them.
    pub fn parameters(&self) -> impl Iterator<Item = &Parameter> {
        self.layer().parameters()
    }

    /// The model's own weight and bias, without the adapter's.
    pub fn base_parameters_mut(&mut self) -> impl Iterator<Item = &mut Parameter> {
        self.weight.parameter_mut().into_iter().chain(&mut self.bias)
    }
}
