//! Linear layers side by side, each of which takes some of the rows: `y[r] = layer[expert of r](x[r])`.
//!
//! [`spread`] takes tokens to the rows of their experts, [`join`] takes rows back to tokens, weighed. Rows are grouped by
//! [`Groups`]; each layer is that of [`linear`], with its low-rank term and dropout. The cost follows the rows. Experts are
//! computed side by side, products within them on the threads that are left.

pub mod join;
pub mod spread;
mod stack;

use candle_core::Tensor;
use rayon::prelude::*;

use super::linear::{self, Layer};
use super::matmul::stacked_sums;
use super::{Gradients, Groups, Op, Operand, Pass, sum_of_products};
use crate::error::Result;

/// `scale dropout(x) A^T` or its gradient, `[rows, rank]` in f32: of each expert that has rows, of each kind of layer.
type Inners = Vec<Vec<Option<Tensor>>>;

/// A layer as [`reference`] takes it: the weight, and `A`, `B` and the scale of its low-rank term.
pub type Plain = (Tensor, Option<(Tensor, Tensor, f64)>);

/// `y [rows, out]` for rows that are grouped already, composed of candle primitives.
pub fn reference(x: &Tensor, layers: &[Plain], groups: &Groups) -> Result<Tensor> {
    let mut parts = Vec::new();
    for (expert, (weight, low_rank)) in layers.iter().enumerate() {
        if !groups.range(expert).is_empty() {
            let low_rank = low_rank.as_ref().map(|(a, b, scale)| (a, b, *scale));
            parts.push(linear::reference(&rows(x, groups, expert)?, weight, None, low_rank, None)?);
        }
    }
    Ok(Tensor::cat(&parts, 0)?)
}

fn rows(x: &Tensor, groups: &Groups, expert: usize) -> Result<Tensor> {
    let range = groups.range(expert);
    Ok(x.narrow(0, range.start, range.len())?)
}

/// The rows of an expert in each of several tensors.
fn of_rows<'x>(all: impl Iterator<Item = &'x Tensor>, groups: &Groups, expert: usize) -> Result<Vec<Tensor>> {
    all.map(|x| rows(x, groups, expert)).collect()
}

/// `f(expert)` of each expert that has rows.
fn of_each<R: Send>(groups: &Groups, f: impl Fn(usize) -> Result<R> + Sync) -> Result<Vec<Option<R>>> {
    (0..groups.len())
        .into_par_iter()
        .with_max_len(1)
        .map(|expert| if groups.range(expert).is_empty() { Ok(None) } else { f(expert).map(Some) })
        .collect()
}

