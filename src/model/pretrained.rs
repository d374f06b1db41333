//! A pretrained model on disk: its checkpoint, its configuration, and its tensors under the names Hugging Face gives
//! them, whatever the file calls them.
//!
//! ```no_run
//! use candle_core::Device;
//! use peft::model::Pretrained;
//!
//! let pretrained = Pretrained::open("path/to/model")?;
//! pretrained.check()?; // names and shapes; no values so far
//! let dtype = pretrained.compute_dtype();
//! let norm = pretrained.read("model.norm.weight", dtype, &Device::Cpu)?; // [hidden]
//! assert_eq!(norm.dims(), [pretrained.config().hidden_size]);
//! # Ok::<(), peft::Error>(())
//! ```

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use serde_json::Value;

use super::buffers;
use super::config::{DecoderConfig, EMBEDDING, HEAD, PackedTensor};
use super::family::{self, Capacity};
use super::tied::same_values;
use crate::error::{Context, Error, Result};
use crate::ops::{Parameter, Quantized, SharedBytes, Weight};
use crate::weights::{AdapterText, Checkpoint, StoredType, TensorInfo, TextFiles, write_atomic};

/// A pretrained model, opened but not loaded.
#[derive(Debug)]
pub struct Pretrained {
    checkpoint: Checkpoint,
    config: DecoderConfig,
    config_json: Value,
    /// Where each tensor is, by Hugging Face's name.
    places: BTreeMap<String, Place>,
    interleaved: bool,
    warnings: Vec<String>,
}

impl Pretrained {
    /// Opens a folder, a `.gguf` file or a Hub id (`org/name[@revision]`). Reads no weight values, but for those of a head
    /// that is stored although the configuration ties it: whether it is the embedding decides which model this is.
    pub fn open(source: &str) -> Result<Self> {
        Self::new(Checkpoint::open(source)?)
    }

    /// The model in an open checkpoint.
    pub fn new(checkpoint: Checkpoint) -> Result<Self> {
        let path = checkpoint.path().to_path_buf();
        let gguf = checkpoint.gguf_metadata();
        let capacity = Capacity::of(checkpoint.tensors().values());
        let mut config_json = match gguf {
            Some(metadata) => family::gguf::config(&checkpoint, metadata, &capacity).at(&path)?,
            None => checkpoint.config_json()?,
        };
        let config_path = if gguf.is_some() { path } else { path.join("config.json") };
        let mut config = family::read_within(&config_json, &capacity).at(config_path)?;
        let mut warnings = checkpoint.warnings().to_vec();
        warnings.extend(family::warnings(&config_json));
        warnings.extend(checkpoint.warnings_of_endings(config.vocab_size));
        warnings.extend(buffers::warning(checkpoint.tensors().values()));
        let interleaved = gguf.is_some_and(family::gguf::is_interleaved);
        let mut places: BTreeMap<String, Place> = checkpoint
            .tensors()
            .values()
            .map(|info| {
                let hf = gguf.and_then(|_| family::gguf::from_gguf(&info.name));
                (hf.unwrap_or_else(|| info.name.clone()), Place { info: info.clone(), first: 0 })
            })
            .collect();
        for packed in config.packed_tensors() {
            unpack(&packed, &mut places);
        }
        if config.tie_word_embeddings && places.contains_key(HEAD) {
            if !places.contains_key(EMBEDDING) {
                // The one of the two that there is stands for both.
                let head = places[HEAD].info.clone();
                places.insert(EMBEDDING.to_string(), Place { info: head, first: 0 });
            } else if !same_values(&checkpoint, HEAD, EMBEDDING)? {
                config.tie_word_embeddings = false;
                config_json["tie_word_embeddings"] = Value::Bool(false);
                warnings.push(format!(
                    "`tie_word_embeddings` is true, and `{HEAD}` has other values than the embedding: the model computes with \
                     `{HEAD}`, as in transformers 5"
                ));
            }
        }
        Ok(Self { checkpoint, config, config_json, places, interleaved, warnings })
    }

    /// Returns warnings about contradictions in the model's files and about tensors that are left aside.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// What it was opened from.
    #[must_use]
    pub fn name(&self) -> &str {
        self.checkpoint.name()
    }

    /// The decoder this model is.
    #[must_use]
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// The same, to change how experts are chosen.
    pub fn config_mut(&mut self) -> &mut DecoderConfig {
        &mut self.config
    }

    /// The `config.json` that a copy of this model needs; for a GGUF file the one its metadata amounts to.
    #[must_use]
    pub fn config_json(&self) -> &Value {
        &self.config_json
    }

    /// The files, with their own names of the tensors.
    #[must_use]
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// Tokenizer, chat template and special tokens.
    pub fn text(&self) -> Result<TextFiles> {
        self.checkpoint.text()
    }

