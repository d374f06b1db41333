//! GGUF: metadata to `config.json`, tensor names both ways, and the order of rows in q and k.
//!
//! llama.cpp rotates neighbouring columns of a head where transformers rotates the two halves, so files of architecture
//! `llama` hold the rows of q and k interleaved: row `2 i + j` of a head is row `i + j * d/2` of the original.

use candle_core::quantized::gguf_file::Value as Entry;
use candle_core::{DType, Device, Tensor};
use serde_json::{Map, Value, json};

use super::capacity::Capacity;
use super::fields::{LARGEST_COUNT, unsupported};
use crate::error::{Error, Result};
use crate::weights::{Checkpoint, GgufMetadata};

/// Frequencies of a stretched rotary embedding; not a weight.
const ROPE_FREQUENCIES: &str = "rope_freqs.weight";

const TOP: [(&str, &str); 3] = [
    ("model.embed_tokens.weight", "token_embd.weight"),
    ("model.norm.weight", "output_norm.weight"),
    ("lm_head.weight", "output.weight"),
];

const IN_LAYER: [(&str, &str); 11] = [
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
];

/// The file's name of a tensor.
pub(in crate::model) fn to_gguf(name: &str) -> Option<String> {
    if let Some((_, gguf)) = TOP.iter().find(|(hf, _)| *hf == name) {
        return Some((*gguf).to_string());
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (module, kind) = rest.rsplit_once('.')?;
    let (_, gguf) = IN_LAYER.iter().find(|(hf, _)| *hf == module)?;
    Some(format!("blk.{layer}.{gguf}.{kind}"))
}

/// Hugging Face's name of a tensor.
pub(in crate::model) fn from_gguf(name: &str) -> Option<String> {
    if let Some((hf, _)) = TOP.iter().find(|(_, gguf)| *gguf == name) {
        return Some((*hf).to_string());
    }
    let (layer, rest) = name.strip_prefix("blk.")?.split_once('.')?;
    let (module, kind) = rest.rsplit_once('.')?;
    let (hf, _) = IN_LAYER.iter().find(|(_, gguf)| *gguf == module)?;
    Some(format!("model.layers.{layer}.{hf}.{kind}"))
}

/// Whether files of this architecture hold q and k interleaved.
pub(in crate::model) fn is_interleaved(metadata: &GgufMetadata) -> bool {
    architecture(metadata) == "llama"
}

/// Interleaved rows back to two halves per head; `tensor` is `[heads * d, ..]`.
pub(in crate::model) fn restore_rows(tensor: &Tensor, heads: usize) -> Result<Tensor> {
    let dims = tensor.dims();
    let rest: usize = dims[1..].iter().product();
    let split = tensor.reshape((heads, dims[0] / heads / 2, 2, rest))?; // [heads, d/2, 2, ..]
    Ok(split.transpose(1, 2)?.contiguous()?.reshape(dims)?) // [heads, 2, d/2, ..]
}

/// The same for rows that are `bytes` of blocks.
pub(in crate::model) fn restore_blocks(blocks: &[u8], rows: usize, heads: usize) -> Vec<u8> {
    let (row, half) = (blocks.len() / rows.max(1), rows / heads / 2);
    let mut restored = Vec::with_capacity(blocks.len());
    for head in blocks.chunks_exact((2 * half * row).max(1)) {
        for j in 0..2 {
            for i in 0..half {
                restored.extend_from_slice(&head[(2 * i + j) * row..][..row]);
            }
        }
    }
    restored
}

/// The `config.json` that the metadata amounts to.
pub(in crate::model) fn config(
    checkpoint: &Checkpoint,
    metadata: &GgufMetadata,
    capacity: &Capacity,
) -> Result<Value> {
    const KNOWN: [(&str, &str); 3] =
        [("llama", "LlamaForCausalLM"), ("qwen2", "Qwen2ForCausalLM"), ("qwen3", "Qwen3ForCausalLM")];
    let name = architecture(metadata);
    let Some((_, class)) = KNOWN.iter().find(|(known, _)| *known == name) else {
        return Err(unsupported("general.architecture", &json!(name), &KNOWN.map(|(known, _)| known)));
    };
    let keys = Keys { metadata, architecture: name };
    let has = |name: &str| checkpoint.tensors().contains_key(name);
    if keys.optional("expert_count")?.is_some_and(|count| count > 0) {
        return Err(Error::invalid(format!(
            "`{name}.expert_count` is not 0; sparse GGUF files are not supported"
        )));
    }
    let hidden = keys.required("embedding_length")?;
    let heads = keys.required("attention.head_count")?;
    let head_dim = keys.optional("attention.key_length")?.unwrap_or(hidden / heads.max(1));
    for key in ["attention.value_length", "rope.dimension_count"] {
        if let Some(found) = keys.optional(key)?.filter(|found| *found != head_dim) {
            return Err(Error::invalid(format!(
                "`{name}.{key}` is {found}, expected the head's width {head_dim}"
            )));
        }
    }
    if let Some(window) = keys.optional("attention.sliding_window")?.filter(|window| *window > 0) {
        return Err(Error::invalid(format!(
            "`{name}.attention.sliding_window` is {window}, which is not supported"
        ))
        .with_hint("give the model as a Hugging Face folder"));
    }
    let vocab_size = match checkpoint.tensors().get("token_embd.weight") {
        Some(info) => info.shape.first().copied().unwrap_or(0),
        None => return Err(Error::invalid("has no tensor `token_embd.weight`")),
    };
    let length = keys.required("context_length")?;
    let layers = keys.required("block_count")?;
    capacity.refuse_layers(&format!("{name}.block_count"), layers)?;
    let mut config = json!({
        "architectures": [class],
        "model_type": name,
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": keys.required("feed_forward_length")?,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.optional("attention.head_count_kv")?.unwrap_or(heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": length,
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon")?.unwrap_or(1e-6),
        "rope_theta": keys.number("rope.freq_base")?.unwrap_or(10_000.0),
        "tie_word_embeddings": !has("output.weight"),
        "torch_dtype": "float32",
    });
    // The literal above is an object.
    if let Some(map) = config.as_object_mut() {
        let theta = map["rope_theta"].as_f64().unwrap_or(10_000.0);
        if let Some(scaling) = scaling(&keys, checkpoint, theta, head_dim)? {
            map.insert("rope_scaling".to_string(), scaling);
        }
        if name != "qwen2" {
            map.insert("attention_bias".to_string(), json!(has("blk.0.attn_q.bias")));
        }
        if name == "llama" {
            map.insert("mlp_bias".to_string(), json!(has("blk.0.ffn_gate.bias")));
        }
        special_tokens(map, metadata);
    }
    Ok(config)
}

/// The stretching of the rotary embedding: named in the metadata, or for Llama 3 as a divisor per frequency.
fn scaling(keys: &Keys<'_>, checkpoint: &Checkpoint, theta: f64, head_dim: usize) -> Result<Option<Value>> {
    let kind = match keys.entry("rope.scaling.type") {
        Some(Entry::String(kind)) => kind.as_str(),
        _ => "none",
    };
    match kind {
        "none" => {}
        "linear" => {
            let factor = keys.number("rope.scaling.factor")?.unwrap_or(1.0);
            return Ok(Some(json!({ "rope_type": "linear", "factor": factor })));
        }
        other => {
            let key = format!("{}.rope.scaling.type", keys.architecture);
            return Err(unsupported(&key, &json!(other), &["none", "linear"]));
        }
    }
    if !checkpoint.tensors().contains_key(ROPE_FREQUENCIES) {
        return Ok(None);
    }
    let divisors: Vec<f32> =
        checkpoint.read(ROPE_FREQUENCIES, DType::F32, &Device::Cpu)?.flatten_all()?.to_vec1()?;
    if divisors.iter().all(|divisor| *divisor == 1.0) {
        return Ok(None);
    }
    // Every published Llama 3 has these three values; they are confirmed against the divisors.
    let (low, high, original) = (1.0, 4.0, 8192.0);
    let factor = f64::from(divisors.iter().copied().fold(1.0, f32::max)).round();
    let expected = (0..head_dim / 2).map(|i| {
        let wavelength = std::f64::consts::TAU * theta.powf(2.0 * i as f64 / head_dim as f64);
        let share = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0);
        1.0 / ((1.0 - share) / factor + share)
    });
    let agrees = divisors.len() == head_dim / 2
        && expected.zip(&divisors).all(|(expected, found)| (expected / f64::from(*found) - 1.0).abs() < 1e-3);
    if !agrees {
        return Err(Error::invalid(format!(
            "`{ROPE_FREQUENCIES}` is not the stretching of a Llama 3 model, and no other is supported"
        ))
        .with_hint("give the model as a Hugging Face folder"));
    }
    Ok(Some(json!({
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original as usize,
    })))
}

