//! AdamW (Loshchilov and Hutter, 2019) with a state of its own, in f32, in the order of torch's arithmetic.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use rayon::prelude::*;

use crate::error::{Context, Error, Result};
use crate::ops::{Gradients, Trainables};
use crate::weights::{TensorSpec, write_one_by_one};

/// What AdamW is set to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the mean of gradients.
    pub beta1: f64,
    /// Decay of the mean of their squares.
    pub beta2: f64,
    /// Added to the root of the second mean.
    pub eps: f64,
    /// Share of a value that a step takes off, times the learning rate.
    pub weight_decay: f64,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 }
    }
}

/// The optimizer and its state.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    step: u64,
    state: BTreeMap<Arc<str>, Moments>,
}

#[derive(Debug)]
struct Moments {
    first: Vec<f32>,
    second: Vec<f32>,
    /// The value in f32, where the model computes with a rounded one or is written rounded.
    master: Option<Vec<f32>>,
}

impl Moments {
    fn named(&self, name: &str) -> impl Iterator<Item = (String, &[f32])> {
        let Self { first, second, master } = self;
        let named = [("exp_avg", Some(first)), ("exp_avg_sq", Some(second)), ("master", master.as_ref())];
        let there = named.into_iter().filter_map(|(kind, values)| Some((kind, values?)));
        there.map(move |(kind, values)| (format!("{name}.{kind}"), values.as_slice()))
    }
}

impl AdamW {
    /// A fresh state for `trainables`. `masters` keeps values of f32 in the state too, for models that are written
    /// rounded.
    pub fn new(config: AdamWConfig, trainables: &Trainables, masters: bool) -> Result<Self> {
        let state = trainables
            .iter()
            .map(|(name, variable)| {
                let len = variable.elem_count();
                let rounded = masters || variable.dtype() != DType::F32;
                let master = if rounded { Some(values(variable)?) } else { None };
                Ok((Arc::clone(name), Moments { first: vec![0.0; len], second: vec![0.0; len], master }))
            })
            .collect::<Result<_>>()?;
        Ok(Self { config, step: 0, state })
    }

    /// Updates made so far.
    #[must_use]
    pub fn step(&self) -> u64 {
        self.step
    }

    /// One update of every trainable whose gradient has arrived, the gradients times `scale`.
    pub fn update(
        &mut self,
        trainables: &Trainables,
        gradients: &Gradients,
        scale: f64,
        learning_rate: f64,
    ) -> Result<()> {
        self.step += 1;
        let AdamWConfig { beta1, beta2, eps, weight_decay } = self.config;
        let exponent = self.step as i32;
        let rule = Rule {
            scale: scale as f32,
            keep: (1.0 - learning_rate * weight_decay) as f32,
            beta1_rest: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            beta2_rest: (1.0 - beta2) as f32,
            eps: eps as f32,
            step_size: (learning_rate / (1.0 - beta1.powi(exponent))) as f32,
            root: (1.0 - beta2.powi(exponent)).sqrt() as f32,
        };
        let state: Vec<_> = self.state.iter_mut().collect();
        state.into_par_iter().try_for_each(|(name, moments)| {
            let (Some(gradient), Some(variable)) = (gradients.of_name(name), trainables.get(name)) else {
                return Ok(());
            };
            let gradient = values(gradient).in_tensor(name)?;
            let master = moments.master.take();
            let keep = master.is_some();
            let mut value = master.map_or_else(|| values(variable), Ok)?;
            rule.apply(&mut value, &gradient, moments);
            set(variable, &value)?;
            moments.master = keep.then_some(value);
            Ok(())
        })
    }

    /// Writes the state to a safetensors file: `<name>.exp_avg`, `<name>.exp_avg_sq`, and `<name>.master` where there is
    /// one. `metadata` goes into the header. Of the whole state there is never a second copy in memory.
    pub fn write(&self, path: &Path, metadata: &BTreeMap<String, String>) -> Result<()> {
        let all: BTreeMap<String, &[f32]> =
            self.state.iter().flat_map(|(name, moments)| moments.named(name)).collect();
        let specs = all.iter().map(|(name, values)| {
            let empty = TensorSpec::of(name, &Tensor::zeros(0, DType::F32, &Device::Cpu)?)?;
            Ok(TensorSpec { shape: vec![values.len()], ..empty })
        });
        write_one_by_one(path, &specs.collect::<Result<Vec<_>>>()?, metadata, |name| {
            let values = all.get(name).copied().unwrap_or_default();
            Ok(Tensor::from_slice(values, values.len(), &Device::Cpu)?)
        })
    }

    /// Takes up the state of `step` updates that [`AdamW::write`] wrote; values it holds in f32 go to `trainables`.
    pub fn restore(
        &mut self,
        step: u64,
        mut tensors: BTreeMap<String, Tensor>,
        trainables: &Trainables,
    ) -> Result<()> {
        for (name, moments) in &mut self.state {
            let mut take = |kind: &str, len: usize| -> Result<Vec<f32>> {
                let name = format!("{name}.{kind}");
                let tensor = tensors
                    .remove(&name)
                    .ok_or_else(|| Error::invalid("is missing from the optimizer's state"))
                    .in_tensor(&name)?;
                let found = values(&tensor)?;
                if found.len() == len {
                    return Ok(found);
                }
                let found = found.len();
                Err(Error::invalid(format!("has {found} values, expected {len}"))).in_tensor(&name)
            };
            let len = moments.first.len();
            moments.first = take("exp_avg", len)?;
            moments.second = take("exp_avg_sq", len)?;
            if moments.master.is_some() {
                let master = take("master", len)?;
                if let Some(variable) = trainables.get(name) {
                    set(variable, &master)?;
                }
                moments.master = Some(master);
            }
        }
        if let Some(name) = tensors.keys().next() {
            return Err(Error::invalid("the optimizer's state has a tensor that is not trained now"))
                .in_tensor(name);
        }
        self.step = step;
        Ok(())
    }
}

fn set(variable: &Var, values: &[f32]) -> Result<()> {
    let tensor = Tensor::from_slice(values, variable.shape(), &Device::Cpu)?;
    Ok(variable.set(&tensor.to_dtype(variable.dtype())?.to_device(variable.device())?)?)
}

fn values(tensor: &Tensor) -> Result<Vec<f32>> {
    let flat = tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?;
    Ok(flat.to_vec1()?)
}

struct Rule {
    scale: f32,
    keep: f32,
    beta1_rest: f32,
    beta2: f32,
    beta2_rest: f32,
    eps: f32,
    step_size: f32,
    root: f32,
}

/// Values per task.
const CHUNK: usize = 1 << 14;

impl Rule {
    fn apply(&self, value: &mut [f32], gradient: &[f32], moments: &mut Moments) {
        let chunks = value
            .par_chunks_mut(CHUNK)
            .zip(gradient.par_chunks(CHUNK))
            .zip(moments.first.par_chunks_mut(CHUNK))
            .zip(moments.second.par_chunks_mut(CHUNK));
        chunks.for_each(|(((value, gradient), first), second)| {
            for i in 0..value.len() {
                let g = gradient[i] * self.scale;
                first[i] += (g - first[i]) * self.beta1_rest;
                second[i] = second[i] * self.beta2 + self.beta2_rest * g * g;
                let denominator = second[i].sqrt() / self.root + self.eps;
                value[i] = value[i] * self.keep - self.step_size * first[i] / denominator;
            }
        });
    }
}
