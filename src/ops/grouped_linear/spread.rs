//! Layers of experts that take tokens: `y[r] = layer[expert of r](x[token of r])`, several kinds of one input at once.

use candle_core::Tensor;

use super::stack::Stack;
use super::{Groups, Inners, Layer, Pass, Rows, input_rows, of_each, outputs, rows, with_gradients};
use crate::error::{Error, Result};
use crate::ops::{Gradients, groups, linear};

/// What the backward needs.
#[derive(Debug, Clone)]
pub struct Saved {
    /// `[tokens, in]`; not needed for `dx`.
    x: Option<Tensor>,
    inners: Inners,
}

impl Saved {
    /// Drops the input, which [`Saved::set_input`] gives again where a gradient needs it.
    pub fn drop_input(&mut self) {
        self.x = None;
    }

    /// Whether the input was not dropped.
    #[must_use]
    pub fn has_input(&self) -> bool {
        self.x.is_some()
    }

    /// Gives the input again, `[tokens, in]`.
    pub fn set_input(&mut self, x: &Tensor) {
        self.x = Some(x.clone());
    }

    fn x(&self) -> Result<&Tensor> {
        self.x.as_ref().ok_or_else(|| Error::invalid("the input of experts was not kept for their gradients"))
    }
}

/// The gradient of the input, not summed yet: `dx[t] = (du A)[t] + sum over the rows r of t of of_rows[r]`.
#[derive(Debug)]
pub struct Back {
    /// `[rows, in]`
    pub of_rows: Tensor,
    /// `du [tokens, all ranks]` and `A [all ranks, in]` of low-rank terms that are one for all experts.
    pub through: Option<(Tensor, Tensor)>,
}

/// `y [rows, out]` of each kind of layer for `x [tokens, in]`, and what the backward needs.
pub fn forward(
    x: &Tensor,
    kinds: &[&[Layer<'_>]],
    groups: &Groups,
    pass: &Pass<'_>,
) -> Result<(Vec<Tensor>, Saved)> {
    let has_low_rank = kinds.iter().any(|layers| layers.iter().any(|layer| layer.low_rank.is_some()));
    let over_tokens = match Stack::of(kinds, groups, pass) {
        Some(stack) => Some(stack.inners(x, groups)?),
        None => (!has_low_rank).then(|| vec![vec![None; kinds.len()]; groups.len()]),
    };
    let (inners, ys) = match over_tokens {
        Some(inners) => {
            let ys = outputs(Rows::OfTokens(x), kinds, &inners, groups)?;
            (inners, ys)
        }
        None => {
            let of_rows = groups::gather_all(x, groups)?; // [rows, in]
            let inners = of_each(groups, |expert| {
                let layers: Vec<Layer<'_>> = kinds.iter().map(|layers| layers[expert]).collect();
                let pass = pass.of_rows(&groups.tokens()[groups.range(expert)]);
                linear::inners(&rows(&of_rows, groups, expert)?, &layers, &pass)
            })?;
            let inners: Inners = inners.into_iter().map(Option::unwrap_or_default).collect();
            let ys = outputs(Rows::Together(&of_rows), kinds, &inners, groups)?;
            (inners, ys)
        }
    };
    Ok((ys, Saved { x: Some(x.clone()), inners }))
}

/// The gradient of the input, of all kinds together, when `wants_dx`, from `dy [rows, out]` of each. Gradients go to `gradients`
/// where wanted; those of an expert without rows are zero.
pub fn backward(
    saved: &Saved,
    kinds: &[(&[Layer<'_>], &Tensor)],
    groups: &Groups,
    pass: &Pass<'_>,
    wants_dx: bool,
    gradients: &mut Gradients,
) -> Result<Option<Back>> {
    let layers: Vec<&[Layer<'_>]> = kinds.iter().map(|(layers, _)| *layers).collect();
    let stack = Stack::of(&layers, groups, pass);
    let takes_rows = |layer: &Layer<'_>| match &stack {
        Some(_) => gradients.wanted(layer.weight).is_some(),
        None => layer.needs_input(gradients),
    };
    let x = match layers.iter().any(|layers| layers.iter().any(takes_rows)) {
        true => Some(groups::gather_all(saved.x()?, groups)?),
        false => None,
    };
    let d_inners = with_gradients(groups, &layers, gradients, |expert, gradients| {
        let pass = pass.of_rows(&groups.tokens()[groups.range(expert)]);
        let dys: Vec<Tensor> = kinds.iter().map(|(_, dy)| rows(dy, groups, expert)).collect::<Result<_>>()?;
        let x = x.as_ref().map(|x| rows(x, groups, expert)).transpose()?;
        let all: Vec<_> = layers
            .iter()
            .zip(saved.inners[expert].iter().zip(&dys))
            .map(|(layers, (inner, dy))| (layers[expert], inner.as_ref(), dy))
            .collect();
        match &stack {
            None => linear::gradients_of_all(x.as_ref(), &all, &pass, wants_dx, gradients),
            Some(_) => {
                let of_layer = |(layer, inner, dy): &(Layer<'_>, Option<&Tensor>, &Tensor)| {
                    if let Some(x) = &x {
                        linear::weight_gradient(layer, x, dy, gradients)?;
                    }
                    linear::output_gradients(*inner, layer, dy, wants_dx, gradients)
                };
                all.iter().map(of_layer).collect()
            }
        }
    })?;
    let d_inners: Inners = d_inners.into_iter().map(Option::unwrap_or_default).collect();
    let towards: Vec<_> = kinds.iter().map(|(layers, dy)| (*layers, Rows::Together(dy))).collect();
    let Some(stack) = stack else {
        let of_rows = || input_rows(&towards, Some(&d_inners), groups, pass);
        return if wants_dx { Ok(Some(Back { of_rows: of_rows()?, through: None })) } else { Ok(None) };
    };
    let dtype = kinds[0].1.dtype();
    let du = stack.of_tokens(&d_inners, groups, None, dtype)?;
    drop(d_inners);
    if let Some(x) = &saved.x {
        stack.a_gradients(&du, x, gradients)?;
    }
    if !wants_dx {
        return Ok(None);
    }
    let through = Some((du, stack.a()?));
    Ok(Some(Back { of_rows: input_rows(&towards, None, groups, pass)?, through }))
}
