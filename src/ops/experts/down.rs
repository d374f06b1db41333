//! The backward of the layer that gives tokens, `y[t] = sum over the rows r of t of weight[r] down(h[r])`, and of the gated unit
//! before it.
//!
//! As the layer is linear, the gradient of a weight needs nothing of its result: `dweight[r] = <h[r], d[r]>`, with `d[r]` the
//! gradient of `h[r]` but for the weight, and `<bias, dy[t]>` where there is one.

use candle_core::{DType, Tensor};

use super::{Expert, Inners, SavedExpert, Stack};
use crate::error::Result;
use crate::ops::linear::{self, Back, Layer};
use crate::ops::{Activation, Gradients, Groups, Pass, glu, groups, matmul_f32, scaled_matmul_f32};

/// What the experts have in common.
pub(super) struct Down<'a> {
    layers: Vec<Layer<'a>>,
    /// Of rows.
    weights: &'a [f32],
    groups: &'a Groups,
    pass: &'a Pass<'a>,
    /// `[tokens, hidden]`
    dy: &'a Tensor,
    wants_product: bool,
    wants_inner: bool,
    /// `du` of all rows, where low-rank terms are one for all experts; then the gradients of `B` are there.
    stacked: Option<Inners>,
}

/// What an expert's backward gives.
pub(super) struct Through {
    /// The gradients of gate and up, `[rows, width]`, where wanted.
    pub(super) inside: Option<(Tensor, Tensor)>,
    /// Those of the weights of rows; none where the product's gradient is not wanted.
    pub(super) d_weights: Vec<f32>,
}

impl<'a> Down<'a> {
    pub(super) fn new(
        experts: &[Expert<'a>],
        (weights, groups): (&'a [f32], &'a Groups),
        pass: &'a Pass<'a>,
        (dy, wants_product): (&'a Tensor, bool),
        saved: &[Option<SavedExpert>],
        gradients: &mut Gradients,
    ) -> Result<Self> {
        let layers: Vec<Layer<'a>> = experts.iter().map(|expert| expert.down).collect();
        let wants_inner =
            wants_product || layers.iter().any(|l| l.low_rank.is_some_and(|l| gradients.wants(&l.a)));
        let mut stacked = None;
        if let Some(stack) = Stack::of(&[&layers], groups, pass) {
            let of_expert = |saved: &Option<SavedExpert>| vec![saved.as_ref().and_then(|s| s.down.clone())];
            let inners: Inners = saved.iter().map(of_expert).collect();
            let u = stack.of_tokens(&inners, groups, Some(weights), dy.dtype())?;
            stack.b_gradients(dy, &u, gradients)?;
            stacked =
                Some(if wants_inner { stack.d_inners(dy, groups)? } else { vec![vec![None]; groups.len()] });
        }
        Ok(Self { layers, weights, groups, pass, dy, wants_product, wants_inner, stacked })
    }

    /// The gradients of an expert's layer, where wanted, and what goes on to its gate and up.
    pub(super) fn backward(
        &self,
        expert: usize,
        saved: &SavedExpert,
        activation: Activation,
        gradients: &mut Gradients,
    ) -> Result<Through> {
        let (layer, range) = (&self.layers[expert], self.groups.range(expert));
        let pass = self.pass.of_rows(&self.groups.tokens()[range.clone()]);
        let of_rows = &self.weights[range.clone()];
        let dy = groups::gather(self.dy, self.groups, range)?; // [rows, hidden]
        let weights = Tensor::new(of_rows, dy.device())?.unsqueeze(1)?; // [rows, 1]
        bias_gradients(layer, &weights, &dy, gradients)?;
        let d_inner = match &self.stacked {
            Some(all) => all[expert][0].clone(),
            None => self.low_rank_gradients(layer, saved, &weights, &dy, gradients)?,
        };
        let Some(d_product) = self.d_product(layer, &dy, d_inner.as_ref(), &pass)? else {
            let product = glu::value(&saved.unit, activation)?;
            input_gradients(layer, (&product, of_rows), (&dy, d_inner.as_ref()), &pass, gradients)?;
            return Ok(Through { inside: None, d_weights: Vec::new() });
        };
        let (product, d_gate, d_up) = glu::backward(&saved.unit, activation, &d_product, Some(of_rows))?;
        let mut d_weights = groups::row_products(&product, &d_product)?;
        for bias in linear::biases(layer)? {
            let products: Vec<f32> = matmul_f32(&dy, &bias.unsqueeze(1)?)?.flatten_all()?.to_vec1()?;
            d_weights.iter_mut().zip(products).for_each(|(sum, product)| *sum += product);
        }
        input_gradients(layer, (&product, of_rows), (&dy, d_inner.as_ref()), &pass, gradients)?;
        Ok(Through { inside: Some((d_gate, d_up)), d_weights })
    }

    /// The gradient of `B`, where wanted, and `du`.
    fn low_rank_gradients(
        &self,
        layer: &Layer<'_>,
        saved: &SavedExpert,
        weights: &Tensor,
        dy: &Tensor,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let Some(low_rank) = layer.low_rank else { return Ok(None) };
        if let Some(inner) = saved.down.as_ref().filter(|_| gradients.wants(&low_rank.b)) {
            gradients.add(&low_rank.b, &matmul_f32(&dy.t()?, &inner.broadcast_mul(weights)?)?)?;
        }
        if !self.wants_inner {
            return Ok(None);
        }
        scaled_matmul_f32(low_rank.scale, dy, low_rank.b.tensor()).map(Some)
    }

    fn d_product(
        &self,
        layer: &Layer<'_>,
        dy: &Tensor,
        d_inner: Option<&Tensor>,
        pass: &Pass<'_>,
    ) -> Result<Option<Tensor>> {
        if !self.wants_product {
            return Ok(None);
        }
        let back = Back { layer: *layer, dy: dy.clone(), d_inner: d_inner.cloned() };
        linear::dx(&[back], &[], dy.dtype(), pass).map(Some)
    }
}

/// The gradients that take the layer's input, where wanted.
fn input_gradients(
    layer: &Layer<'_>,
    (product, weights): (&Tensor, &[f32]),
    (dy, d_inner): (&Tensor, Option<&Tensor>),
    pass: &Pass<'_>,
    gradients: &mut Gradients,
) -> Result<()> {
    if !layer.needs_input(gradients) {
        return Ok(());
    }
    let weighed = groups::scale_rows(product, weights)?;
    linear::input_gradients(layer, &weighed, d_inner, dy, pass, gradients)
}

/// The gradients of biases, where wanted: sums of `dy`, weighed.
fn bias_gradients(layer: &Layer<'_>, weights: &Tensor, dy: &Tensor, gradients: &mut Gradients) -> Result<()> {
    let of_adapter = layer.low_rank.and_then(|l| l.bias.as_ref().map(|bias| (bias, l.scale)));
    for (bias, scale) in layer.bias.map(|bias| (bias, 1.0)).into_iter().chain(of_adapter) {
        if gradients.wants(bias) {
            let sum = weights.broadcast_mul(&dy.to_dtype(DType::F32)?)?.sum(0)?;
            gradients.add(bias, &(sum * scale)?)?;
        }
    }
    Ok(())
}
