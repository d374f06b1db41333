//! Linear layers side by side, each of which takes some of the rows: `y[r] = layer[expert of r](x[r])`.
//!
//! `x` is `[rows, in]`, grouped by [`Groups`]; each layer is that of [`linear`], with its low-rank term and dropout. The cost
//! follows the rows. Experts are computed side by side, products within them on the threads that are left.

use candle_core::Tensor;
use rayon::prelude::*;

use super::linear::{self, Layer};
use super::{Gradients, Groups, Pass};
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

/// `y [rows, out]`, and what the backward needs.
pub fn forward(
    x: &Tensor,
    layers: &[Layer<'_>],
    groups: &Groups,
    pass: &Pass<'_>,
) -> Result<(Tensor, Saved)> {
    let parts = of_each(groups, |expert| {
        let pass = pass.of_rows(&groups.tokens()[groups.range(expert)]);
        linear::forward(&rows(x, groups, expert)?, &layers[expert], &pass)
    })?;
    let (ys, parts): (Vec<_>, Vec<_>) = parts.into_iter().map(Option::unzip).unzip();
    Ok((joined(ys, layers, x)?, Saved { parts }))
}

/// The sum of the `dx` of layers that have one input, when `wants_dx`: `(layers, saved, dy)` of each. Gradients go to
/// `gradients` where wanted; those of an expert without rows are zero.
pub fn backward_of_all(
    all: &[(&[Layer<'_>], &Saved, &Tensor)],
    groups: &Groups,
    pass: &Pass<'_>,
    wants_dx: bool,
    gradients: &mut Gradients,
) -> Result<Option<Tensor>> {
    let layers: Vec<&[Layer<'_>]> = all.iter().map(|(layers, _, _)| *layers).collect();
    let dxs = with_gradients(groups, &layers, gradients, |expert, gradients| {
        let pass = pass.of_rows(&groups.tokens()[groups.range(expert)]);
        let dys: Vec<Tensor> =
            all.iter().map(|(_, _, dy)| rows(dy, groups, expert)).collect::<Result<_>>()?;
        let towards: Vec<_> = all
            .iter()
            .zip(&dys)
            .map(|((layers, saved, _), dy)| Ok((layers[expert], saved.part(expert)?, dy)))
            .collect::<Result<_>>()?;
        linear::backward_of_all(&towards, &pass, wants_dx, gradients)
    })?;
    let Some((_, _, dy)) = all.first() else { return Err(Error::invalid("a backward of no layers")) };
    if !wants_dx {
        return Ok(None);
    }
    let dxs = dxs.into_iter().map(Option::flatten).collect();
    let width = layers[0].first().map_or(Ok(0), |layer| layer.weight.dims().map(|(_, width)| width))?;
    Ok(Some(joined_of(dxs, width, dy)?))
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
    let parts = with_gradients(groups, &[layers], gradients, |expert, gradients| {
        let pass = pass.of_rows(&groups.tokens()[groups.range(expert)]);
        let (saved, dy) = (saved.part(expert)?, rows(dy, groups, expert)?);
        linear::backward_without_input(saved, &layers[expert], &pass, &dy, wants_dx, gradients)
    })?;
    let (dxs, inner): (Vec<_>, Vec<_>) = parts.into_iter().map(Option::unzip).unzip();
    let width = layers.first().map_or(Ok(0), |layer| layer.weight.dims().map(|(_, width)| width))?;
    let dx = match wants_dx {
        true => Some(joined_of(dxs.into_iter().map(Option::flatten).collect(), width, dy)?),
        false => None,
    };
    Ok((dx, inner.into_iter().map(Option::flatten).collect()))
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

fn joined(parts: Vec<Option<Tensor>>, layers: &[Layer<'_>], like: &Tensor) -> Result<Tensor> {
    let width = layers.first().map_or(Ok(0), |layer| layer.weight.dims().map(|(width, _)| width))?;
    joined_of(parts, width, like)
}

fn joined_of(parts: Vec<Option<Tensor>>, width: usize, like: &Tensor) -> Result<Tensor> {
    let parts: Vec<Tensor> = parts.into_iter().flatten().collect();
    if parts.is_empty() {
        return Ok(Tensor::zeros((0, width), like.dtype(), like.device())?);
    }
    Ok(Tensor::cat(&parts, 0)?)
}