fn special_tokens(config: &mut Map<String, Value>, metadata: &GgufMetadata) {
    for (key, field) in [("bos", "bos_token_id"), ("eos", "eos_token_id"), ("padding", "pad_token_id")] {
        if let Some(Ok(id)) = metadata.get(&format!("tokenizer.ggml.{key}_token_id")).map(Entry::to_u64) {
            config.insert(field.to_string(), json!(id));
        }
    }
}

fn architecture(metadata: &GgufMetadata) -> &str {
    match metadata.get("general.architecture") {
        Some(Entry::String(name)) => name,
        _ => "",
    }
}

/// The metadata keys that begin with the architecture's name.
struct Keys<'a> {
    metadata: &'a GgufMetadata,
    architecture: &'a str,
}

impl Keys<'_> {
    fn entry(&self, key: &str) -> Option<&Entry> {
        self.metadata.get(&format!("{}.{key}", self.architecture))
    }

    fn required(&self, key: &str) -> Result<usize> {
        self.optional(key)?.ok_or_else(|| Error::invalid(format!("`{}.{key}` is missing", self.architecture)))
    }

    /// One number, or a list with the same number for every layer.
    fn optional(&self, key: &str) -> Result<Option<usize>> {
        let Some(entry) = self.entry(key) else { return Ok(None) };
        let count = |entry: &Entry| match entry {
            Entry::I32(n) => usize::try_from(*n).ok(),
            Entry::I64(n) => usize::try_from(*n).ok(),
            entry => entry.to_u64().ok().and_then(|n| usize::try_from(n).ok()),
        };
        let found = match entry {
            Entry::Array(list) => {
                let first = list.first().and_then(count);
                first.filter(|first| list.iter().all(|entry| count(entry) == Some(*first)))
            }
            entry => count(entry),
        };
        match found {
            Some(count) if count <= LARGEST_COUNT => Ok(Some(count)),
            Some(count) => Err(Error::invalid(format!(
                "`{}.{key}` must be at most {LARGEST_COUNT}, found `{count}`",
                self.architecture
            ))),
            None => Err(Error::invalid(format!(
                "`{}.{key}` must be a number of at least zero, the same for all layers",
                self.architecture
            ))),
        }
    }

    /// A number as it was meant: metadata has f32, in which 1e-5 is 9.999999747378752e-6.
    fn number(&self, key: &str) -> Result<Option<f64>> {
        match self.entry(key) {
            None => Ok(None),
            Some(Entry::F32(value)) => Ok(value.to_string().parse().ok()),
            Some(Entry::F64(value)) => Ok(Some(*value)),
            Some(_) => Err(Error::invalid(format!("`{}.{key}` must be a number", self.architecture))),
        }
    }
}
