//! Low-rank terms beside a model's frozen weights: built and named ([`attach`]), and folded ([`delta`]). The forward
//! `y += scale * (dropout(x) A^T B^T + bias)` is [`LowRank`]'s; here one sees that the merge agrees with it.
//!
//! Shapes: `A [rank, in]`, `B [out, rank]`, bias `[out]`, delta `[out, in]`; all in f32.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use candle_core::{DType, Tensor, Var};

use super::target::Placement;
use crate::error::{Context, Error, Result};
use crate::model::Linear;
use crate::ops::{Dropout, LowRank, Parameter, Trainables};

/// The names of the three tensors of one adapted layer: PEFT's, without the prefix `base_model.model.` of its files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorNames {
    /// `<path>.lora_A.weight`
    pub a: String,
    /// `<path>.lora_B.weight`
    pub b: String,
    /// `<path>.lora_B.bias`
    pub bias: String,
}

/// The names of the tensors of the layer at `path`.
#[must_use]
pub fn tensor_names(path: &str) -> TensorNames {
    TensorNames {
        a: format!("{path}.lora_A.weight"),
        b: format!("{path}.lora_B.weight"),
        bias: format!("{path}.lora_B.bias"),
    }
}

/// Puts a low-rank term beside every linear of the model that has a placement, with the values in `tensors` (from
/// [`super::init::fresh`] or [`super::hf::Adapter`]), and gives the trainables, which share storage with the terms.
///
/// `dropout` is the probability that a value is dropped in training.
pub fn attach<'m>(
    linears: impl IntoIterator<Item = &'m mut Linear>,
    placements: &[Placement],
    tensors: &BTreeMap<String, Tensor>,
    dropout: f64,
    dropout_seed: u64,
) -> Result<Trainables> {
    let mut waiting: HashMap<&str, &Placement> =
        placements.iter().map(|placement| (placement.linear.path.as_str(), placement)).collect();
    let mut trainables = Trainables::new();
    for linear in linears {
        let Some(placement) = waiting.remove(linear.path.as_str()) else { continue };
        let names = tensor_names(&linear.path);
        let (out_features, in_features, rank) =
            (placement.linear.out_features, placement.linear.in_features, placement.rank);
        let mut parameter = |name: String, shape: &[usize]| -> Result<Option<Parameter>> {
            let Some(values) = tensors.get(&name) else { return Ok(None) };
            if values.dims() != shape {
                return Err(Error::invalid(format!("shape is {:?}, expected {shape:?}", values.dims())))
                    .in_tensor(&name);
            }
            let name: Arc<str> = name.into();
            let var = Var::from_tensor(&values.to_dtype(DType::F32)?).in_tensor(&name)?;
            let parameter = Parameter::new(Arc::clone(&name), var.as_tensor());
            trainables.insert(name, var);
            Ok(Some(parameter))
        };
        let missing = || Error::invalid("the adapter does not have it");
        let a = parameter(names.a.clone(), &[rank, in_features])?.ok_or_else(missing).in_tensor(&names.a)?;
        let b = parameter(names.b.clone(), &[out_features, rank])?.ok_or_else(missing).in_tensor(&names.b)?;
        let bias = parameter(names.bias, &[out_features])?;
        let dropout = Dropout { probability: dropout, seed: dropout_seed, module: placement.module };
        linear.low_rank = Some(LowRank { a, b, bias, scale: placement.scale, dropout });
    }
    match waiting.keys().copied().min() {
        None => Ok(trainables),
        // The decoder applies its head outside the layers that adapters go beside.
        Some("lm_head") => {
            Err(Error::invalid("the adapter is on `lm_head`, beside which nothing is computed yet")
                .with_hint("`peft merge` puts it into the weights; use the merged model without the adapter"))
        }
        Some(path) => Err(Error::invalid(format!("the model has no linear layer `{path}`"))),
    }
}

/// Takes every low-rank term off again.
pub fn detach<'m>(linears: impl IntoIterator<Item = &'m mut Linear>) {
    for linear in linears {
        linear.low_rank = None;
    }
}

/// What the term adds to the weight, `scale * B A`: `[out, rank] x [rank, in] -> [out, in]`, in f32.
pub fn delta(a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
    let (a, b) = (a.to_dtype(DType::F32)?, b.to_dtype(DType::F32)?);
    Ok((b.matmul(&a)? * scale)?)
}
