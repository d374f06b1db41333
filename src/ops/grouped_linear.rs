//! Linear layers side by side, each of which takes some of the rows: `y[r] = layer[expert of r](x[r])`.
//!
//! `x` is `[rows, in]`, grouped by [`Groups`]; each layer is that of [`linear`], with its low-rank term and dropout. The cost
//! follows the rows. Experts are computed side by side, products within them on the threads that are left.

use candle_core::Tensor;
use rayon::prelude::*;

use super::linear::{self, Layer};
use super::matmul::stacked_sums;
use super::{Gradients, Groups, Op, Operand, Pass, sum_of_products};
use crate::error::{Error, Result};

/// What the backward needs, of each expert that has rows.
#[derive(Debug, Clone)]
pub struct Saved {
    parts: Vec<Option<linear::Saved>>,
}

impl Saved {
    /// Drops the input, which [`Saved::set_input`] gives again where a gradient needs it.
    pub fn drop_input(&mut self) {
        self.parts.iter_mut().flatten().for_each(linear::Saved::drop_input);
    }

    /// Gives the input again.
    pub fn set_input(&mut self, x: &Tensor, groups: &Groups) -> Result<()> {
        for (expert, part) in self.parts.iter_mut().enumerate() {
            if let Some(part) = part {
                part.set_input(&rows(x, groups, expert)?);
            }
        }
        Ok(())
    }

    fn part(&self, expert: usize) -> Result<&linear::Saved> {
        self.parts[expert].as_ref().ok_or_else(|| Error::invalid("an expert's forward was not kept"))
    }
}

