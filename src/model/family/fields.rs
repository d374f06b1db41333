//! What the families share in reading a `config.json`: typed fields, and errors that name the field, what it has to be
//! and what was found.

use serde_json::{Map, Value};

use super::capacity::Capacity;
use crate::error::{Error, Result, nearest};
use crate::model::config::{
    Activation, AttentionConfig, DecoderConfig, FeedForwardConfig, LayerConfig, Multipliers,
};

/// The fields of a `config.json`.
pub(super) struct Fields<'a> {
    pub(super) map: &'a Map<String, Value>,
    model_type: &'a str,
    /// Limits the layers and experts to those that the model's files can contain.
    pub(super) capacity: Capacity,
}

/// No count of a model is larger, so that the product of two can be computed.
pub(super) const LARGEST_COUNT: usize = 1 << 31;

/// The defaults that differ from family to family: what its configuration class has where a file says nothing.
pub(super) struct Defaults {
    /// `None`: as many as query heads.
    pub(super) num_kv_heads: Option<usize>,
    /// `None`: the hidden size divided by the heads.
    pub(super) head_dim: Option<usize>,
    pub(super) max_position_embeddings: usize,
    pub(super) norm_eps: f64,
    pub(super) theta: f64,
    /// The share of a head that is rotated; `None`: all of it, and nothing else is supported.
    pub(super) rotary_share: Option<f64>,
}

impl Default for Defaults {
    fn default() -> Self {
        Self {
            num_kv_heads: None,
            head_dim: None,
            max_position_embeddings: 2048,
            norm_eps: 1e-6,
            theta: 10_000.0,
            rotary_share: None,
        }
    }
}

impl<'a> Fields<'a> {
    pub(super) fn new(config: &'a Value, model_type: &'a str, capacity: Capacity) -> Result<Self> {
        let map = config
            .as_object()
            .ok_or_else(|| Error::invalid(format!("expected a JSON object, found {}", shorten(config))))?;
        Ok(Self { map, model_type, capacity })
    }

    /// The field, unless it is absent or null.
    pub(super) fn get(&self, name: &str) -> Option<&'a Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    /// Whether the file has the field at all, be it null.
    pub(super) fn has(&self, name: &str) -> bool {
        self.map.contains_key(name)
    }

    /// A positive integer that has to be there.
    pub(super) fn count(&self, name: &str) -> Result<usize> {
        self.optional_count(name)?.ok_or_else(|| {
            Error::invalid(format!("`{name}` is missing; a `{}` model needs it", self.model_type))
        })
    }

