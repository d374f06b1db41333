//! The way back: the `config.json` of a mixture of experts made from a dense model, in a family that stock tools load.
//!
//! What a family does with scores decides what has to be multiplied into the experts so that each of them counts
//! fully. See [`Layout`].

use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::model::config::{DecoderConfig, FeedForwardConfig, QkNorm, RotaryScaling};

/// A family that a mixture can be written as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MixtureFormat {
    /// Sigmoid scores, a bias for the choice, shared experts without a gate, dense first layers.
    Glm4Moe,
    /// Softmax of the chosen, a shared expert without a gate; every layer is sparse.
    #[serde(rename = "granitemoeshared")]
    GraniteMoeShared,
    /// Softmax of all, a shared expert behind a gate, any layers dense.
    Qwen2Moe,
    /// Softmax of the chosen, nothing shared; every layer is sparse.
    Mixtral,
    /// Softmax of the chosen, nothing shared, norms of q and k, any layers dense.
    Qwen3Moe,
}

/// The sizes of a mixture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MixtureShape {
    /// Experts to choose from.
    pub experts: usize,
    /// Experts of a token.
    pub active: usize,
    /// Neurons of an expert.
    pub width: usize,
    /// Shared experts of that width.
    pub shared: usize,
    /// Whether the weights of a token's experts sum to one (copies), or each is one (slices).
    pub averaged: bool,
    /// For each layer whether it stays dense.
    pub dense: Vec<bool>,
}

/// A configuration, and what has to be multiplied into the weights for it.
#[derive(Debug, Clone, PartialEq)]
pub struct Layout {
    /// The `config.json`.
    pub config: Value,
    /// What the down projections of routed experts are multiplied with.
    pub routed_scale: f64,
    /// The same of the shared expert.
    pub shared_scale: f64,
}

impl MixtureFormat {
    /// Its `model_type`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Glm4Moe => "glm4_moe",
            Self::GraniteMoeShared => "granitemoeshared",
            Self::Qwen2Moe => "qwen2_moe",
            Self::Mixtral => "mixtral",
            Self::Qwen3Moe => "qwen3_moe",
        }
    }

    /// What transformers calls the class.
    fn class(self) -> &'static str {
        match self {
            Self::Glm4Moe => "Glm4MoeForCausalLM",
            Self::GraniteMoeShared => "GraniteMoeSharedForCausalLM",
            Self::Qwen2Moe => "Qwen2MoeForCausalLM",
            Self::Mixtral => "MixtralForCausalLM",
            Self::Qwen3Moe => "Qwen3MoeForCausalLM",
        }
    }

    /// Whether a bias can be added to the scores for the choice.
    #[must_use]
    pub fn has_selection_bias(self) -> bool {
        self == Self::Glm4Moe
    }

    /// Why this family cannot hold such a mixture of such a model; `None`: it can.
    #[must_use]
    pub fn obstacle(self, config: &DecoderConfig, shape: &MixtureShape) -> Option<String> {
        let attention = &config.layers.first()?.attention;
        let says = |text: &str| Some(text.to_string());
        if config.layers.iter().any(|layer| layer.attention.window.is_some()) && self != Self::Mixtral {
            return says("it has no sliding window, which the model's attention has");
        }
        if attention.output_bias && self != Self::GraniteMoeShared {
            return says("its attention has no bias after the output projection, and the model's has");
        }
        if attention.qkv_bias && matches!(self, Self::Mixtral | Self::Qwen3Moe) {
            return says("its attention has no biases, and the model's has");
        }
        if attention.qkv_bias && !attention.output_bias && self == Self::GraniteMoeShared {
            return says(
                "its attention has biases everywhere or nowhere, and the model's only in q, k and v",
            );
        }
        match (attention.qk_norm, self) {
            (Some(QkNorm::PerHead), Self::Glm4Moe | Self::Qwen3Moe) => {}
            (Some(_), _) => return says("it has no norm of q and k of this kind, and the model has"),
            (None, Self::Qwen3Moe) => return says("it has a norm of q and k, and the model has none"),
            (None, _) => {}
        }
        let whole = attention.num_heads * attention.head_dim == config.hidden_size;
        if !whole && matches!(self, Self::GraniteMoeShared | Self::Qwen2Moe) {
            return says("its heads fill the hidden width, and the model's do not");
        }
        if shape.shared > 0 && matches!(self, Self::Mixtral | Self::Qwen3Moe) {
            return says("it has no shared experts");
        }
        if shape.shared == 0 && self == Self::Qwen2Moe {
            return says("it needs a shared expert");
        }
        let prefix = shape.dense.iter().take_while(|dense| **dense).count();
        let only_first = shape.dense[prefix..].iter().all(|dense| !dense);
        match self {
            Self::Glm4Moe if !only_first => says("only its first layers can be dense"),
            Self::Mixtral | Self::GraniteMoeShared if shape.dense.contains(&true) => {
                says("none of its layers can be dense")
            }
            _ => None,
        }
    }

    /// An error where there is an obstacle.
    pub fn refuse_unfit(self, config: &DecoderConfig, shape: &MixtureShape) -> Result<()> {
        let Some(obstacle) = self.obstacle(config, shape) else { return Ok(()) };
        let name = self.name();
        Err(Error::request(format!("a mixture of this model cannot be stored as `{name}`: {obstacle}"))
            .with_hint("`upcycle.format = \"auto\"` takes a family that can hold it"))
    }

    /// The configuration of a mixture with the sizes `shape`, made of the model `dense` (its `config.json`) that is
    /// `config`.
    pub fn layout(self, dense: &Value, config: &DecoderConfig, shape: &MixtureShape) -> Result<Layout> {
        self.refuse_unfit(config, shape)?;
        let FeedForwardConfig::Dense { width, .. } = config.layers[0].feed_forward else {
            return Err(Error::request("the model is a mixture of experts already"));
        };
        let mut map = plain(self, dense, config);
        let MixtureShape { experts, active, shared, averaged, .. } = *shape;
        let mut set = |key: &str, value: Value| drop(map.insert(key.to_string(), value));
        set("num_experts_per_tok", json!(active));
        let dense_layers: Vec<usize> = (0..shape.dense.len()).filter(|layer| shape.dense[*layer]).collect();
        let mut layout = Layout { config: Value::Null, routed_scale: 1.0, shared_scale: 1.0 };
        if !averaged && self != Self::Glm4Moe {
            layout.routed_scale = active as f64;
        }
        match self {
            Self::Glm4Moe => {
                let scale = if averaged { 1.0 } else { active as f64 };
                set("intermediate_size", json!(width));
                set("moe_intermediate_size", json!(shape.width));
                set("n_routed_experts", json!(experts));
                set("n_shared_experts", json!(shared));
                set("routed_scaling_factor", json!(scale));
                set("norm_topk_prob", json!(true));
                set("n_group", json!(1));
                set("topk_group", json!(1));
                set("first_k_dense_replace", json!(dense_layers.len()));
                set("num_nextn_predict_layers", json!(0));
                set("partial_rotary_factor", json!(1.0));
                set("attention_bias", json!(config.layers[0].attention.qkv_bias));
                set("use_qk_norm", json!(config.layers[0].attention.qk_norm.is_some()));
            }
            Self::Mixtral => {
                set("intermediate_size", json!(shape.width));
                set("num_local_experts", json!(experts));
                set("router_aux_loss_coef", json!(0.001));
                set("sliding_window", json!(config.layers[0].attention.window));
            }
            Self::GraniteMoeShared => {
                set("intermediate_size", json!(shape.width));
                set("num_local_experts", json!(experts));
                set("shared_intermediate_size", json!(shared * shape.width));
                set("embedding_multiplier", json!(config.multipliers.embedding));
                set("residual_multiplier", json!(config.multipliers.residual));
                set("logits_scaling", json!(1.0 / config.multipliers.logits));
                set("attention_multiplier", json!(config.layers[0].attention.scale));
                set("attention_bias", json!(config.layers[0].attention.qkv_bias));
            }
            Self::Qwen2Moe | Self::Qwen3Moe => {
                set("intermediate_size", json!(width));
                set("moe_intermediate_size", json!(shape.width));
                set("num_experts", json!(experts));
                set("decoder_sparse_step", json!(1));
                set("mlp_only_layers", json!(dense_layers));
                set("router_aux_loss_coef", json!(0.001));
                let renormalise = averaged || self == Self::Qwen3Moe;
                set("norm_topk_prob", json!(renormalise));
                if !renormalise {
                    // Even scores are one part in as many as there are experts, whatever number is active.
                    layout.routed_scale = experts as f64;
                }
                if self == Self::Qwen2Moe {
                    set("shared_expert_intermediate_size", json!(shared * shape.width));
                    set("qkv_bias", json!(true));
                    layout.shared_scale = 2.0;
                } else {
                    set("attention_bias", json!(false));
                }
            }
        }
        layout.config = Value::Object(map);
        Ok(layout)
    }
}