    /// Reads the tokenizer and chat template beside an adapter in `folder`, where they are not those of this model.
    pub fn adapter_text(&self, folder: &Path) -> Result<Option<AdapterText>> {
        self.checkpoint.adapter_text(folder, self.config.vocab_size)
    }

    /// Puts tokenizer, chat template and generation settings into a folder that gets other weights of this model.
    pub fn write_companions(&self, folder: &Path) -> Result<()> {
        self.checkpoint.write_companions(folder)
    }

    /// Refuses companions that could not be put into a result.
    pub fn check_companions(&self) -> Result<()> {
        self.checkpoint.check_companions()
    }

    /// Writes the `config.json` for weights of another type, and for as many experts of a token as [`Self::config_mut`] has
    /// made it.
    pub fn write_config(&self, folder: &Path, dtype: DType) -> Result<()> {
        let mut config = self.config_json.clone();
        let active = |config: &DecoderConfig| config.sparse_layers().next().map(|(_, moe)| moe.active);
        if active(&self.config) != active(&family::read(&config)?) {
            config[family::ACTIVE] = serde_json::json!(active(&self.config));
        }
        let name = match dtype {
            DType::F32 => "float32",
            DType::F16 => "float16",
            DType::BF16 => "bfloat16",
            other => return Err(Error::request(format!("weights cannot be stored as {}", other.as_str()))),
        };
        // transformers 5 writes `dtype`; both read `torch_dtype`.
        let key = if config.get("dtype").is_some() { "dtype" } else { "torch_dtype" };
        // The family's reader has refused what is not an object.
        config[key] = Value::from(name);
        let text = serde_json::to_string_pretty(&config)? + "\n";
        write_atomic(folder.join("config.json"), text.as_bytes())
    }

    /// The names of all tensors on disk, sorted; those that Hugging Face has no name for keep the file's. Of a tensor that
    /// holds those of several experts, the names of its parts.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    /// Shape and type of a tensor on disk.
    pub fn info(&self, name: &str) -> Result<&TensorInfo> {
        Ok(&self.place(name)?.info)
    }

    /// The tensor of the file that holds a tensor, and the number of the first value there.
    pub fn stored_in(&self, name: &str) -> Result<(&str, usize)> {
        let place = self.place(name)?;
        Ok((&place.info.name, place.first))
    }

    /// Shape and type of a tensor, where there is one.
    pub(super) fn find(&self, name: &str) -> Option<&TensorInfo> {
        self.places.get(name).map(|place| &place.info)
    }

    fn place(&self, name: &str) -> Result<&Place> {
        match self.places.get(name) {
            Some(place) => Ok(place),
            None => Err(match self.checkpoint.info(&self.stored_name(name)) {
                Err(error) => error,
                Ok(_) => Error::invalid(format!("`{}` has no tensor `{name}`", self.name())),
            }),
        }
    }

    /// How a tensor is stored.
    pub fn stored_dtype(&self, name: &str) -> Result<StoredType> {
        Ok(self.info(name)?.dtype)
    }

    /// The values of a tensor, rows in Hugging Face's order. NaN and infinity are errors.
    pub fn read(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        let Place { info, first } = self.place(name)?;
        let tensor = self.checkpoint.read_part(&info.name, *first, &info.shape, dtype, device)?;
        match self.interleaved_heads(name) {
            Some(heads) => family::gguf::restore_rows(&tensor, heads).in_tensor(name),
            None => Ok(tensor),
        }
    }

    /// A tensor to compute with in `dtype`: a quantized matrix as it is, where its products are computed on the CPU and its
    /// format is one of those that models are stored in, else plain values.
    pub fn weight(&self, name: &str, dtype: DType, device: &Device) -> Result<Weight> {
        let info = self.info(name)?;
        let (&StoredType::Quantized(stored), &[rows, columns]) = (&info.dtype, &info.shape[..]) else {
            return Ok(Weight::Dense(Parameter::new(name, &self.read(name, dtype, device)?)));
        };
        if !device.is_cpu() || !Quantized::supports(stored) {
            return Ok(Weight::Dense(Parameter::new(name, &self.read(name, dtype, device)?)));
        }
        let stored_name = self.stored_name(name);
        let blocks = self.checkpoint.read_blocks(&stored_name)?;
        let bytes: SharedBytes = match self.interleaved_heads(name) {
            None => Arc::new(blocks),
            Some(heads) => {
                let restored = family::gguf::restore_blocks(blocks.as_ref(), rows, heads);
                self.checkpoint.release(&stored_name);
                Arc::new(restored)
            }
        };
        Ok(Weight::Quantized(Quantized::new(name, (rows, columns), stored, dtype, bytes)?))
    }

