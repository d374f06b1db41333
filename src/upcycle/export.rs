//! Slices to files: every tensor of the family's configuration, one at a time, under the names that checkpoints of
//! one tensor per expert have. Gate and up rows are the dense model's to the bit.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde_json::{Value, json};

use super::report::Refitted;
use super::settings::{Refit, SplitShape};
use super::slices::Slices;
use super::solve::values;
use super::split::Split;
use crate::error::{Context, Error, Result};
use crate::model::config::{EMBEDDING, HEAD, MoeConfig, MoeNames, PackedTensor};
use crate::model::family::{self, Layout, MixtureFormat};
use crate::model::{DecoderConfig, Pretrained};
use crate::weights::{DEFAULT_SHARD_BYTES, ShardedWriter, TensorSpec, overwrite, write_atomic};

/// The weight of a shared-expert gate where the format requires one: almost 0, so that its sigmoid is 0.5. It is not exactly
/// 0, because one runtime divides by it.
const NEARLY_ZERO: f64 = 1.0 / (1u64 << 40) as f64;

/// Writes the tensors of a new model one after the other.
pub(super) struct Sink<'a> {
    base: &'a Pretrained,
    config: &'a DecoderConfig,
    writer: ShardedWriter,
    stored: DType,
    /// Tensors in which the family stores several others, such as all experts of a layer.
    packed: BTreeMap<String, PackedTensor>,
    parts: BTreeMap<String, String>,
    waiting: BTreeMap<String, Tensor>,
}

impl<'a> Sink<'a> {
    /// Announces all tensors of `config`.
    pub(super) fn new(
        base: &'a Pretrained,
        config: &'a DecoderConfig,
        packs: bool,
        stored: DType,
        folder: &Path,
    ) -> Result<Self> {
        let mut packed = BTreeMap::new();
        let mut parts = BTreeMap::new();
        if packs {
            for tensor in config.packed_tensors() {
                let is_new = tensor.parts.iter().all(|(part, _)| !parts.contains_key(part));
                if is_new && (tensor.parts.len() > 1 || tensor.name.contains("output_linear")) {
                    tensor
                        .parts
                        .iter()
                        .for_each(|(part, _)| drop(parts.insert(part.clone(), tensor.name.clone())));
                    packed.insert(tensor.name.clone(), tensor);
                }
            }
        }
        let mut specs = Vec::new();
        let mut announced = BTreeSet::new();
        for (name, shape) in config.tensors() {
            let (name, shape) = match parts.get(&name) {
                Some(whole) => (whole.clone(), packed[whole].shape.clone()),
                None => (name, shape),
            };
            if announced.insert(name.clone()) {
                let dtype = if config.is_held_in_f32(&name) { DType::F32 } else { stored };
                let empty = Tensor::zeros(0, dtype, &Device::Cpu)?;
                specs.push(TensorSpec { shape, ..TensorSpec::of(&name, &empty)? });
            }
        }
        let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
        let writer = ShardedWriter::create(folder, &specs, &metadata, DEFAULT_SHARD_BYTES)?;
        Ok(Self { base, config, writer, stored, packed, parts, waiting: BTreeMap::new() })
    }

    /// Writes a tensor, in the type that it has on disk.
    pub(super) fn write(&mut self, name: &str, tensor: &Tensor) -> Result<()> {
        let dtype = if self.config.is_held_in_f32(name) { DType::F32 } else { self.stored };
        let tensor = tensor.to_dtype(dtype)?.contiguous()?;
        let Some(whole) = self.parts.get(name).cloned() else { return self.writer.write(name, &tensor) };
        self.waiting.insert(name.to_string(), tensor);
        let packed = &self.packed[&whole];
        if packed.parts.iter().any(|(part, _)| !self.waiting.contains_key(part)) {
            return Ok(());
        }
        let parts = packed.parts.iter().filter_map(|(part, _)| self.waiting.remove(part));
        let parts: Vec<Tensor> = parts.map(|part| part.flatten_all()).collect::<Result<_, _>>()?;
        self.writer.write(&whole, &Tensor::cat(&parts, 0)?.reshape(packed.shape.as_slice())?)
    }

    /// Copies the remaining tensors from the dense model by name, and closes the files. A tied head gets its own copy; biases
    /// that the dense model lacks are zero.
    pub(super) fn finish(mut self, is_written: impl Fn(&str) -> bool) -> Result<()> {
        let known: BTreeSet<String> =
            self.base.config().tensors().into_iter().map(|(name, _)| name).collect();
        for (name, shape) in self.config.tensors() {
            if is_written(&name) {
                continue;
            }
            let from = match name.as_str() {
                HEAD if !known.contains(&name) => EMBEDDING,
                own => own,
            };
            let tensor = match known.contains(from) {
                true => self.base.read(from, self.stored, &Device::Cpu)?,
                false if name.ends_with(".bias") => Tensor::zeros(shape, self.stored, &Device::Cpu)?,
                false => {
                    return Err(Error::invalid("has no counterpart in the dense model")).in_tensor(&name);
                }
            };
            self.write(&name, &tensor)?;
        }
        self.writer.finish()
    }
}

