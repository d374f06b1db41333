//! Gated networks side by side, each of which takes some of the tokens:
//! `y[t] = sum over the rows r of t of weight[r] network[expert of r](x[t])`, where `network(x)` is
//! `down(activation(gate(x)) * up(x))` and the sum is left to [`groups::combine`].
//!
//! Rows are grouped by [`Groups`]; each layer is that of [`linear`], with its low-rank term and dropout. The cost follows the
//! rows. An expert goes through all its layers at a stretch: its rows are gathered when it is its turn, and no step waits for
//! another expert. Where there are many experts of many rows each is one thread's, and what it computes stays in the cache of
//! that core.

mod down;
mod inside;
mod stack;

pub use stack::is_stacked;

use candle_core::Tensor;
use rayon::prelude::*;

use super::kernel::alone;
use super::linear::{self, Layer};
use super::{Activation, Gradients, Groups, Pass, glu, groups};
use crate::error::{Error, Result};
use down::Down;
use inside::Inside;
use stack::Stack;

/// `scale dropout(x) A^T` or its gradient, `[rows, rank]` in f32: of each expert that has rows, of each kind of layer.
type Inners = Vec<Vec<Option<Tensor>>>;

/// The layers of an expert.
#[derive(Debug, Clone, Copy)]
pub struct Expert<'a> {
    /// `[width, hidden]`
    pub gate: Layer<'a>,
    /// `[width, hidden]`
    pub up: Layer<'a>,
    /// `[hidden, width]`
    pub down: Layer<'a>,
}

impl<'a> Expert<'a> {
    /// All values that could be trained.
    fn parameters(self) -> impl Iterator<Item = &'a super::Parameter> {
        [self.gate, self.up, self.down].into_iter().flat_map(Layer::parameters)
    }
}

/// What the backward needs.
#[derive(Debug)]
pub struct Saved {
    /// `[tokens, hidden]`; not needed for `dx`.
    x: Option<Tensor>,
    /// Of those that have rows.
    experts: Vec<Option<SavedExpert>>,
}

#[derive(Debug)]
struct SavedExpert {
    /// `u` of gate and up.
    inners: Vec<Option<Tensor>>,
    unit: glu::Saved,
    /// `u` of down.
    down: Option<Tensor>,
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

    /// Gives the input again, `[tokens, hidden]`.
    pub fn set_input(&mut self, x: &Tensor) {
        self.x = Some(x.clone());
    }

    fn x(&self) -> Result<&Tensor> {
        self.x.as_ref().ok_or_else(|| Error::invalid("the input of experts was not kept for their gradients"))
    }
}

/// The gradients that go on from here.
#[derive(Debug)]
pub struct Backward {
    /// That of the input, where wanted: `dx[t] = (a b)[t] + sum over the rows r of t of of_rows[r]`.
    pub of_rows: Option<Vec<Tensor>>,
    /// `a [tokens, all ranks]` and `b [all ranks, hidden]` of low-rank terms that are one for all experts.
    pub of_tokens: Option<(Tensor, Tensor)>,
    /// Those of the weights, `[tokens * active]`, where wanted; zero for a choice that was dropped.
    pub d_weights: Option<Vec<f32>>,
}

