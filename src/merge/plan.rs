//! What a merge will write: each tensor of the output, where its values come from and what is added to them.

use std::collections::BTreeMap;

use candle_core::{DType, Tensor};

use crate::adapter::hf::Adapter;
use crate::adapter::{delta, tensor_names};
use crate::error::{Context, Error, Result};
use crate::model::Pretrained;
use crate::model::config::{EMBEDDING, HEAD};
use crate::weights::StoredType;

/// Lists all that a merge will write. It is complete before the first byte is written.
pub(super) struct MergePlan<'a> {
    /// By name in the output.
    pub(super) tensors: BTreeMap<String, Output<'a>>,
    /// The number of linear layers and routers that each adapter changes.
    pub(super) layers: Vec<usize>,
    /// Whether a tied head gets a tensor of its own.
    pub(super) untied: bool,
}

/// A tensor of the output.
pub(super) struct Output<'a> {
    /// Its name in the base.
    pub(super) from: String,
    pub(super) shape: Vec<usize>,
    /// How the base stores it.
    pub(super) stored: StoredType,
    /// The type to write. With `None` the bytes are copied, and no adapter can be merged into them.
    pub(super) dtype: Option<DType>,
    /// What is added.
    pub(super) terms: Vec<Term<'a>>,
}

impl Output<'_> {
    /// Whether the output stores this tensor in the type of the base, so that its bytes are the same if no term is added.
    pub(super) fn is_copied(&self) -> bool {
        self.dtype.is_none_or(|dtype| self.stored == StoredType::Float(dtype))
    }
}

/// What one adapter adds to one tensor.
pub(super) struct Term<'a> {
    pub(super) adapter: usize,
    pub(super) scale: f64,
    /// The row of the tensor to which the first row of the term is added. It is not 0 where experts share one tensor.
    pub(super) first: usize,
    pub(super) kind: TermKind<'a>,
}

/// The tensors of a term.
pub(super) enum TermKind<'a> {
    /// `scale * B A`, on a weight `[out, in]`.
    LowRank { a: &'a Tensor, b: &'a Tensor },
    /// `scale * bias`, on a bias `[out]`.
    Bias(&'a Tensor),
    /// The weight of a trained router minus that of the base, `[experts, hidden]`.
    Difference(Tensor),
}

impl Term<'_> {
    /// Adds this term to `sums`, which are `count` rows of the tensor from `start` on, row-major, in f32.
    pub(super) fn add_to(&self, sums: &mut [f32], start: usize, count: usize) -> Result<()> {
        let own = match &self.kind {
            TermKind::LowRank { b, .. } => b.dim(0)?,
            TermKind::Bias(bias) => bias.dim(0)?,
            TermKind::Difference(difference) => difference.dim(0)?,
        };
        let (from, end) = (start.max(self.first), (start + count).min(self.first + own));
        if from >= end {
            return Ok(());
        }
        let (skipped, count_here) = (from - self.first, end - from);
        let values = match &self.kind {
            TermKind::LowRank { a, b } => delta(a, &b.narrow(0, skipped, count_here)?, self.scale)?,
            TermKind::Bias(bias) => (bias.narrow(0, skipped, count_here)? * self.scale)?,
            TermKind::Difference(difference) => difference.narrow(0, skipped, count_here)?,
        };
        let width = sums.len() / count;
        let values: Vec<f32> = values.flatten_all()?.to_vec1()?;
        let sums = &mut sums[(from - start) * width..(end - start) * width];
        sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += value);
        Ok(())
    }

    /// Whether it adds nothing but zeros.
    pub(super) fn is_zero(&self) -> Result<bool> {
        let largest = |tensor: &Tensor| -> Result<f32> { Ok(tensor.abs()?.max_all()?.to_scalar()?) };
        Ok(self.scale == 0.0
            || match &self.kind {
                TermKind::LowRank { a, b } => largest(a)? == 0.0 || largest(b)? == 0.0,
                TermKind::Bias(bias) => largest(bias)? == 0.0,
                TermKind::Difference(difference) => largest(difference)? == 0.0,
            })
    }
}