/// Writes `config.json`; `note` goes into it under `upcycled`, which loaders leave alone.
pub(super) fn write_config(folder: &Path, config: &Value, stored: DType, note: Value) -> Result<()> {
    let mut config = config.clone();
    let name = if stored == DType::BF16 { "bfloat16" } else { "float32" };
    config["torch_dtype"] = json!(name);
    if config.get("dtype").is_some() {
        config["dtype"] = json!(name);
    }
    if !note.is_null() {
        config["upcycled"] = note;
    }
    write_atomic(folder.join("config.json"), (serde_json::to_string_pretty(&config)? + "\n").as_bytes())
}

/// Writes the configuration of a split model and its weights as they are before down projections are fitted once more:
/// slices of the dense model's.
pub(super) fn write_split(
    base: &Pretrained,
    layout: &Layout,
    format: MixtureFormat,
    shape: &SplitShape,
    split: &Split,
    stored: DType,
    folder: &Path,
) -> Result<()> {
    let config = family::read(&layout.config)?;
    let mut sink = Sink::new(base, &config, format == MixtureFormat::GraniteMoeShared, stored, folder)?;
    for (layer, moe) in config.sparse_layers() {
        let Some(slices) = &split.layers[layer] else { continue };
        let source = Layer::read(base, layer, stored, None)?;
        for (expert, neurons) in slices.experts.iter().enumerate() {
            for projection in 0..3 {
                let name = format!("{}.weight", moe.expert_path(layer, expert, projection));
                sink.write(&name, &source.slice(projection, neurons, layout.routed_scale)?)?;
            }
        }
        if shape.shared > 0 {
            for projection in 0..3 {
                let name = format!("{}.weight", moe.shared_path(layer, projection));
                sink.write(&name, &source.slice(projection, &slices.shared, layout.shared_scale)?)?;
            }
        }
        write_router(&mut sink, moe, layer, slices)?;
    }
    sink.finish(|name| is_of_mixture(&config, name))?;
    let power = |slices: &Option<Slices>| slices.as_ref().map_or(0, |slices| slices.power);
    let note = json!({ "router_exponents": split.layers.iter().map(power).collect::<Vec<_>>() });
    write_config(folder, &layout.config, stored, note)
}

/// Puts the fitted down projections in the place of the dense model's slices in the files of `folder`, and nothing else:
/// if `compare`, every other tensor is read before and after, and has to be the same to the byte.
pub(super) fn rewrite_down(
    base: &Pretrained,
    layout: &Layout,
    split: &Split,
    (stored, compare): (DType, bool),
    folder: &Path,
) -> Result<Refitted> {
    let written = Pretrained::open(&folder.to_string_lossy())?;
    let digests = |model: &Pretrained| compare.then(|| model.checkpoint().tensor_digests()).transpose();
    let before = digests(&written)?;
    let mut again = BTreeSet::new();
    let mut changes = BTreeMap::new();
    for (layer, moe) in written.config().sparse_layers() {
        let Some(slices) = &split.layers[layer] else { continue };
        let name = format!("model.layers.{layer}.mlp.down_proj.weight");
        let change = relative_change(&base.read(&name, DType::F32, &Device::Cpu)?, &slices.down)?;
        changes.insert(layer, change);
        if change == 0.0 {
            continue;
        }
        let down = slices.down.to_dtype(stored)?;
        let mut write = |path: String, neurons: &[usize], scale: f64| -> Result<()> {
            let tensor = scaled(&take(&down, 1, neurons)?, scale)?.contiguous()?;
            let (name, first) = written.stored_in(&format!("{path}.weight"))?;
            let Some((file, range)) = written.checkpoint().place_of(name) else {
                return Err(Error::invalid("is not in a safetensors file")).in_tensor(name);
            };
            again.insert(name.to_string());
            overwrite(file, range.start + first * stored.size_in_bytes(), &tensor).in_tensor(name)
        };
        for (expert, neurons) in slices.experts.iter().enumerate() {
            write(moe.expert_path(layer, expert, 2), neurons, layout.routed_scale)?;
        }
        if !slices.shared.is_empty() {
            write(moe.shared_path(layer, 2), &slices.shared, layout.shared_scale)?;
        }
    }
    let untouched = written.checkpoint().tensors().len() - again.len();
    drop(written);
    let after = digests(&Pretrained::open(&folder.to_string_lossy())?)?;
    for (name, digest) in before.iter().flatten() {
        let is_same = after.as_ref().and_then(|after| after.get(name)) == Some(digest);
        if !is_same && !again.contains(name) {
            return Err(Error::invalid("changed when down projections were written again")).in_tensor(name);
        }
    }
    Ok(Refitted { tensors: again.len(), untouched, compared: compare, changes })
}

/// `|new - old| / |old|`, norms of all values.
fn relative_change(old: &Tensor, new: &Tensor) -> Result<f64> {
    let norm = |tensor: &Tensor| -> Result<f64> {
        Ok(values(tensor)?.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt())
    };
    Ok(norm(&(new.to_dtype(DType::F32)? - old)?)? / norm(old)?.max(f64::MIN_POSITIVE))
}

