//! Linear layers side by side, each of which takes some of the rows: `y[r] = layer[expert of r](x[r])`.
//!
//! [`spread`] takes tokens to the rows of their experts, [`join`] is the layer behind which rows go back to tokens: what it gives is
//! weighed and summed by [`groups::combine`]. Rows are grouped by
//! [`Groups`]; each layer is that of [`linear`], with its low-rank term and dropout. The cost follows the rows. Experts are
//! computed side by side, products within them on the threads that are left.

pub mod join;
pub mod spread;
mod stack;

pub use stack::is_stacked;

use candle_core::Tensor;
use rayon::prelude::*;

use super::linear::{self, Layer};
use super::matmul::{Terms, stacked_sums};
use super::{Gradients, Groups, Op, Pass, groups, sum_of_products};
use crate::error::{Error, Result};

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

/// The rows that experts take.
#[derive(Debug, Clone, Copy)]
enum Rows<'x> {
    /// `[rows, d]`
    Together(&'x Tensor),
    /// `[tokens, d]`: an expert's are gathered when it is its turn, so that they are read while they are in the cache.
    OfTokens(&'x Tensor),
}

impl Rows<'_> {
    fn of(&self, groups: &Groups, expert: usize) -> Result<Tensor> {
        match self {
            Self::Together(x) => rows(x, groups, expert),
            Self::OfTokens(x) => groups::gather(x, groups, groups.range(expert)),
        }
    }

    fn tensor(&self) -> &Tensor {
        let (Self::Together(x) | Self::OfTokens(x)) = self;
        x
    }
}

/// `f(expert)` of each expert that has rows.
fn of_each<R: Send>(groups: &Groups, f: impl Fn(usize) -> Result<R> + Sync) -> Result<Vec<Option<R>>> {
    (0..groups.len())
        .into_par_iter()
        .with_max_len(1)
        .map(|expert| if groups.range(expert).is_empty() { Ok(None) } else { f(expert).map(Some) })
        .collect()
}

/// The same, where `f` adds gradients of the expert's layers; an expert without rows adds nothing to them.
fn with_gradients<R: Send>(
    groups: &Groups,
    kinds: &[&[Layer<'_>]],
    gradients: &mut Gradients,
    f: impl Fn(usize, &mut Gradients) -> Result<R> + Sync,
) -> Result<Vec<Option<R>>> {
    let of_expert = |expert: usize| kinds.iter().flat_map(move |layers| layers[expert].parameters());
    let parts: Vec<Gradients> = (0..groups.len()).map(|expert| gradients.take(of_expert(expert))).collect();
    let of_part = |(expert, mut part): (usize, Gradients)| -> Result<(Option<R>, Gradients)> {
        let result = match groups.range(expert).is_empty() {
            true => None,
            false => Some(f(expert, &mut part)?),
        };
        Ok((result, part))
    };
    let done: Vec<(Option<R>, Gradients)> =
        parts.into_par_iter().enumerate().with_max_len(1).map(of_part).collect::<Result<_>>()?;
    let mut results = Vec::with_capacity(done.len());
    for (expert, (result, part)) in done.into_iter().enumerate() {
        gradients.put_back(part)?;
        if result.is_none() {
            of_expert(expert).try_for_each(|parameter| gradients.add_nothing(parameter))?;
        }
        results.push(result);
    }
    Ok(results)
}

/// `y [rows, out]` of each kind of layer, with low-rank terms and biases.
fn outputs(x: Rows<'_>, kinds: &[&[Layer<'_>]], inners: &Inners, groups: &Groups) -> Result<Vec<Tensor>> {
    let widths: Vec<usize> = kinds.iter().map(|layers| width_of(layers, 0)).collect::<Result<_>>()?;
    let ys = side_by_side(x.tensor(), groups, &widths, |expert| {
        let x = x.of(groups, expert)?;
        let of_kinds = kinds.iter().zip(&inners[expert]);
        Ok(of_kinds.map(|(layers, inner)| linear::terms(&x, &layers[expert], inner.as_ref())).collect())
    })?;
    let biased = |(y, layers): (Tensor, &&[Layer<'_>])| {
        if !layers.iter().any(Layer::is_biased) {
            return Ok(y);
        }
        joined(of_each(groups, |expert| linear::add_biases(rows(&y, groups, expert)?, &layers[expert]))?, &y)
    };
    ys.into_iter().zip(kinds).map(biased).collect()
}

/// The sum over kinds of `dy W + dropout(du A)`, for all rows; `du` may be left out to be added elsewhere.
fn input_rows<'l>(
    kinds: &[(&[Layer<'l>], Rows<'_>)],
    d_inners: Option<&Inners>,
    groups: &Groups,
    pass: &Pass<'_>,
) -> Result<Tensor> {
    let Some((layers, dy)) = kinds.first() else { return Err(Error::invalid("a backward of no layers")) };
    let (width, dy) = (width_of(layers, 1)?, dy.tensor());
    let of_expert = |expert: usize| -> Result<Vec<linear::Back<'l>>> {
        let back = |(kind, (layers, dy)): (usize, &(&[Layer<'l>], Rows<'_>))| {
            let d_inner = d_inners.and_then(|all| all[expert].get(kind)?.clone());
            Ok(linear::Back { layer: layers[expert], dy: dy.of(groups, expert)?, d_inner })
        };
        kinds.iter().enumerate().map(back).collect()
    };
    let drops = |layer: &Layer<'_>| layer.low_rank.is_some_and(|low_rank| low_rank.dropout.drops(pass));
    if d_inners.is_some() && kinds.iter().any(|(layers, _)| layers.iter().any(drops)) {
        let dxs = of_each(groups, |expert| {
            let pass = pass.of_rows(&groups.tokens()[groups.range(expert)]);
            linear::dx(&of_expert(expert)?, &[], dy.dtype(), &pass)
        })?;
        return joined(dxs, &Tensor::zeros((0, width), dy.dtype(), dy.device())?);
    }
    let mut dxs = side_by_side(dy, groups, &[width], |expert| {
        Ok(vec![linear::dx_terms(&of_expert(expert)?, pass)])
    })?;
    Ok(dxs.remove(0))
}

/// Of each result the rows of each expert below one another: `f(expert)` gives their terms. In the type of `x`.
fn side_by_side<'l>(
    x: &Tensor,
    groups: &Groups,
    widths: &[usize],
    f: impl Fn(usize) -> Result<Vec<Terms<'l>>> + Sync,
) -> Result<Vec<Tensor>> {
    let _time = Op::Linear.begin();
    let experts: Vec<usize> = (0..groups.len()).filter(|expert| !groups.range(*expert).is_empty()).collect();
    if x.device().is_cpu() {
        let ranges: Vec<_> = experts.iter().map(|expert| groups.range(*expert)).collect();
        return stacked_sums(&ranges, widths, x.dtype(), |part| f(experts[part]));
    }
    let parts = of_each(groups, |expert| {
        let sum = |terms: Terms<'_>| {
            let terms: Vec<_> = terms.iter().map(|(a, b)| (a, *b)).collect();
            sum_of_products(&terms, x.dtype())
        };
        f(expert)?.into_iter().map(sum).collect::<Result<Vec<_>>>()
    })?;
    let of_result = |(index, width): (usize, &usize)| {
        let parts = parts.iter().map(|part| part.as_ref().map(|part| part[index].clone())).collect();
        joined(parts, &Tensor::zeros((0, *width), x.dtype(), x.device())?)
    };
    widths.iter().enumerate().map(of_result).collect()
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
