//! What a decoder is built from. A family's reader resolves every oddity of its `config.json` into these values.

/// A decoder of any family.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderConfig {
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// One entry per layer.
    pub layers: Vec<LayerConfig>,
    /// Added to the mean square inside every RMSNorm.
    pub norm_eps: f64,
    /// Rotary position embedding, the same in all layers.
    pub rotary: RotaryConfig,
    /// Whether the head uses the embedding's weight.
    pub tie_word_embeddings: bool,
    /// The longest sequence the model was made for.
    pub max_position_embeddings: usize,
}

/// One layer: attention, then a feed-forward network.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerConfig {
    /// The attention.
    pub attention: AttentionConfig,
    /// The feed-forward network.
    pub feed_forward: FeedForwardConfig,
}

/// Causal grouped-query attention.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionConfig {
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// A token sees itself and the `window - 1` tokens before it; `None`: all before it.
    pub window: Option<usize>,
    /// Whether q, k and v have a bias.
    pub qkv_bias: bool,
    /// Whether o has a bias.
    pub output_bias: bool,
    /// Whether q and k are normalised per head.
    pub qk_norm: bool,
}

/// The feed-forward network of a layer.
#[derive(Debug, Clone, PartialEq)]
pub enum FeedForwardConfig {
    /// `down(activation(gate(x)) * up(x))`.
    Dense {
        /// Neurons.
        width: usize,
        /// Whether the three projections have a bias.
        bias: bool,
        /// The gate's activation.
        activation: Activation,
    },
}

pub use crate::ops::Activation;

/// Rotary position embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct RotaryConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// How the frequencies are stretched.
    pub scaling: RotaryScaling,
}

/// How rotary frequencies are stretched beyond the trained length.
#[derive(Debug, Clone, PartialEq)]
pub enum RotaryScaling {
    /// Not at all.
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f64,
        /// Wavelengths above `original_length / low_freq_factor` are low frequencies.
        low_freq_factor: f64,
        /// Wavelengths below `original_length / high_freq_factor` are high frequencies.
        high_freq_factor: f64,
        /// The length the model was trained with before stretching.
        original_length: f64,
    },
}

/// The seven kinds of linear layer that adapters go to, and the head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Projection {
    /// Attention query.
    Q,
    /// Attention key.
    K,
    /// Attention value.
    V,
    /// Attention output.
    O,
    /// Feed-forward gate.
    Gate,
    /// Feed-forward up.
    Up,
    /// Feed-forward down.
    Down,
    /// The output embedding; never in `all-linear`.
    Head,
}

impl Projection {
    /// The last part of the module's path, as Hugging Face has it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Q => "q_proj",
            Self::K => "k_proj",
            Self::V => "v_proj",
            Self::O => "o_proj",
            Self::Gate => "gate_proj",
            Self::Up => "up_proj",
            Self::Down => "down_proj",
            Self::Head => "lm_head",
        }
    }
}

/// A linear layer as the configuration knows it, without its weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinearConfig {
    /// Module path, as Hugging Face has it: `model.layers.0.mlp.gate_proj`.
    pub path: String,
    /// The layer it is in; `None` for the head.
    pub layer: Option<usize>,
    /// Its place there.
    pub projection: Projection,
    /// Rows of the weight.
    pub out_features: usize,
    /// Columns of the weight.
    pub in_features: usize,
    /// Whether it has a bias.
    pub bias: bool,
}

impl DecoderConfig {
    /// Every linear layer in the order of the forward pass, the head last (also when it is tied): the single door for
    /// targets, counting, merging and inspection.
    #[must_use]
    pub fn linears(&self) -> Vec<LinearConfig> {
        let mut linears = Vec::with_capacity(self.layers.len() * 7 + 1);
        let hidden = self.hidden_size;
        for (index, layer) in self.layers.iter().enumerate() {
            let mut push = |projection: Projection, block: &str, out_features, in_features, bias| {
                linears.push(LinearConfig {
                    path: format!("model.layers.{index}.{block}.{}", projection.name()),
                    layer: Some(index),
                    projection,
                    out_features,
                    in_features,
                    bias,
                });
            };
            let attention = &layer.attention;
            let (q, kv) = (attention.q_width(), attention.kv_width());
            push(Projection::Q, "self_attn", q, hidden, attention.qkv_bias);
            push(Projection::K, "self_attn", kv, hidden, attention.qkv_bias);
            push(Projection::V, "self_attn", kv, hidden, attention.qkv_bias);
            push(Projection::O, "self_attn", hidden, q, attention.output_bias);
            match layer.feed_forward {
                FeedForwardConfig::Dense { width, bias, .. } => {
                    push(Projection::Gate, "mlp", width, hidden, bias);
                    push(Projection::Up, "mlp", width, hidden, bias);
                    push(Projection::Down, "mlp", hidden, width, bias);
                }
            }
        }
        linears.push(LinearConfig {
            path: "lm_head".to_string(),
            layer: None,
            projection: Projection::Head,
            out_features: self.vocab_size,
            in_features: hidden,
            bias: false,
        });
        linears
    }

    /// Name and shape of every tensor of the model, in the order of the forward pass; a tied head has none.
    #[must_use]
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let hidden = self.hidden_size;
        let mut tensors = vec![("model.embed_tokens.weight".to_string(), vec![self.vocab_size, hidden])];
        for (index, layer) in self.layers.iter().enumerate() {
            let path = format!("model.layers.{index}");
            tensors.push((format!("{path}.input_layernorm.weight"), vec![hidden]));
            tensors.push((format!("{path}.post_attention_layernorm.weight"), vec![hidden]));
            if layer.attention.qk_norm {
                let head_dim = layer.attention.head_dim;
                tensors.push((format!("{path}.self_attn.q_norm.weight"), vec![head_dim]));
                tensors.push((format!("{path}.self_attn.k_norm.weight"), vec![head_dim]));
            }
        }
        tensors.push(("model.norm.weight".to_string(), vec![hidden]));
        for linear in self.linears() {
            if linear.projection == Projection::Head && self.tie_word_embeddings {
                continue;
            }
            tensors.push((format!("{}.weight", linear.path), vec![linear.out_features, linear.in_features]));
            if linear.bias {
                tensors.push((format!("{}.bias", linear.path), vec![linear.out_features]));
            }
        }
        tensors
    }

    /// Numbers in all tensors together.
    #[must_use]
    pub fn num_parameters(&self) -> usize {
        self.tensors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum()
    }
}

impl AttentionConfig {
    /// Columns of q: all query heads side by side.
    #[must_use]
    pub fn q_width(&self) -> usize {
        self.num_heads * self.head_dim
    }

    /// Columns of k and of v.
    #[must_use]
    pub fn kv_width(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }
}