/// Whether a tensor is a part of experts or routers.
pub(super) fn is_of_mixture(config: &DecoderConfig, name: &str) -> bool {
    let in_layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'));
    let Some((layer, rest)) = in_layer else { return false };
    config.sparse_layers().filter(|(index, _)| layer == index.to_string()).any(|(_, moe)| {
        let MoeNames { router, experts, shared, shared_gate, .. } = moe.names;
        let at = |part: &str| rest.strip_prefix(part).is_some_and(|rest| rest.starts_with('.'));
        [router, experts, shared, shared_gate].into_iter().any(at)
    })
}

fn write_router(sink: &mut Sink<'_>, moe: &MoeConfig, layer: usize, slices: &Slices) -> Result<()> {
    let (weight, bias) = slices.written_router()?;
    let hidden = weight.dim(1)?;
    sink.write(&format!("{}.weight", moe.router_path(layer)), &weight)?;
    if moe.selection_bias {
        sink.write(&moe.selection_bias_path(layer), &Tensor::new(bias, &Device::Cpu)?)?;
    }
    if moe.shared.is_some_and(|shared| shared.gated) {
        let gate = Tensor::full(NEARLY_ZERO as f32, (1, hidden), &Device::Cpu)?;
        sink.write(&format!("{}.weight", moe.shared_gate_path(layer)), &gate)?;
    }
    Ok(())
}

/// The three projections of a dense layer.
pub(super) struct Layer {
    pub(super) projections: [Tensor; 3],
}

impl Layer {
    /// Reads a layer of the dense model. `down` takes the place of its down projection, if there is one.
    pub(super) fn read(
        base: &Pretrained,
        layer: usize,
        stored: DType,
        down: Option<&Tensor>,
    ) -> Result<Self> {
        let read =
            |name: &str| base.read(&format!("model.layers.{layer}.mlp.{name}.weight"), stored, &Device::Cpu);
        let down = match down {
            Some(down) => down.to_dtype(stored)?,
            None => read("down_proj")?,
        };
        Ok(Self { projections: [read("gate_proj")?, read("up_proj")?, down] })
    }

    /// Returns some neurons of gate (0), up (1) or down (2); the last is multiplied with `scale`. Numbers that are no neuron
    /// give zeros.
    pub(super) fn slice(&self, projection: usize, neurons: &[usize], scale: f64) -> Result<Tensor> {
        let taken = take(&self.projections[projection], usize::from(projection == 2), neurons)?;
        if projection < 2 { Ok(taken) } else { scaled(&taken, scale) }
    }
}

/// Returns some neurons of a projection, which lie along `axis`. Numbers that are no neuron give zeros.
fn take(whole: &Tensor, axis: usize, neurons: &[usize]) -> Result<Tensor> {
    let count = whole.dim(axis)?;
    let padded = match neurons.iter().any(|neuron| *neuron >= count) {
        true => whole.pad_with_zeros(axis, 0, 1)?,
        false => whole.clone(),
    };
    let rows: Vec<u32> = neurons.iter().map(|neuron| (*neuron).min(count) as u32).collect();
    Ok(padded.index_select(&Tensor::new(rows, &Device::Cpu)?, axis)?)
}

/// `x * scale` in the type of `x`.
fn scaled(x: &Tensor, scale: f64) -> Result<Tensor> {
    if scale == 1.0 {
        return Ok(x.clone());
    }
    Ok((x.to_dtype(DType::F32)? * scale)?.to_dtype(x.dtype())?)
}

/// Writes the dense model that static pruning leaves.
pub(super) fn write_pruned(
    base: &Pretrained,
    split: &Split,
    refit: Refit,
    stored: DType,
    folder: &Path,
) -> Result<()> {
    let mut json = base.config_json().clone();
    let width = split.kept.iter().flatten().map(|(kept, _)| kept.len()).next().unwrap_or(0);
    json["intermediate_size"] = json!(width);
    let config = family::read(&json)?;
    let mut sink = Sink::new(base, &config, false, stored, folder)?;
    for (layer, kept) in split.kept.iter().enumerate() {
        let Some((kept, down)) = kept else { continue };
        let mut kept = kept.clone();
        kept.sort_unstable();
        let source = Layer::read(base, layer, stored, (refit != Refit::None).then_some(down))?;
        for (projection, name) in ["gate_proj", "up_proj", "down_proj"].into_iter().enumerate() {
            let name = format!("model.layers.{layer}.mlp.{name}.weight");
            sink.write(&name, &source.slice(projection, &kept, 1.0)?)?;
        }
    }
    let pruned =
        |name: &str| {
            split.kept.iter().enumerate().any(|(layer, kept)| {
                kept.is_some() && name.starts_with(&format!("model.layers.{layer}.mlp."))
            })
        };
    sink.finish(pruned)?;
    write_config(folder, &json, stored, Value::Null)
}