/// What all families have in common with the dense model.
fn plain(format: MixtureFormat, dense: &Value, config: &DecoderConfig) -> Map<String, Value> {
    const KEPT: [&str; 8] = [
        "attention_dropout",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "hidden_act",
        "initializer_range",
        "pad_token_id",
        "torch_dtype",
    ];
    let attention = &config.layers[0].attention;
    let mut map = Map::new();
    map.insert("architectures".into(), json!([format.class()]));
    map.insert("model_type".into(), json!(format.name()));
    for key in KEPT {
        if let Some(value) = dense.get(key) {
            map.insert(key.into(), value.clone());
        }
    }
    for (key, value) in [
        ("vocab_size", json!(config.vocab_size)),
        ("hidden_size", json!(config.hidden_size)),
        ("num_hidden_layers", json!(config.layers.len())),
        ("num_attention_heads", json!(attention.num_heads)),
        ("num_key_value_heads", json!(attention.num_kv_heads)),
        ("head_dim", json!(attention.head_dim)),
        ("max_position_embeddings", json!(config.max_position_embeddings)),
        ("rms_norm_eps", json!(config.norm_eps)),
        ("rope_theta", json!(config.rotary.theta)),
        // Some runtimes do not tie the head of sparse families.
        ("tie_word_embeddings", json!(false)),
        ("use_cache", json!(true)),
    ] {
        map.insert(key.into(), value);
    }
    let mut rope = Map::new();
    rope.insert("rope_theta".into(), json!(config.rotary.theta));
    match config.rotary.scaling {
        RotaryScaling::None => drop(rope.insert("rope_type".into(), json!("default"))),
        RotaryScaling::Linear { factor } => {
            rope.insert("rope_type".into(), json!("linear"));
            rope.insert("factor".into(), json!(factor));
        }
        RotaryScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_length } => {
            rope.insert("rope_type".into(), json!("llama3"));
            rope.insert("factor".into(), json!(factor));
            rope.insert("low_freq_factor".into(), json!(low_freq_factor));
            rope.insert("high_freq_factor".into(), json!(high_freq_factor));
            rope.insert("original_max_position_embeddings".into(), json!(original_length as usize));
        }
    }
    if format == MixtureFormat::Glm4Moe {
        rope.insert("partial_rotary_factor".into(), json!(1.0));
    }
    map.insert("rope_parameters".into(), Value::Object(rope));
    map
}
