//! Linear layer with a low-rank term beside the weight:
//! `y = x W^T + bias + scale * (dropout(x) A^T B^T + low_rank_bias)`.
//!
//! `x` is `[tokens, in]`, `W [out, in]`, `A [rank, in]`, `B [out, rank]`, `y [tokens, out]`. `A` and `B` are held in f32;
//! beside bf16 they are rounded for the products. Sums are in f32 and rounded once; gradients are in f32.

use candle_core::{DType, Tensor};

use super::{
    Gradients, LowRank, Op, Operand, Parameter, Pass, Weight, add_to_rows, dropout, scaled_matmul_f32,
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

impl<'a> Layer<'a> {
    /// All values that could be trained; a quantized weight is none of them.
    pub fn parameters(self) -> impl Iterator<Item = &'a Parameter> {
        let low_rank = self.low_rank.into_iter().flat_map(|l| [&l.a, &l.b].into_iter().chain(&l.bias));
        self.weight.parameter().into_iter().chain(self.bias).chain(low_rank)
    }

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
    /// `scale dropout(x) A^T`, `[tokens, rank]`.
    inner: Option<Tensor>,
}

impl Saved {
    /// Of a layer without a low-rank term that took `x [tokens, in]`.
    #[must_use]
    pub fn of_input(x: &Tensor) -> Self {
        Self { x: Some(x.clone()), inner: None }
    }

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
}

/// `y`, and what the backward needs.
pub fn forward(x: &Tensor, layer: &Layer<'_>, pass: &Pass<'_>) -> Result<(Tensor, Saved)> {
    let mut all = forward_of_all(x, &[*layer], pass)?;
    all.pop().ok_or_else(|| Error::invalid("a forward of no layers"))
}

/// The same for layers that have one input.
pub fn forward_of_all(x: &Tensor, layers: &[Layer<'_>], pass: &Pass<'_>) -> Result<Vec<(Tensor, Saved)>> {
    let inners = inners(x, layers, pass)?;
    let y = |(layer, inner): (&Layer<'_>, Option<Tensor>)| {
        Ok((output(x, layer, inner.as_ref())?, Saved { x: Some(x.clone()), inner }))
    };
    layers.iter().zip(inners).map(y).collect()
}

/// `y`, where `u = scale dropout(x) A^T` is given.
pub(super) fn output(x: &Tensor, layer: &Layer<'_>, inner: Option<&Tensor>) -> Result<Tensor> {
    let time = Op::Linear.begin();
    let mut terms = vec![(x, layer.weight.t())];
    if let (Some(low_rank), Some(inner)) = (layer.low_rank, inner) {
        terms.push((inner, Operand::from(low_rank.b.tensor()).t()));
    }
    let mut y = sum_of_products(&terms, x.dtype())?;
    drop(time);
    for bias in biases(layer)? {
        y = add_to_rows(&y, &bias)?;
    }
    Ok(y)
}

/// What is added to all rows, `[out]` each.
pub(super) fn biases(layer: &Layer<'_>) -> Result<Vec<Tensor>> {
    let of_adapter = layer.low_rank.and_then(|l| l.bias.as_ref().map(|bias| Ok((bias.tensor() * l.scale)?)));
    layer.bias.map(|bias| Ok(bias.tensor().clone())).into_iter().chain(of_adapter).collect()
}

/// `u` of one layer, where it has a low-rank term.
pub(super) fn inner_of(x: &Tensor, layer: &Layer<'_>, pass: &Pass<'_>) -> Result<Option<Tensor>> {
    layer.low_rank.map(|low_rank| inner(x, low_rank, pass)).transpose()
}

/// `u = scale dropout(x) A^T` of each layer, `[tokens, rank]` in f32: in one product where the layers have the same rows before it.
pub(super) fn inners(x: &Tensor, layers: &[Layer<'_>], pass: &Pass<'_>) -> Result<Vec<Option<Tensor>>> {
    let low_ranks: Vec<&LowRank> = layers.iter().filter_map(|layer| layer.low_rank).collect();
    let alike = |l: &&LowRank| l.scale == low_ranks[0].scale && !l.dropout.drops(pass);
    if low_ranks.len() < 2 || !low_ranks.iter().all(alike) {
        return layers.iter().map(|layer| inner_of(x, layer, pass)).collect();
    }
    let _time = Op::LowRank.begin();
    let a = Tensor::cat(&low_ranks.iter().map(|l| l.a.tensor()).collect::<Vec<_>>(), 0)?; // [all ranks, in]
    let all = scaled_matmul_f32(low_ranks[0].scale, x, &a.t()?)?;
    let mut start = 0;
    let part = |layer: &Layer<'_>| {
        let Some(low_rank) = layer.low_rank else { return Ok(None) };
        let rank = low_rank.rank();
        start += rank;
        Ok(Some(all.narrow(1, start - rank, rank)?.contiguous()?))
    };
    layers.iter().map(part).collect()
}

/// What a layer adds to the gradient of its input: `dy W + dropout(du A)`.
#[derive(Debug)]
pub struct Back<'l> {
    pub(super) layer: Layer<'l>,
    /// `[tokens, out]`
    pub(super) dy: Tensor,
    /// `du [tokens, rank]` of the low-rank term, if it is added here.
    pub(super) d_inner: Option<Tensor>,
}