impl<'a> MergePlan<'a> {
    /// Fits every adapter to the model, or says why it does not.
    pub(super) fn new(model: &Pretrained, adapters: &'a [Adapter], dtype: Option<DType>) -> Result<Self> {
        if adapters.is_empty() {
            return Err(Error::request("there is no adapter to merge"));
        }
        if let Some(dtype) = dtype.filter(|dtype| !matches!(dtype, DType::F32 | DType::F16 | DType::BF16)) {
            return Err(Error::request(format!(
                "weights cannot be written as `{}`, expected f32, f16 or bf16",
                dtype.as_str()
            )));
        }
        model.check()?;
        let mut tensors = BTreeMap::new();
        for name in output_names(model) {
            tensors.insert(name.clone(), output(model, name, dtype)?);
        }
        let mut plan = Self { tensors, layers: Vec::new(), untied: false };
        for (index, adapter) in adapters.iter().enumerate() {
            let placements = adapter.fit(model).at(&adapter.source)?.placements;
            for placement in &placements {
                let names = tensor_names(&placement.linear.path);
                let term = |kind, first| Term { adapter: index, scale: placement.scale, first, kind };
                let weight = format!("{}.weight", placement.linear.path);
                if weight == HEAD && model.config().tie_word_embeddings && !plan.untied {
                    plan.tensors.insert(weight.clone(), output(model, EMBEDDING.to_string(), dtype)?);
                    plan.untied = true;
                }
                // `Adapter::fit` has checked that A and B are there.
                let (a, b) = (&adapter.tensors[&names.a], &adapter.tensors[&names.b]);
                let (stored, first) = plan.place(model, &weight, placement.linear.in_features);
                plan.of(&stored)?.terms.push(term(TermKind::LowRank { a, b }, first));
                if let Some(bias) = adapter.tensors.get(&names.bias) {
                    let tensor = format!("{}.bias", placement.linear.path);
                    let output = plan.of(&tensor).map_err(|error| {
                        error.with_hint(
                            "the adapter has a bias (`lora_bias`) where the model has none to merge it into; \
                             use it unmerged",
                        )
                    })?;
                    output.terms.push(term(TermKind::Bias(bias), 0));
                }
            }
            for (name, router) in &adapter.routers {
                let base = model.read(name, DType::F32, router.device())?;
                let kind = TermKind::Difference((router - base)?);
                let (stored, _) = plan.place(model, name, router.dims().last().copied().unwrap_or(1));
                plan.of(&stored)?.terms.push(Term { adapter: index, scale: 1.0, first: 0, kind });
            }
            plan.layers.push(placements.len() + adapter.routers.len());
        }
        Ok(plan)
    }

    /// Bytes of all tensors of the output.
    pub(super) fn bytes(&self, model: &Pretrained) -> Result<u64> {
        let size = |output: &Output<'_>| -> Result<usize> {
            match output.dtype {
                Some(dtype) => Ok(output.shape.iter().product::<usize>() * dtype.size_in_bytes()),
                None => Ok(model.checkpoint().info(&output.from)?.size_in_bytes()),
            }
        };
        self.tensors.values().map(|output| Ok(size(output)? as u64)).sum()
    }

    /// Whether every file can be the base's, with some bytes changed.
    pub(super) fn keeps_layout(&self, model: &Pretrained) -> bool {
        !self.untied && !model.checkpoint().is_gguf() && self.tensors.values().all(Output::is_copied)
    }

    /// The type that most values are written in.
    pub(super) fn main_dtype(&self) -> DType {
        let values_in = |dtype: DType| -> usize {
            let tensors = self.tensors.values().filter(|output| output.dtype == Some(dtype));
            tensors.map(|output| output.shape.iter().product::<usize>()).sum()
        };
        let dtypes = [DType::F32, DType::F16, DType::BF16];
        dtypes.into_iter().max_by_key(|dtype| values_in(*dtype)).unwrap_or(DType::F32)
    }

    /// The tensor of the output that holds a weight, and the row of it that the weight begins at.
    fn place(&self, model: &Pretrained, weight: &str, width: usize) -> (String, usize) {
        match model.stored_in(weight) {
            Ok((stored, first)) if !self.tensors.contains_key(weight) => (stored.to_string(), first / width),
            _ => (weight.to_string(), 0),
        }
    }

    fn of(&mut self, name: &str) -> Result<&mut Output<'a>> {
        self.tensors.get_mut(name).ok_or_else(|| Error::invalid(format!("the model has no tensor `{name}`")))
    }
}

/// Names the tensors of the output: all in the base's files, or of a GGUF file those of the configuration, because its other
/// tensors have no name outside of GGUF.
fn output_names(model: &Pretrained) -> Vec<String> {
    if model.checkpoint().is_gguf() {
        return model.config().tensors().into_iter().map(|(name, _)| name).collect();
    }
    model.checkpoint().tensors().keys().cloned().collect()
}

/// A tensor as the base has it. Quantized values, which safetensors cannot hold, become f32 unless a type is asked for.
fn output<'a>(model: &Pretrained, name: String, dtype: Option<DType>) -> Result<Output<'a>> {
    let info =
        if model.checkpoint().is_gguf() { model.info(&name)? } else { model.checkpoint().info(&name)? };
    let dtype = match info.dtype {
        StoredType::Float(stored) => Some(dtype.unwrap_or(stored)),
        StoredType::Quantized(_) => Some(dtype.unwrap_or(DType::F32)),
        StoredType::Other(_) => None,
    };
    Ok(Output { from: name, shape: info.shape.clone(), stored: info.dtype, dtype, terms: Vec::new() })
}
