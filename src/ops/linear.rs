//! Linear layer with a low-rank term beside the weight:
//! `y = x W^T + bias + scale * (dropout(x) A^T B^T + low_rank_bias)`.
//!
//! `x` is `[tokens, in]`, `W [out, in]`, `A [rank, in]`, `B [out, rank]`, `y [tokens, out]`. `A` and `B` are held in f32;
//! beside bf16 they are rounded for the products. Sums are in f32 and rounded once; gradients are in f32.

use candle_core::{DType, Tensor};

use super::{
    Gradients, LowRank, Op, Operand, Parameter, Pass, Weight, add_to_rows, dropout, matmul, matmul_f32,
    sum_of_products,
};
use crate::error::{Error, Result};

/// What a linear layer computes with.
#[derive(Debug, Clone, Copy)]
pub struct Layer<'a> {
    /// `[out, in]`.
    pub weight: &'a Weight,
    /// `[out]`.
    pub bias: Option<&'a Parameter>,
    /// The term beside the weight.
    pub low_rank: Option<&'a LowRank>,
}

impl Layer<'_> {
    /// Whether a gradient of `wanted` is computed from the layer's input.
    #[must_use]
    pub fn needs_input(&self, wanted: &Gradients) -> bool {
        let low_rank = self.low_rank.is_some_and(|low_rank| wanted.wants(&low_rank.a));
        low_rank || wanted.wanted(self.weight).is_some()
    }
}

/// What the backward needs.
#[derive(Debug, Clone)]
pub struct Saved {
    /// `[tokens, in]`; not needed for `dx`.
    x: Option<Tensor>,
    /// `dropout(x) A^T`, `[tokens, rank]`.
    inner: Option<Tensor>,
}

impl Saved {
    /// Drops the input, which [`Saved::set_input`] gives again where a gradient needs it.
    pub fn drop_input(&mut self) {
        self.x = None;
    }

    /// The input, computed where it was dropped.
    pub fn input_or(&self, input: impl FnOnce() -> Result<Tensor>) -> Result<Tensor> {
        self.x.clone().map_or_else(input, Ok)
    }

    /// Gives the input again.
    pub fn set_input(&mut self, x: &Tensor) {
        self.x = Some(x.clone());
    }

    fn x(&self) -> Result<&Tensor> {
        self.x.as_ref().ok_or_else(|| Error::invalid("the input of a layer was not kept for its gradient"))
    }
}

/// `y`, and what the backward needs.
pub fn forward(x: &Tensor, layer: &Layer<'_>, pass: &Pass<'_>) -> Result<(Tensor, Saved)> {
    let inner = layer.low_rank.map(|low_rank| inner(x, low_rank, pass)).transpose()?;
    let _time = Op::Linear.begin();
    let weight = layer.weight.t();
    let mut y = match (layer.low_rank, &inner) {
        (Some(low_rank), Some(inner)) => {
            let terms = [(x, weight), (&(inner * low_rank.scale)?, Operand::from(low_rank.b.tensor()).t())];
            sum_of_products(&terms, x.dtype())?
        }
        _ => matmul(x, weight)?,
    };
    if let Some(bias) = layer.bias {
        y = add_to_rows(&y, bias.tensor())?;
    }
    if let Some((bias, scale)) = layer.low_rank.and_then(|l| l.bias.as_ref().map(|bias| (bias, l.scale))) {
        y = add_to_rows(&y, &(bias.tensor() * scale)?)?;
    }
    Ok((y, Saved { x: Some(x.clone()), inner }))
}