    /// The bytes of a tensor that is stored as it is named, its values plain and in their order.
    pub(super) fn plain_bytes(&self, name: &str) -> Result<Option<&[u8]>> {
        let Place { info, first } = self.place(name)?;
        let StoredType::Float(dtype) = info.dtype else { return Ok(None) };
        if self.interleaved_heads(name).is_some() {
            return Ok(None);
        }
        let (first, size) = (first * dtype.size_in_bytes(), info.size_in_bytes());
        Ok(self.checkpoint.bytes(&info.name)?.get(first..first + size))
    }

    /// The names of the tensors that stay quantized when the model is opened.
    pub fn quantized(&self) -> impl Iterator<Item = &str> {
        self.names().filter(|name| self.info(name).is_ok_and(stays_quantized))
    }

    /// Bytes that the weights take in memory when the model computes in `dtype`: quantized ones as they are stored.
    #[must_use]
    pub fn weight_bytes(&self, dtype: DType) -> u64 {
        let bytes = |info: &TensorInfo| match stays_quantized(info) {
            true => info.size_in_bytes(),
            false => info.num_values() * dtype.size_in_bytes(),
        };
        self.infos().map(|info| bytes(info) as u64).sum()
    }

    /// Bytes of the largest tensor in its file of those that are converted when the model is opened.
    #[must_use]
    pub fn largest_read_bytes(&self) -> u64 {
        let converted = self.infos().filter(|info| !stays_quantized(info));
        converted.map(|info| info.size_in_bytes() as u64).max().unwrap_or(0)
    }

    /// The tensors that the decoder reads.
    fn infos(&self) -> impl Iterator<Item = &TensorInfo> {
        self.config.tensors().into_iter().filter_map(|(name, _)| self.find(&name))
    }

    /// The type to compute in when none is asked for: bf16 where most weights are stored in bf16 or quantized, which has
    /// taken more of them than bf16 will; else f32, for f16 too.
    #[must_use]
    pub fn compute_dtype(&self) -> DType {
        let tensors = || self.checkpoint.tensors().values();
        let all: usize = tensors().map(TensorInfo::num_values).sum();
        let narrow = tensors()
            .filter(|info| matches!(info.dtype, StoredType::Float(DType::BF16) | StoredType::Quantized(_)));
        if narrow.map(TensorInfo::num_values).sum::<usize>() * 2 > all { DType::BF16 } else { DType::F32 }
    }

    /// Whether all values are what they are in `dtype`, f32 or bf16, without rounding.
    #[must_use]
    pub fn fits(&self, dtype: DType) -> bool {
        let is_narrow = |info: &TensorInfo| matches!(info.dtype, StoredType::Float(DType::BF16));
        dtype == DType::F32 || self.checkpoint.tensors().values().all(is_narrow)
    }

    /// The file's name of a tensor, whether it is there or only should be.
    pub(super) fn stored_name(&self, name: &str) -> String {
        let guess = || if self.checkpoint.is_gguf() { family::gguf::to_gguf(name) } else { None };
        let there = self.places.get(name).map(|place| place.info.name.clone());
        there.or_else(guess).unwrap_or_else(|| name.to_string())
    }

    /// Into how many heads the rows of this tensor are interleaved.
    fn interleaved_heads(&self, name: &str) -> Option<usize> {
        if !self.interleaved {
            return None;
        }
        let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
        let attention = &self.config.layers.get(layer.parse::<usize>().ok()?)?.attention;
        match rest {
            "self_attn.q_proj.weight" | "self_attn.q_proj.bias" => Some(attention.num_heads),
            "self_attn.k_proj.weight" | "self_attn.k_proj.bias" => Some(attention.num_kv_heads),
            _ => None,
        }
    }
}

/// Where a tensor is.
#[derive(Debug)]
struct Place {
    /// The name of the tensor in the file, and the shape of this one, which may be a part of it.
    info: TensorInfo,
    /// The number of its first value there.
    first: usize,
}

/// Puts the parts of a tensor of another layout in its place, if it is there.
fn unpack(packed: &PackedTensor, places: &mut BTreeMap<String, Place>) {
    let has_shape = |place: &Place| place.info.shape == packed.shape;
    if !places.get(&packed.name).is_some_and(has_shape) {
        return;
    }
    let Some(whole) = places.remove(&packed.name) else { return };
    let mut first = 0;
    for (name, shape) in &packed.parts {
        let info = TensorInfo { shape: shape.to_vec(), ..whole.info.clone() };
        places.insert(name.clone(), Place { info, first });
        first += shape.iter().product::<usize>();
    }
}

/// Whether a tensor is computed with as it is stored.
fn stays_quantized(info: &TensorInfo) -> bool {
    match info.dtype {
        StoredType::Quantized(stored) => info.shape.len() == 2 && Quantized::supports(stored),
        StoredType::Float(_) | StoredType::Other(_) => false,
    }
}