/// What the experts give to their rows, below one another, `[rows, hidden]`, for `x [tokens, hidden]`, and what the backward
/// needs.
pub fn forward(
    x: &Tensor,
    experts: &[Expert<'_>],
    activation: Activation,
    groups: &Groups,
    pass: &Pass<'_>,
) -> Result<(Vec<Tensor>, Saved)> {
    let over_tokens = match stack_inside(experts, groups, pass) {
        Some(stack) => Some(stack.inners(x, groups)?),
        None => None,
    };
    let done = of_each(groups, |number| {
        let Expert { gate, up, down } = experts[number];
        let x = groups::gather(x, groups, groups.range(number))?;
        let pass = pass.of_rows(&groups.tokens()[groups.range(number)]);
        let inners = match &over_tokens {
            Some(all) => all[number].clone(),
            None => linear::inners(&x, &[gate, up], &pass)?,
        };
        let (gate, up) =
            (linear::output(&x, &gate, inners[0].as_ref())?, linear::output(&x, &up, inners[1].as_ref())?);
        let (product, unit) = glu::forward(gate, up, activation)?; // [rows, width]
        let of_down = linear::inner_of(&product, &down, &pass)?;
        let y = linear::output(&product, &down, of_down.as_ref())?; // [rows, hidden]
        Ok((y, SavedExpert { inners, unit, down: of_down }))
    })?;
    let (ys, experts): (Vec<_>, Vec<_>) = done.into_iter().map(Option::unzip).unzip();
    Ok((below_one_another(ys, x)?, Saved { x: Some(x.clone()), experts }))
}

/// The gradients of what the experts hold go to `gradients` where wanted, those of an expert without rows are zero; the others
/// are given, when `wants_dx` and `wants_weights`. `dy` is `[tokens, hidden]`.
pub fn backward(
    saved: Saved,
    (experts, activation): (&[Expert<'_>], Activation),
    (weights, groups): (&[f32], &Groups),
    pass: &Pass<'_>,
    dy: &Tensor,
    (wants_dx, wants_weights): (bool, bool),
    gradients: &mut Gradients,
) -> Result<Backward> {
    let is_trained = |layer: Layer<'_>| layer.parameters().any(|parameter| gradients.wants(parameter));
    let trains_inside = experts.iter().any(|expert| is_trained(expert.gate) || is_trained(expert.up));
    let wants_product = wants_dx || wants_weights || trains_inside;
    if !wants_product && !experts.iter().any(|expert| is_trained(expert.down)) {
        return Ok(Backward { of_rows: None, of_tokens: None, d_weights: None });
    }
    let weights = groups.weights_of_rows(weights);
    let down = Down::new(experts, (&weights, groups), pass, (dy, wants_product), &saved.experts, gradients)?;
    let inside = Inside::new(experts, groups, pass, (dy.dtype(), wants_dx), &saved, gradients)?;
    let done = with_gradients(groups, experts, gradients, |expert, gradients| {
        let Some(own) = saved.experts[expert].as_ref() else {
            return Err(Error::invalid("an expert has rows that it had not in the forward pass"));
        };
        let through = down.backward(expert, own, activation, gradients)?;
        let (dx, d_inners) = match through.inside.filter(|_| wants_dx || trains_inside) {
            Some(d_inside) => inside.backward(expert, &own.inners, d_inside, gradients)?,
            None => (None, Vec::new()),
        };
        Ok((dx, d_inners, through.d_weights))
    })?;
    let (mut dxs, mut d_inners, mut d_weights) = (Vec::new(), Inners::new(), Vec::new());
    for (dx, of_expert, of_rows) in done.into_iter().map(Option::unwrap_or_default) {
        dxs.push(dx);
        d_inners.push(of_expert);
        d_weights.extend(of_rows);
    }
    let of_tokens = if wants_dx || trains_inside { inside.of_tokens(&d_inners, gradients)? } else { None };
    let of_rows = if wants_dx { Some(below_one_another(dxs, dy)?) } else { None };
    let d_weights = wants_weights.then(|| groups.of_choices(&d_weights));
    Ok(Backward { of_rows, of_tokens, d_weights })
}

/// The low-rank terms of gate and up, where all experts' are one.
fn stack_inside<'l>(experts: &[Expert<'l>], groups: &Groups, pass: &Pass<'_>) -> Option<Stack<'l>> {
    let gates: Vec<Layer<'l>> = experts.iter().map(|expert| expert.gate).collect();
    let ups: Vec<Layer<'l>> = experts.iter().map(|expert| expert.up).collect();
    Stack::of(&[&gates, &ups], groups, pass)
}

fn rows(x: &Tensor, groups: &Groups, expert: usize) -> Result<Tensor> {
    let range = groups.range(expert);
    Ok(x.narrow(0, range.start, range.len())?)
}

/// Whether each expert is one thread's: there are enough of them, and their rows outweigh their weights, which all threads
/// read faster than one.
fn has_many(groups: &Groups) -> bool {
    /// Rows of an expert, in the mean.
    const MANY: usize = 16;

    let experts = groups.counts().filter(|rows| *rows > 0).count();
    experts >= 2 * rayon::current_num_threads() && groups.num_rows() >= MANY * experts
}

/// `f()`, of an expert: on this thread where there are `many`, else on all that are free.
fn on_threads<R>(many: bool, f: impl FnOnce() -> R) -> R {
    if many { alone(f) } else { f() }
}

/// `f(expert)` of each expert that has rows, side by side.
fn of_each<R: Send>(groups: &Groups, f: impl Fn(usize) -> Result<R> + Sync) -> Result<Vec<Option<R>>> {
    let many = has_many(groups);
    let of_expert = |expert| match groups.range(expert).is_empty() {
        true => Ok(None),
        false => on_threads(many, || f(expert)).map(Some),
    };
    (0..groups.len()).into_par_iter().with_max_len(1).map(of_expert).collect()
}

/// The same, where `f` adds gradients of the expert's layers; an expert without rows adds nothing to them.
fn with_gradients<R: Send>(
    groups: &Groups,
    experts: &[Expert<'_>],
    gradients: &mut Gradients,
    f: impl Fn(usize, &mut Gradients) -> Result<R> + Sync,
) -> Result<Vec<Option<R>>> {
    let parts: Vec<Gradients> = experts.iter().map(|expert| gradients.take(expert.parameters())).collect();
    let many = has_many(groups);
    let of_part = |(expert, mut part): (usize, Gradients)| -> Result<(Option<R>, Gradients)> {
        let result = match groups.range(expert).is_empty() {
            true => None,
            false => Some(on_threads(many, || f(expert, &mut part))?),
        };
        Ok((result, part))
    };
    let done: Vec<(Option<R>, Gradients)> =
        parts.into_par_iter().enumerate().with_max_len(1).map(of_part).collect::<Result<_>>()?;
    let mut results = Vec::with_capacity(done.len());
    for (expert, (result, part)) in experts.iter().zip(done) {
        gradients.put_back(part)?;
        if result.is_none() {
            expert.parameters().try_for_each(|parameter| gradients.add_nothing(parameter))?;
        }
        results.push(result);
    }
    Ok(results)
}

/// The rows of all experts; one part without rows where there are none, of the width and type of `like`.
fn below_one_another(parts: Vec<Option<Tensor>>, like: &Tensor) -> Result<Vec<Tensor>> {
    let mut parts: Vec<Tensor> = parts.into_iter().flatten().collect();
    if parts.is_empty() {
        parts.push(Tensor::zeros((0, like.dim(1)?), like.dtype(), like.device())?);
    }
    Ok(parts)
}