    /// A positive integer, where the file has one.
    pub(super) fn optional_count(&self, name: &str) -> Result<Option<usize>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match count_of(name, value)? {
            Some(n) if n > 0 => Ok(Some(n)),
            _ => Err(wrong(name, "a positive integer", value)),
        }
    }

    /// An integer that may be zero.
    pub(super) fn index(&self, name: &str, default: usize) -> Result<usize> {
        let Some(value) = self.get(name) else { return Ok(default) };
        count_of(name, value)?.ok_or_else(|| wrong(name, "an integer of at least zero", value))
    }

    /// A flag.
    pub(super) fn flag(&self, name: &str, default: bool) -> Result<bool> {
        let Some(value) = self.get(name) else { return Ok(default) };
        value.as_bool().ok_or_else(|| wrong(name, "true or false", value))
    }

    /// The decoder without anything that only some families have: full attention, no biases, no head norms.
    pub(super) fn decoder(&self, defaults: &Defaults) -> Result<DecoderConfig> {
        self.refuse_unknown_mathematics()?;
        let hidden_size = self.count("hidden_size")?;
        let num_heads = self.count("num_attention_heads")?;
        // null means as many as query heads, a field left out means the class's default.
        let absent = if self.has("num_key_value_heads") { None } else { defaults.num_kv_heads };
        let num_kv_heads = self.optional_count("num_key_value_heads")?.or(absent).unwrap_or(num_heads);
        if num_heads % num_kv_heads != 0 {
            return Err(Error::invalid(format!(
                "`num_key_value_heads` must divide `num_attention_heads`, found {num_kv_heads} and {num_heads}"
            )));
        }
        let head_dim = match self.optional_count("head_dim")?.or(defaults.head_dim) {
            Some(head_dim) => head_dim,
            None if hidden_size % num_heads == 0 => hidden_size / num_heads,
            None => {
                return Err(Error::invalid(format!(
                    "`hidden_size` must be a multiple of `num_attention_heads`, found {hidden_size} and {num_heads}"
                )));
            }
        };
        if head_dim % 2 != 0 {
            return Err(Error::invalid(format!(
                "a head must have an even width for rotary embedding, found {head_dim}"
            )));
        }
        let num_layers = self.count("num_hidden_layers")?;
        self.capacity.refuse_layers("num_hidden_layers", num_layers)?;
        let max_position_embeddings =
            self.optional_count("max_position_embeddings")?.unwrap_or(defaults.max_position_embeddings);
        let layer = LayerConfig {
            attention: AttentionConfig {
                num_heads,
                num_kv_heads,
                head_dim,
                window: None,
                qkv_bias: false,
                output_bias: false,
                qk_norm: None,
                scale: 1.0 / (head_dim as f64).sqrt(),
            },
            feed_forward: FeedForwardConfig::Dense {
                width: self.count("intermediate_size")?,
                bias: false,
                activation: self.activation()?,
            },
        };
        Ok(DecoderConfig {
            vocab_size: self.count("vocab_size")?,
            hidden_size,
            layers: vec![layer; num_layers],
            norm_eps: bounded(self.get("rms_norm_eps"), "rms_norm_eps", 1e-12, 0.1)?
                .unwrap_or(defaults.norm_eps),
            rotary: self.rotary(max_position_embeddings, head_dim, defaults)?,
            tie_word_embeddings: self.flag("tie_word_embeddings", false)?,
            max_position_embeddings,
            multipliers: Multipliers::NONE,
            spare_layers: 0,
        })
    }

    /// Attention windows as the Qwen families write them: `layer_types` decides where it is present, otherwise layers
    /// from `max_window_layers` on; nothing slides unless `use_sliding_window` says so.
    pub(super) fn windows(&self, num_layers: usize) -> Result<Vec<Option<usize>>> {
        let window = if self.flag("use_sliding_window", false)? {
            Some(self.optional_count("sliding_window")?.unwrap_or(4096))
        } else {
            None
        };
        let Some(types) = self.get("layer_types") else {
            let first = self.index("max_window_layers", 28)?;
            return Ok((0..num_layers).map(|layer| window.filter(|_| layer >= first)).collect());
        };
        let list = types.as_array().filter(|list| list.len() == num_layers).ok_or_else(|| {
            wrong("layer_types", &format!("a list of {num_layers} entries, one per layer"), types)
        })?;
        list.iter()
            .map(|kind| match kind.as_str() {
                Some("full_attention") => Ok(None),
                Some("sliding_attention") if window.is_some() => Ok(window),
                Some("sliding_attention") => Err(Error::invalid(
                    "`layer_types` has `sliding_attention`, but `use_sliding_window` and `sliding_window` give no window",
                )),
                _ => Err(wrong("layer_types", "`full_attention` or `sliding_attention` per layer", kind)),
            })
            .collect()
    }

    pub(super) fn activation(&self) -> Result<Activation> {
        const KNOWN: [&str; 6] = ["silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"];
        let Some(value) = self.get("hidden_act") else { return Ok(Activation::Silu) };
        match value.as_str() {
            Some("silu" | "swish") => Ok(Activation::Silu),
            Some("gelu") => Ok(Activation::Gelu),
            Some("gelu_new" | "gelu_pytorch_tanh") => Ok(Activation::GeluTanh),
            Some("relu") => Ok(Activation::Relu),
            _ => Err(unsupported("hidden_act", value, &KNOWN)),
        }
    }

    /// Fields that change what the layers compute, in ways that this crate has no code for.
    fn refuse_unknown_mathematics(&self) -> Result<()> {
        if let Some(value) = self.get("quantization_config") {
            let method = value.get("quant_method").and_then(Value::as_str).unwrap_or("of an unknown kind");
            return Err(Error::invalid(format!("`quantization_config` ({method}) is not supported"))
                .with_hint("give the model's unquantized weights, or a .gguf file"));
        }
        Ok(())
    }
}

/// A positive number, where there is one.
pub(super) fn number(value: Option<&Value>, name: &str) -> Result<Option<f64>> {
    let Some(value) = value else { return Ok(None) };
    match value.as_f64().filter(|number| *number > 0.0 && number.is_finite()) {
        Some(number) => Ok(Some(number)),
        None => Err(wrong(name, "a positive number", value)),
    }
}

/// A number between two that no model has a reason to go beyond, where there is one.
pub(super) fn bounded(value: Option<&Value>, name: &str, least: f64, most: f64) -> Result<Option<f64>> {
    match (number(value, name)?, value) {
        (Some(number), Some(value)) if !(least..=most).contains(&number) => {
            Err(wrong(name, &format!("from {} to {}", short(least), short(most)), value))
        }
        (number, _) => Ok(number),
    }
}

/// A number without a row of zeros.
fn short(number: f64) -> String {
    if (1e-3..1e6).contains(&number) { number.to_string() } else { format!("{number:e}") }
}

/// Reads the multiplier `name`, which is from 1e-6 to 1e6; `None` where there is no number.
pub(super) fn multiplier(value: Option<&Value>, name: &str) -> Result<Option<f64>> {
    bounded(value, name, 1e-6, 1e6)
}

/// An integer of at least zero; `None`: it is something else.
fn count_of(name: &str, value: &Value) -> Result<Option<usize>> {
    let is_integer = value.as_number().is_some_and(|number| number.is_u64());
    match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
        Some(n) if n <= LARGEST_COUNT => Ok(Some(n)),
        _ if is_integer => Err(wrong(name, &format!("at most {LARGEST_COUNT}"), value)),
        _ => Ok(None),
    }
}

pub(super) fn wrong(name: &str, expected: &str, found: &Value) -> Error {
    Error::invalid(format!("`{name}` must be {expected}, found `{}`", shorten(found)))
}

/// The value is not one of those that there is code for.
pub(super) fn unsupported(name: &str, found: &Value, known: &[&str]) -> Error {
    let list = known.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    let text = found.as_str().map_or_else(|| shorten(found), str::to_string);
    let error = Error::invalid(format!("`{name}` is `{text}`, which is not supported; supported are {list}"));
    match nearest(&text, known.iter().copied(), 1).first() {
        Some(near) if found.is_string() => error.with_hint(format!("nearest is `{near}`")),
        _ => error,
    }
}

fn shorten(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() <= 80 { text } else { text.chars().take(77).chain("...".chars()).collect() }
}
