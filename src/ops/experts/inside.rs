//! The backward of the layers that take tokens: gate and up.

use candle_core::{DType, Tensor};

use super::{Expert, Inners, Saved, Stack, stack_inside};
use crate::error::Result;
use crate::ops::linear::{self, Back, Layer};
use crate::ops::{Gradients, Groups, Pass, groups};

/// What the experts have in common.
pub(super) struct Inside<'a> {
    experts: &'a [Expert<'a>],
    groups: &'a Groups,
    pass: &'a Pass<'a>,
    /// The type of activations.
    dtype: DType,
    wants_dx: bool,
    stack: Option<Stack<'a>>,
    saved: &'a Saved,
    /// `[tokens, hidden]`, where gradients take the rows of the input.
    x: Option<&'a Tensor>,
}

impl<'a> Inside<'a> {
    pub(super) fn new(
        experts: &'a [Expert<'a>],
        groups: &'a Groups,
        pass: &'a Pass<'a>,
        (dtype, wants_dx): (DType, bool),
        saved: &'a Saved,
        gradients: &Gradients,
    ) -> Result<Self> {
        let stack = stack_inside(experts, groups, pass);
        let takes_rows = |layer: &Layer<'_>| match stack {
            Some(_) => gradients.wanted(layer.weight).is_some(),
            None => layer.needs_input(gradients),
        };
        let x = match experts.iter().any(|expert| takes_rows(&expert.gate) || takes_rows(&expert.up)) {
            true => Some(saved.x()?),
            false => None,
        };
        Ok(Self { experts, groups, pass, dtype, wants_dx, stack, saved, x })
    }

    /// The gradients of what an expert's gate and up hold, where wanted; gives that of their input but for what is one for all
    /// experts, `[rows, hidden]`, where wanted, and `du` of both.
    pub(super) fn backward(
        &self,
        expert: usize,
        inners: &[Option<Tensor>],
        (d_gate, d_up): (Tensor, Tensor),
        gradients: &mut Gradients,
    ) -> Result<(Option<Tensor>, Vec<Option<Tensor>>)> {
        let Expert { gate, up, .. } = self.experts[expert];
        let range = self.groups.range(expert);
        let pass = self.pass.of_rows(&self.groups.tokens()[range.clone()]);
        let x = self.x.map(|x| groups::gather(x, self.groups, range)).transpose()?;
        let layers = [(gate, inners[0].as_ref(), &d_gate), (up, inners[1].as_ref(), &d_up)];
        let d_inners = match &self.stack {
            None => linear::gradients_of_all(x.as_ref(), &layers, &pass, self.wants_dx, gradients)?,
            Some(_) => linear::output_and_weight_gradients(x.as_ref(), &layers, self.wants_dx, gradients)?,
        };
        if !self.wants_dx {
            return Ok((None, d_inners));
        }
        let own = |kind: usize| d_inners[kind].clone().filter(|_| self.stack.is_none());
        let backs = [
            Back { layer: gate, dy: d_gate, d_inner: own(0) },
            Back { layer: up, dy: d_up, d_inner: own(1) },
        ];
        Ok((Some(linear::dx(&backs, &[], self.dtype, &pass)?), d_inners))
    }

    /// What is one for all experts, from `du` of all: the gradients of `A`, where wanted; gives `du` and `A`.
    pub(super) fn of_tokens(
        &self,
        d_inners: &Inners,
        gradients: &mut Gradients,
    ) -> Result<Option<(Tensor, Tensor)>> {
        let Some(stack) = &self.stack else { return Ok(None) };
        let du = stack.of_tokens(d_inners, self.groups, None, self.dtype)?;
        if stack.wants_a(gradients) {
            stack.a_gradients(&du, self.saved.x()?, gradients)?;
        }
        if self.wants_dx { Ok(Some((du, stack.a()?))) } else { Ok(None) }
    }
}
