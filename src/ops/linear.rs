//! Linear layer with a low-rank term beside the weight:
//! `y = x W^T + bias + scale * (dropout(x) A^T B^T + low_rank_bias)`.
//!
//! `x` is `[tokens, in]`, `W [out, in]`, `A [rank, in]`, `B [out, rank]`, `y [tokens, out]`. `A` and `B` are held in f32.
//! On the CPU everything is computed in f32 and rounded once to the type of `x`; gradients are in f32.

use candle_core::{DType, Tensor};

use super::matmul::{matmul_f32, rounded, working};
use super::{Gradients, LowRank, Parameter, Pass, Weight, dropout};
use crate::error::Result;

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

/// What the backward needs.
#[derive(Debug, Clone)]
pub struct Saved {
    x: Tensor,
    /// `dropout(x) A^T`, `[tokens, rank]`.
    inner: Option<Tensor>,
}

/// `y`, and what the backward needs.
pub fn forward(x: &Tensor, layer: &Layer<'_>, pass: &Pass<'_>) -> Result<(Tensor, Saved)> {
    let Weight::Dense(weight) = layer.weight;
    let wide = working(x)?;
    let mut y = wide.matmul(&working(weight.tensor())?.t()?)?;
    if let Some(bias) = layer.bias {
        y = y.broadcast_add(&bias.tensor().to_dtype(y.dtype())?)?;
    }
    let mut inner = None;
    if let Some(low_rank) = layer.low_rank {
        let (delta, u) = low_rank_forward(&wide, low_rank, pass)?;
        y = (y + delta)?;
        inner = Some(u);
    }
    Ok((rounded(&y, x.dtype())?, Saved { x: x.clone(), inner }))
}

/// `dx` when `wants_dx`; the gradients of weight, bias, `A` and `B` go to `gradients` where wanted.
///
/// With `u = dropout(x) A^T` and `du = scale dy B`: `dB = scale dy^T u`, `dA = du^T dropout(x)`,
/// `dW = dy^T x` and `dx = dy W + dropout(du A)`.
pub fn backward(
    saved: &Saved,
    layer: &Layer<'_>,
    pass: &Pass<'_>,
    dy: &Tensor,
    wants_dx: bool,
    gradients: &mut Gradients,
) -> Result<Option<Tensor>> {
    let Weight::Dense(weight) = layer.weight;
    let wide = working(dy)?;
    if gradients.wants(weight) {
        gradients.add(weight, &matmul_f32(&wide.t()?, &saved.x)?)?;
    }
    if let Some(bias) = layer.bias.filter(|bias| gradients.wants(bias)) {
        gradients.add(bias, &wide.to_dtype(DType::F32)?.sum(0)?)?;
    }
    let mut dx = if wants_dx { Some(wide.matmul(&working(weight.tensor())?)?) } else { None };
    if let (Some(low_rank), Some(inner)) = (layer.low_rank, &saved.inner) {
        let delta = low_rank_backward(&saved.x, inner, low_rank, pass, &wide, wants_dx, gradients)?;
        dx = match (dx, delta) {
            (Some(dx), Some(delta)) => Some((dx + delta)?),
            (dx, _) => dx,
        };
    }
    dx.map(|dx| rounded(&dx, dy.dtype())).transpose()
}

/// The low-rank term alone, and `u = dropout(x) A^T`.
pub fn low_rank_forward(x: &Tensor, low_rank: &LowRank, pass: &Pass<'_>) -> Result<(Tensor, Tensor)> {
    let a = low_rank.a.tensor().to_dtype(x.dtype())?;
    let b = low_rank.b.tensor().to_dtype(x.dtype())?;
    let inner = dropout::apply(x, &low_rank.dropout, pass)?.matmul(&a.t()?)?; // [tokens, rank]
    let mut delta = (&inner * low_rank.scale)?.matmul(&b.t()?)?; // [tokens, out]
    if let Some(bias) = &low_rank.bias {
        delta = delta.broadcast_add(&(bias.tensor().to_dtype(x.dtype())? * low_rank.scale)?)?;
    }
    Ok((delta, inner))
}

fn low_rank_backward(
    x: &Tensor,
    inner: &Tensor,
    low_rank: &LowRank,
    pass: &Pass<'_>,
    dy: &Tensor,
    wants_dx: bool,
    gradients: &mut Gradients,
) -> Result<Option<Tensor>> {
    let (a, b) = (&low_rank.a, &low_rank.b);
    let wants_a = gradients.wants(a);
    if gradients.wants(b) {
        gradients.add(b, &(matmul_f32(&dy.t()?, inner)? * low_rank.scale)?)?;
    }
    if let Some(bias) = low_rank.bias.as_ref().filter(|bias| gradients.wants(bias)) {
        gradients.add(bias, &(dy.to_dtype(DType::F32)?.sum(0)? * low_rank.scale)?)?;
    }
    if !wants_a && !wants_dx {
        return Ok(None);
    }
    let d_inner = (dy.matmul(&b.tensor().to_dtype(dy.dtype())?)? * low_rank.scale)?; // [tokens, rank]
    if wants_a {
        let dropped = dropout::apply(&working(x)?, &low_rank.dropout, pass)?;
        gradients.add(a, &matmul_f32(&d_inner.t()?, &dropped)?)?;
    }
    if !wants_dx {
        return Ok(None);
    }
    let dx = d_inner.matmul(&a.tensor().to_dtype(dy.dtype())?)?; // [tokens, in]
    Ok(Some(dropout::apply(&dx, &low_rank.dropout, pass)?))
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