/// The sum of the `dx` of layers that have one input, when `wants_dx`: `(layer, saved, dy)` of each. The gradients of
/// weights, biases, `A` and `B` go to `gradients` where wanted.
///
/// With `u = scale dropout(x) A^T` and `du = scale dy B`: `dB = dy^T u`, `dA = du^T dropout(x)`,
/// `dW = dy^T x` and `dx = dy W + dropout(du A)`, all of it in one sum that is rounded once.
pub fn backward_of_all(
    layers: &[(Layer<'_>, &Saved, &Tensor)],
    pass: &Pass<'_>,
    wants_dx: bool,
    gradients: &mut Gradients,
) -> Result<Option<Tensor>> {
    let Some((_, _, dy)) = layers.first() else { return Err(Error::invalid("a backward of no layers")) };
    let backs = own_gradients(layers, pass, wants_dx, gradients)?;
    if wants_dx { dx(&backs, &[], dy.dtype(), pass).map(Some) } else { Ok(None) }
}

/// Of [`backward_of_all`] the gradients of what the layers hold, and what [`dx`] takes; nothing where it is not wanted.
pub fn own_gradients<'l>(
    layers: &[(Layer<'l>, &Saved, &Tensor)],
    pass: &Pass<'_>,
    wants_dx: bool,
    gradients: &mut Gradients,
) -> Result<Vec<Back<'l>>> {
    let x = layers.first().and_then(|(_, saved, _)| saved.x.as_ref());
    let all: Vec<_> = layers.iter().map(|(layer, saved, dy)| (*layer, saved.inner.as_ref(), *dy)).collect();
    let d_inners = gradients_of_all(x, &all, pass, wants_dx, gradients)?;
    if !wants_dx {
        return Ok(Vec::new());
    }
    let back = |((layer, _, dy), d_inner): (&(Layer<'l>, &Saved, &Tensor), Option<Tensor>)| Back {
        layer: *layer,
        dy: (*dy).clone(),
        d_inner,
    };
    Ok(layers.iter().zip(d_inners).map(back).collect())
}

/// The gradients of layers that have one input, where wanted, and `du` of each: from `(layer, u, dy)` of each, and the input
/// where one of them takes it.
pub(super) fn gradients_of_all(
    x: Option<&Tensor>,
    layers: &[(Layer<'_>, Option<&Tensor>, &Tensor)],
    pass: &Pass<'_>,
    wants_dx: bool,
    gradients: &mut Gradients,
) -> Result<Vec<Option<Tensor>>> {
    let d_inners = output_and_weight_gradients(x, layers, wants_dx, gradients)?;
    if !layers.iter().any(|(layer, _, _)| layer.needs_input(gradients)) {
        return Ok(d_inners);
    }
    let x = kept(x)?;
    let low_ranks = layers.iter().filter_map(|(layer, _, _)| layer.low_rank);
    let wanted: Vec<&LowRank> =
        low_ranks.filter(|l| gradients.wants(&l.a) && !l.dropout.drops(pass)).collect();
    if wanted.len() < 2 || wanted.len() < layers.len() {
        for ((layer, _, _), d_inner) in layers.iter().zip(&d_inners) {
            a_gradient(layer, x, d_inner.as_ref(), pass, gradients)?;
        }
        return Ok(d_inners);
    }
    let all = Tensor::cat(&d_inners.iter().flatten().collect::<Vec<_>>(), 1)?; // [tokens, all ranks]
    let all = narrow(1.0, &all.t()?, x)?; // [all ranks, in]
    let mut start = 0;
    for low_rank in wanted {
        let rank = low_rank.rank();
        gradients.add(&low_rank.a, &all.narrow(0, start, rank)?)?;
        start += rank;
    }
    Ok(d_inners)
}

/// Of [`gradients_of_all`] all but those of `A`.
pub(super) fn output_and_weight_gradients(
    x: Option<&Tensor>,
    layers: &[(Layer<'_>, Option<&Tensor>, &Tensor)],
    wants_dx: bool,
    gradients: &mut Gradients,
) -> Result<Vec<Option<Tensor>>> {
    let mut d_inners = Vec::with_capacity(layers.len());
    for (layer, inner, dy) in layers {
        d_inners.push(output_gradients(*inner, layer, dy, wants_dx, gradients)?);
        if gradients.wanted(layer.weight).is_some() {
            weight_gradient(layer, kept(x)?, dy, gradients)?;
        }
    }
    Ok(d_inners)
}

fn kept(x: Option<&Tensor>) -> Result<&Tensor> {
    x.ok_or_else(|| Error::invalid("the input of a layer was not kept for its gradient"))
}

/// As [`backward_of_all`] for one layer whose input was dropped: `dx`, and `du` for [`input_gradients`].
pub fn backward_without_input(
    saved: &Saved,
    layer: &Layer<'_>,
    pass: &Pass<'_>,
    dy: &Tensor,
    wants_dx: bool,
    gradients: &mut Gradients,
) -> Result<(Option<Tensor>, Option<Tensor>)> {
    let d_inner = output_gradients(saved.inner.as_ref(), layer, dy, wants_dx, gradients)?;
    let back = Back { layer: *layer, dy: dy.clone(), d_inner };
    let dx = if wants_dx { Some(dx(std::slice::from_ref(&back), &[], dy.dtype(), pass)?) } else { None };
    Ok((dx, back.d_inner))
}

/// Those that take the layer's input: `dW` and `dA`, where wanted.
pub fn input_gradients(
    layer: &Layer<'_>,
    x: &Tensor,
    d_inner: Option<&Tensor>,
    dy: &Tensor,
    pass: &Pass<'_>,
    gradients: &mut Gradients,
) -> Result<()> {
    weight_gradient(layer, x, dy, gradients)?;
    a_gradient(layer, x, d_inner, pass, gradients)
}

/// `dA = du^T dropout(x)`, where wanted.
fn a_gradient(
    layer: &Layer<'_>,
    x: &Tensor,
    d_inner: Option<&Tensor>,
    pass: &Pass<'_>,
    gradients: &mut Gradients,
) -> Result<()> {
    if let (Some(low_rank), Some(d_inner)) = (layer.low_rank, d_inner)
        && gradients.wants(&low_rank.a)
    {
        let dropped = dropout::apply(x, &low_rank.dropout, pass)?;
        gradients.add(&low_rank.a, &narrow(1.0, &d_inner.t()?, &dropped)?)?;
    }
    Ok(())
}

/// `dW = dy^T x`, where wanted.
fn weight_gradient(layer: &Layer<'_>, x: &Tensor, dy: &Tensor, gradients: &mut Gradients) -> Result<()> {
    match gradients.wanted(layer.weight) {
        Some(weight) => gradients.add(weight, &narrow(1.0, &dy.t()?, x)?),
        None => Ok(()),
    }
}

/// The gradients of biases and of `B`, where wanted, and `du` where it is needed.
fn output_gradients(
    inner: Option<&Tensor>,
    layer: &Layer<'_>,
    dy: &Tensor,
    wants_dx: bool,
    gradients: &mut Gradients,
) -> Result<Option<Tensor>> {
    if let Some(bias) = layer.bias.filter(|bias| gradients.wants(bias)) {
        gradients.add(bias, &dy.to_dtype(DType::F32)?.sum(0)?)?;
    }
    let (Some(low_rank), Some(inner)) = (layer.low_rank, inner) else { return Ok(None) };
    if gradients.wants(&low_rank.b) {
        gradients.add(&low_rank.b, &narrow(1.0, &dy.t()?, inner)?)?;
    }
    if let Some(bias) = low_rank.bias.as_ref().filter(|bias| gradients.wants(bias)) {
        gradients.add(bias, &(dy.to_dtype(DType::F32)?.sum(0)? * low_rank.scale)?)?;
    }
    if !wants_dx && !gradients.wants(&low_rank.a) {
        return Ok(None);
    }
    Ok(Some(narrow(low_rank.scale, dy, low_rank.b.tensor())?)) // [tokens, rank]
}

/// The gradient of the input of all layers, `[tokens, in]` in `dtype`, with the products of `others` added, `[tokens, k]` and
/// `[k, in]`: one sum that is rounded once, but for what passes through dropout.
pub fn dx(backs: &[Back<'_>], others: &[(Tensor, Tensor)], dtype: DType, pass: &Pass<'_>) -> Result<Tensor> {
    let mut terms: Vec<(&Tensor, Operand<'_>)> = others.iter().map(|(a, b)| (a, b.into())).collect();
    for Back { layer, dy, d_inner } in backs {
        terms.push((dy, layer.weight.into()));
        if let (Some(low_rank), Some(d_inner)) = (layer.low_rank, d_inner)
            && !low_rank.dropout.drops(pass)
        {
            terms.push((d_inner, low_rank.a.tensor().into()));
        }
    }
    let time = Op::Linear.begin();
    let mut dx = sum_of_products(&terms, dtype)?;
    drop(time);
    for Back { layer, d_inner, .. } in backs {
        if let (Some(low_rank), Some(d_inner)) = (layer.low_rank, d_inner)
            && low_rank.dropout.drops(pass)
        {
            let through = narrow(1.0, d_inner, low_rank.a.tensor())?; // [tokens, in]
            dx = dropout::add_dropped(&dx, &through, &low_rank.dropout, pass)?;
        }
    }
    Ok(dx)
}

/// `u = scale dropout(x) A^T`, `[tokens, rank]` in f32.
fn inner(x: &Tensor, low_rank: &LowRank, pass: &Pass<'_>) -> Result<Tensor> {
    narrow(low_rank.scale, &dropout::apply(x, &low_rank.dropout, pass)?, &low_rank.a.tensor().t()?)
}

/// A product in f32 that has the width of an adapter, or is a weight's gradient.
fn narrow(scale: f64, a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let _time = Op::LowRank.begin();
    scaled_matmul_f32(scale, a, b)
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