/// `y [rows, out]` of each kind of layer, all of which have one input, and what the backward needs.
pub fn forward_of_all(
    x: &Tensor,
    kinds: &[&[Layer<'_>]],
    groups: &Groups,
    pass: &Pass<'_>,
) -> Result<Vec<(Tensor, Saved)>> {
    let inners = of_each(groups, |expert| {
        let layers: Vec<Layer<'_>> = kinds.iter().map(|layers| layers[expert]).collect();
        let pass = pass.of_rows(&groups.tokens()[groups.range(expert)]);
        linear::inners(&rows(x, groups, expert)?, &layers, &pass)
    })?;
    let of_kind = |(kind, layers): (usize, &&[Layer<'_>])| {
        let inner = |expert: usize| inners[expert].as_ref().and_then(|all| all[kind].as_ref());
        let y = side_by_side(x, groups, width_of(layers, 0)?, |expert| {
            Ok(linear::terms(&rows(x, groups, expert)?, &layers[expert], inner(expert)))
        })?;
        let biased =
            |layer: &Layer<'_>| layer.bias.is_some() || layer.low_rank.is_some_and(|l| l.bias.is_some());
        let y = if layers.iter().any(biased) {
            joined(
                of_each(groups, |expert| linear::add_biases(rows(&y, groups, expert)?, &layers[expert]))?,
                &y,
            )?
        } else {
            y
        };
        let part = |expert: usize| {
            let is_there = !groups.range(expert).is_empty();
            let saved = || Ok(linear::Saved::new(&rows(x, groups, expert)?, inner(expert).cloned()));
            is_there.then(saved).transpose()
        };
        Ok((y, Saved { parts: (0..groups.len()).map(part).collect::<Result<_>>()? }))
    };
    kinds.iter().enumerate().map(of_kind).collect()
}

/// The same of one kind.
pub fn forward(
    x: &Tensor,
    layers: &[Layer<'_>],
    groups: &Groups,
    pass: &Pass<'_>,
) -> Result<(Tensor, Saved)> {
    let mut all = forward_of_all(x, &[layers], groups, pass)?;
    all.pop().ok_or_else(|| Error::invalid("a forward of no layers"))
}

/// The sum of the `dx` of kinds of layers that have one input, when `wants_dx`: `(layers, saved, dy)` of each. Gradients go to
/// `gradients` where wanted; those of an expert without rows are zero.
pub fn backward_of_all(
    all: &[(&[Layer<'_>], &Saved, &Tensor)],
    groups: &Groups,
    pass: &Pass<'_>,
    wants_dx: bool,
    gradients: &mut Gradients,
) -> Result<Option<Tensor>> {
    let kinds: Vec<&[Layer<'_>]> = all.iter().map(|(layers, _, _)| *layers).collect();
    let d_inners = with_gradients(groups, &kinds, gradients, |expert, gradients| {
        let pass = pass.of_rows(&groups.tokens()[groups.range(expert)]);
        let dys = of_rows(all.iter().map(|(_, _, dy)| *dy), groups, expert)?;
        let towards = all.iter().zip(&dys);
        let towards = towards.map(|((layers, saved, _), dy)| Ok((layers[expert], saved.part(expert)?, dy)));
        linear::gradients_of_all(&towards.collect::<Result<Vec<_>>>()?, &pass, wants_dx, gradients)
    })?;
    if !wants_dx {
        return Ok(None);
    }
    dx(all, &d_inners, groups, pass).map(Some)
}

/// `dy W + dropout(du A)`, summed over the kinds, of all rows.
fn dx(
    all: &[(&[Layer<'_>], &Saved, &Tensor)],
    d_inners: &[Option<Vec<Option<Tensor>>>],
    groups: &Groups,
    pass: &Pass<'_>,
) -> Result<Tensor> {
    let Some((layers, _, dy)) = all.first() else { return Err(Error::invalid("a backward of no layers")) };
    let d_inner = |expert: usize| d_inners[expert].as_deref().unwrap_or_default();
    let drops = |layer: &Layer<'_>| layer.low_rank.is_some_and(|low_rank| low_rank.dropout.drops(pass));
    if all.iter().any(|(layers, _, _)| layers.iter().any(drops)) {
        let dxs = of_each(groups, |expert| {
            let pass = pass.of_rows(&groups.tokens()[groups.range(expert)]);
            let dys = of_rows(all.iter().map(|(_, _, dy)| *dy), groups, expert)?;
            let towards = all.iter().zip(&dys);
            let towards =
                towards.map(|((layers, saved, _), dy)| Ok((layers[expert], saved.part(expert)?, dy)));
            linear::dx(&towards.collect::<Result<Vec<_>>>()?, d_inner(expert), &pass)
        })?;
        return joined(dxs, &Tensor::zeros((0, width_of(layers, 1)?), dy.dtype(), dy.device())?);
    }
    side_by_side(dy, groups, width_of(layers, 1)?, |expert| {
        let dys = of_rows(all.iter().map(|(_, _, dy)| *dy), groups, expert)?;
        let towards: Vec<_> = all.iter().zip(&dys).map(|((layers, _, _), dy)| (layers[expert], dy)).collect();
        Ok(linear::dx_terms(&towards, d_inner(expert), pass))
    })
}

/// What [`input_gradients`] takes from [`backward_without_input`]: `du` of each expert.
pub type Inner = Vec<Option<Tensor>>;

/// As [`backward_of_all`] for one kind of layer whose input was dropped: `dx`, and what [`input_gradients`] takes.
pub fn backward_without_input(
    saved: &Saved,
    layers: &[Layer<'_>],
    groups: &Groups,
    pass: &Pass<'_>,
    dy: &Tensor,
    wants_dx: bool,
    gradients: &mut Gradients,
) -> Result<(Option<Tensor>, Inner)> {
    let d_inners = with_gradients(groups, &[layers], gradients, |expert, gradients| {
        let dy = rows(dy, groups, expert)?;
        let d_inner =
            linear::output_gradients(saved.part(expert)?, &layers[expert], &dy, wants_dx, gradients)?;
        Ok(vec![d_inner])
    })?;
    let dx = if wants_dx { Some(dx(&[(layers, saved, dy)], &d_inners, groups, pass)?) } else { None };
    let inner = d_inners.into_iter().map(|part| part.and_then(|mut all| all.pop().flatten()));
    Ok((dx, inner.collect()))
}

/// The gradients that take the layers' input, where wanted.
pub fn input_gradients(
    layers: &[Layer<'_>],
    x: &Tensor,
    inner: &Inner,
    groups: &Groups,
    dy: &Tensor,
    pass: &Pass<'_>,
    gradients: &mut Gradients,
) -> Result<()> {
    if !layers.iter().any(|layer| layer.needs_input(gradients)) {
        return Ok(());
    }
    with_gradients(groups, &[layers], gradients, |expert, gradients| {
        let pass = pass.of_rows(&groups.tokens()[groups.range(expert)]);
        let (x, dy) = (rows(x, groups, expert)?, rows(dy, groups, expert)?);
        linear::input_gradients(&layers[expert], &x, inner[expert].as_ref(), &dy, &pass, gradients)
    })?;
    Ok(())
}

/// A layer as [`reference`] takes it: the weight, and `A`, `B` and the scale of its low-rank term.
pub type Plain = (Tensor, Option<(Tensor, Tensor, f64)>);

/// The same composed of candle primitives.
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

/// `f(expert)` of each expert that has rows.
fn of_each<R: Send>(groups: &Groups, f: impl Fn(usize) -> Result<R> + Sync) -> Result<Vec<Option<R>>> {
    (0..groups.len())
        .into_par_iter()
        .with_max_len(1)
        .map(|expert| if groups.range(expert).is_empty() { Ok(None) } else { f(expert).map(Some) })
        .collect()
}

/// The same, where `f` adds gradients of the expert's layers.
fn with_gradients<R: Send>(
    groups: &Groups,
    layers: &[&[Layer<'_>]],
    gradients: &mut Gradients,
    f: impl Fn(usize, &mut Gradients) -> Result<R> + Sync,
) -> Result<Vec<Option<R>>> {
    let wanted: &Gradients = gradients;
    let of_expert = |expert: usize| layers.iter().flat_map(move |layers| layers[expert].parameters());
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

/// The rows of each expert below one another: those of `f(expert)`, summed products.
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

/// The rows of an expert in each of several tensors.
fn of_rows<'x>(all: impl Iterator<Item = &'x Tensor>, groups: &Groups, expert: usize) -> Result<Vec<Tensor>> {
    all.map(|x| rows(x, groups, expert)).collect()
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