/// The same, where `f` adds gradients of the expert's layers; those of an expert without rows are zero.
fn with_gradients<R: Send>(
    groups: &Groups,
    kinds: &[&[Layer<'_>]],
    gradients: &mut Gradients,
    f: impl Fn(usize, &mut Gradients) -> Result<R> + Sync,
) -> Result<Vec<Option<R>>> {
    let wanted: &Gradients = gradients;
    let of_expert = |expert: usize| kinds.iter().flat_map(move |layers| layers[expert].parameters());
    let parts: Vec<Option<(R, Gradients)>> = of_each(groups, |expert| {
        let mut part = wanted.part(of_expert(expert));
        Ok((f(expert, &mut part)?, part))
    })?;
    let mut results = Vec::with_capacity(parts.len());
    for (expert, part) in parts.into_iter().enumerate() {
        let Some((result, part)) = part else {
            of_expert(expert).try_for_each(|parameter| gradients.add_nothing(parameter))?;
            results.push(None);
            continue;
        };
        gradients.absorb(part)?;
        results.push(Some(result));
    }
    Ok(results)
}

/// `y [rows, out]` of one kind of layer, with the low-rank term and biases.
fn outputs(x: &Tensor, layers: &[Layer<'_>], inners: &Inners, kind: usize, groups: &Groups) -> Result<Tensor> {
    let y = side_by_side(x, groups, width_of(layers, 0)?, |expert| {
        Ok(linear::terms(&rows(x, groups, expert)?, &layers[expert], inners[expert][kind].as_ref()))
    })?;
    if !layers.iter().any(|layer| layer.is_biased()) {
        return Ok(y);
    }
    joined(of_each(groups, |expert| linear::add_biases(rows(&y, groups, expert)?, &layers[expert]))?, &y)
}

/// The sum over kinds of `dy W + dropout(du A)`, for all rows; `du` may be left out to be added elsewhere.
fn input_rows(
    kinds: &[(&[Layer<'_>], &Tensor)],
    d_inners: Option<&Inners>,
    groups: &Groups,
    pass: &Pass<'_>,
) -> Result<Tensor> {
    let width = kinds.first().map_or(Ok(0), |(layers, _)| width_of(layers, 1))?;
    let d_inner = |expert: usize| d_inners.map_or(&[][..], |all| all[expert].as_slice());
    let towards = |expert: usize| -> Result<(Vec<Layer<'_>>, Vec<Tensor>)> {
        let dys = of_rows(kinds.iter().map(|(_, dy)| *dy), groups, expert)?;
        Ok((kinds.iter().map(|(layers, _)| layers[expert]).collect(), dys))
    };
    let drops = |layer: &Layer<'_>| layer.low_rank.is_some_and(|low_rank| low_rank.dropout.drops(pass));
    let dy = kinds[0].1;
    if d_inners.is_some() && kinds.iter().any(|(layers, _)| layers.iter().any(drops)) {
        let dxs = of_each(groups, |expert| {
            let (layers, dys) = towards(expert)?;
            let pairs: Vec<_> = layers.into_iter().zip(&dys).collect();
            linear::dx(&pairs, d_inner(expert), &pass.of_rows(&groups.tokens()[groups.range(expert)]))
        })?;
        return joined(dxs, &Tensor::zeros((0, width), dy.dtype(), dy.device())?);
    }
    side_by_side(dy, groups, width, |expert| {
        let (layers, dys) = towards(expert)?;
        let pairs: Vec<_> = layers.into_iter().zip(&dys).collect();
        Ok(linear::dx_terms(&pairs, d_inner(expert), pass))
    })
}

/// The rows of each expert below one another: those of `f(expert)`, summed products, in the type of `x`.
fn side_by_side<'l>(
    x: &Tensor,
    groups: &Groups,
    width: usize,
    f: impl Fn(usize) -> Result<Vec<(Tensor, Operand<'l>)>> + Sync,
) -> Result<Tensor> {
    let _time = Op::Linear.begin();
    let experts: Vec<usize> = (0..groups.len()).filter(|expert| !groups.range(*expert).is_empty()).collect();
    if x.device().is_cpu() {
        let ranges: Vec<_> = experts.iter().map(|expert| groups.range(*expert)).collect();
        return stacked_sums(&ranges, width, x.dtype(), |part| f(experts[part]));
    }
    let part = |expert: usize| {
        let terms = f(expert)?;
        let terms: Vec<_> = terms.iter().map(|(a, b)| (a, *b)).collect();
        sum_of_products(&terms, x.dtype())
    };
    joined(of_each(groups, part)?, &Tensor::zeros((0, width), x.dtype(), x.device())?)
}

/// Rows (0) or columns (1) of a weight.
fn width_of(layers: &[Layer<'_>], side: usize) -> Result<usize> {
    let Some(layer) = layers.first() else { return Ok(0) };
    let (out, input) = layer.weight.dims()?;
    Ok(if side == 0 { out } else { input })
}

/// The parts below one another; `none` where there are none.
fn joined(parts: Vec<Option<Tensor>>, none: &Tensor) -> Result<Tensor> {
    let parts: Vec<Tensor> = parts.into_iter().flatten().collect();
    if parts.is_empty() { Ok(none.clone()) } else { Ok(Tensor::cat(&parts, 0)?) }
}