/// The sum of the `dx` of layers that have one input, when `wants_dx`: `(layer, saved, dy)` of each. The gradients of
/// weights, biases, `A` and `B` go to `gradients` where wanted.
///
/// With `u = dropout(x) A^T` and `du = scale dy B`: `dB = scale dy^T u`, `dA = du^T dropout(x)`,
/// `dW = dy^T x` and `dx = dy W + dropout(du A)`, all of it in one sum that is rounded once.
pub fn backward_of_all(
    layers: &[(Layer<'_>, &Saved, &Tensor)],
    pass: &Pass<'_>,
    wants_dx: bool,
    gradients: &mut Gradients,
) -> Result<Option<Tensor>> {
    let mut terms: Vec<(&Tensor, Operand<'_>)> = Vec::with_capacity(2 * layers.len());
    let mut d_inners = Vec::with_capacity(layers.len());
    for (layer, saved, dy) in layers {
        if let Some(weight) = gradients.wanted(layer.weight) {
            gradients.add(weight, &narrow(&dy.t()?, saved.x()?)?)?;
        }
        if let Some(bias) = layer.bias.filter(|bias| gradients.wants(bias)) {
            gradients.add(bias, &dy.to_dtype(DType::F32)?.sum(0)?)?;
        }
        terms.push((dy, layer.weight.into()));
        if let (Some(low_rank), Some(inner)) = (layer.low_rank, &saved.inner) {
            let d_inner = low_rank_backward(saved, inner, low_rank, pass, dy, wants_dx, gradients)?;
            d_inners.extend(d_inner.map(|d_inner| (low_rank, d_inner)));
        }
    }
    if !wants_dx {
        return Ok(None);
    }
    let dropped = |low_rank: &LowRank| low_rank.dropout.drops(pass);
    let whole = d_inners.iter().filter(|(low_rank, _)| !dropped(low_rank));
    terms.extend(whole.map(|(low_rank, d_inner)| (d_inner, low_rank.a.tensor().into())));
    let Some((_, _, dy)) = layers.first() else { return Ok(None) };
    let time = Op::Linear.begin();
    let mut dx = sum_of_products(&terms, dy.dtype())?;
    drop(time);
    for (low_rank, d_inner) in d_inners.iter().filter(|(low_rank, _)| dropped(low_rank)) {
        let through = narrow(d_inner, low_rank.a.tensor())?; // [tokens, in]
        dx = dropout::add_dropped(&dx, &through, &low_rank.dropout, pass)?;
    }
    Ok(Some(dx))
}

/// The low-rank term alone, `[tokens, out]` in f32.
pub fn low_rank_forward(x: &Tensor, low_rank: &LowRank, pass: &Pass<'_>) -> Result<Tensor> {
    let inner = (inner(x, low_rank, pass)? * low_rank.scale)?;
    let delta = matmul_f32(&inner, &low_rank.b.tensor().t()?)?;
    match &low_rank.bias {
        None => Ok(delta),
        Some(bias) => Ok(delta.broadcast_add(&(bias.tensor() * low_rank.scale)?)?),
    }
}

/// `u = dropout(x) A^T`, `[tokens, rank]` in f32.
fn inner(x: &Tensor, low_rank: &LowRank, pass: &Pass<'_>) -> Result<Tensor> {
    narrow(&dropout::apply(x, &low_rank.dropout, pass)?, &low_rank.a.tensor().t()?)
}

/// A product in f32 that has the width of an adapter, or is a weight's gradient.
fn narrow(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let _time = Op::LowRank.begin();
    matmul_f32(a, b)
}

/// The gradients of `A`, `B` and the bias where wanted, and `du` when `wants_dx`.
fn low_rank_backward(
    saved: &Saved,
    inner: &Tensor,
    low_rank: &LowRank,
    pass: &Pass<'_>,
    dy: &Tensor,
    wants_dx: bool,
    gradients: &mut Gradients,
) -> Result<Option<Tensor>> {
    let (a, b) = (&low_rank.a, &low_rank.b);
    if gradients.wants(b) {
        gradients.add(b, &(narrow(&dy.t()?, inner)? * low_rank.scale)?)?;
    }
    if let Some(bias) = low_rank.bias.as_ref().filter(|bias| gradients.wants(bias)) {
        gradients.add(bias, &(dy.to_dtype(DType::F32)?.sum(0)? * low_rank.scale)?)?;
    }
    if !gradients.wants(a) && !wants_dx {
        return Ok(None);
    }
    let d_inner = (narrow(dy, b.tensor())? * low_rank.scale)?; // [tokens, rank]
    if gradients.wants(a) {
        let dropped = dropout::apply(saved.x()?, &low_rank.dropout, pass)?;
        gradients.add(a, &narrow(&d_inner.t()?, &dropped)?)?;
    }
    Ok(wants_dx.then_some(d_inner))
}

/// The same composed of candle primitives; `mask` holds the dropout factors, `[tokens, in]`.
pub fn reference(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    low_rank: Option<(&Tensor, &Tensor, f64)>,
    mask: Option<&Tensor>,
) -> Result<Tensor> {
    let mut y = x.matmul(&weight.t()?)?;
    if let Some(bias) = bias {
        y = y.broadcast_add(bias)?;
    }
    if let Some((a, b, scale)) = low_rank {
        let dropped = mask.map_or_else(|| Ok(x.clone()), |mask| x * mask)?;
        y = (y + (dropped.matmul(&a.t()?)?.matmul(&b.t()?)? * scale)?)?;
    }
    Ok(y)
}
