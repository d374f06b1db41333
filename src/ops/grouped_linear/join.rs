//! Layers of experts that give tokens: `y[t] = sum over the rows r of t of weight[r] layer[expert of r](x[r])`, of which
//! the sum is left to [`groups::combine`].
//!
//! As a layer is linear, the gradient of a weight needs nothing of its result: `dweight[r] = <x[r], d[r]>`, with `d[r]` the
//! gradient of `x[r]` but for the weight, and `<bias, dy[t]>` where there is one.

use candle_core::{DType, Tensor};

use super::stack::Stack;
use super::{Groups, Inners, Layer, Pass, Rows, input_rows, of_each, outputs, rows, with_gradients};
use crate::error::Result;
use crate::ops::{Gradients, groups, linear, matmul_f32, scaled_matmul_f32};

/// What the backward needs.
#[derive(Debug, Clone)]
pub struct Saved {
    inners: Inners,
}

/// What the gradients that take the layers' input need, and what the input's gradient is made of.
#[derive(Debug)]
pub struct Towards {
    /// `d [rows, in]`, the gradient of the input but for the weights of rows, where wanted.
    pub d_rows: Option<Tensor>,
    /// What biases add to the gradient of the weight of a row.
    of_biases: Option<Vec<f32>>,
    /// `dy [rows, out]`, where a weight's gradient is wanted.
    dy: Option<Tensor>,
    d_inners: Inners,
}

/// `layer[expert of r](x[r])` of each row, `[rows, out]`, for `x [rows, in]`, and what the backward needs.
pub fn forward(
    x: &Tensor,
    layers: &[Layer<'_>],
    groups: &Groups,
    pass: &Pass<'_>,
) -> Result<(Tensor, Saved)> {
    let inners = of_each(groups, |expert| {
        let pass = pass.of_rows(&groups.tokens()[groups.range(expert)]);
        linear::inners(&rows(x, groups, expert)?, &[layers[expert]], &pass)
    })?;
    let inners: Inners = inners.into_iter().map(Option::unwrap_or_default).collect();
    let mut of_rows = outputs(Rows::Together(x), &[layers], &inners, groups)?;
    Ok((of_rows.remove(0), Saved { inners }))
}

/// The gradient of the input, when `wants_dx`, and what [`Towards`] has for those that take the input. Those of `B` and of
/// biases go to `gradients` where wanted.
pub fn backward(
    saved: &Saved,
    layers: &[Layer<'_>],
    (weights, groups): (&[f32], &Groups),
    pass: &Pass<'_>,
    dy: &Tensor,
    wants_dx: bool,
    gradients: &mut Gradients,
) -> Result<Towards> {
    let weights = groups.weights_of_rows(weights);
    let wants_inner = wants_dx || layers.iter().any(|l| l.low_rank.is_some_and(|l| gradients.wants(&l.a)));
    let stack = Stack::of(&[layers], groups, pass);
    let mut d_inners: Inners = vec![vec![None]; groups.len()];
    if let Some(stack) = &stack {
        let u = stack.of_tokens(&saved.inners, groups, Some(&weights), dy.dtype())?;
        stack.b_gradients(dy, &u, gradients)?;
        if wants_inner {
            d_inners = stack.d_inners(dy, groups)?;
        }
    }
    let is_biased = layers.iter().any(Layer::is_biased);
    let wants_weights = layers.iter().any(|layer| gradients.wanted(layer.weight).is_some());
    let together = match stack.is_none() || is_biased || wants_weights {
        true => Some(groups::gather_all(dy, groups)?), // [rows, out]
        false => None,
    };
    let of_rows = together.as_ref().map_or(Rows::OfTokens(dy), Rows::Together);
    let found = with_gradients(groups, &[layers], gradients, |expert, gradients| {
        if together.is_none() {
            return Ok((Vec::new(), None));
        }
        let (layer, dy, range) = (&layers[expert], of_rows.of(groups, expert)?, groups.range(expert));
        let weights = Tensor::new(&weights[range], dy.device())?.unsqueeze(1)?; // [rows, 1]
        bias_gradients(layer, &weights, &dy, gradients)?;
        let mut of_bias = vec![0.0; dy.dim(0)?];
        for bias in linear::biases(layer)? {
            let products: Vec<f32> = matmul_f32(&dy, &bias.unsqueeze(1)?)?.flatten_all()?.to_vec1()?;
            of_bias.iter_mut().zip(products).for_each(|(sum, product)| *sum += product);
        }
        let Some(low_rank) = layer.low_rank.filter(|_| stack.is_none()) else { return Ok((of_bias, None)) };
        if let Some(inner) = saved.inners[expert][0].as_ref().filter(|_| gradients.wants(&low_rank.b)) {
            gradients.add(&low_rank.b, &matmul_f32(&dy.t()?, &inner.broadcast_mul(&weights)?)?)?;
        }
        let du = || scaled_matmul_f32(low_rank.scale, &dy, low_rank.b.tensor());
        Ok((of_bias, if wants_inner { Some(du()?) } else { None }))
    })?;
    let mut of_biases = is_biased.then(|| vec![0.0; groups.num_rows()]);
    for (expert, found) in found.into_iter().enumerate() {
        let Some((of_bias, d_inner)) = found else { continue };
        if let Some(all) = &mut of_biases {
            all[groups.range(expert)].copy_from_slice(&of_bias);
        }
        if d_inner.is_some() {
            d_inners[expert] = vec![d_inner];
        }
    }
    let d_rows = match wants_dx {
        true => Some(input_rows(&[(layers, of_rows)], Some(&d_inners), groups, pass)?),
        false => None,
    };
    Ok(Towards { d_rows, of_biases, dy: together.filter(|_| wants_weights), d_inners })
}

impl Towards {
    /// The gradients of the weights, `[tokens * active]`, for `x [rows, in]`; zero for a choice that was dropped.
    pub fn d_weights(&self, x: &Tensor, groups: &Groups) -> Result<Vec<f32>> {
        let mut of_rows = match &self.d_rows {
            Some(d_rows) => groups::row_products(x, d_rows)?,
            None => vec![0.0; groups.num_rows()],
        };
        if let Some(of_biases) = &self.of_biases {
            of_rows.iter_mut().zip(of_biases).for_each(|(sum, of_bias)| *sum += of_bias);
        }
        Ok(groups.of_choices(&of_rows))
    }

    /// The gradients that take the layers' input, where wanted.
    pub fn input_gradients(
        &self,
        layers: &[Layer<'_>],
        x: &Tensor,
        (weights, groups): (&[f32], &Groups),
        pass: &Pass<'_>,
        gradients: &mut Gradients,
    ) -> Result<()> {
        if !layers.iter().any(|layer| layer.needs_input(gradients)) {
            return Ok(());
        }
        let weighed = groups::scale_rows(x, &groups.weights_of_rows(weights))?;
        with_gradients(groups, &[layers], gradients, |expert, gradients| {
            let pass = pass.of_rows(&groups.tokens()[groups.range(expert)]);
            let x = rows(&weighed, groups, expert)?;
            let dy = self.dy.as_ref().map(|dy| rows(dy, groups, expert)).transpose()?;
            let d_inner = self.d_inners[expert].first().and_then(Option::as_ref);
            if let Some(dy) = dy {
                linear::weight_gradient(&layers[expert], &x, &dy, gradients)?;
            }
            linear::a_gradient(&layers[expert], &x, d_inner, &pass, gradients)
        })?;
        Ok(())
    }
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
