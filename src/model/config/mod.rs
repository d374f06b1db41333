//! The configuration that a decoder is built from. The reader of each family turns its `config.json` into these values.

use crate::error::{Error, Result};

mod linears;
mod moe;
mod sizes;

pub use linears::{LinearConfig, Projection, Site};
pub use moe::{
    Bundle, EVEN_EXPONENT, InPeft, MoeConfig, MoeNames, Overflow, PackedTensor, RouterNoise, RoutingKind,
    RoutingVariant, Scoring, SharedConfig,
};
pub(in crate::model) use sizes::Widths;

/// The name of the embedding's weight.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
/// The name of the head's weight, where the head has one of its own.
pub const HEAD: &str = "lm_head.weight";

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
    /// Factors on the embedding, the residual stream and the logits; all are 1 in most families.
    pub multipliers: Multipliers,
    /// The number of layers in the files after the last computed one. They predict further tokens and are not loaded.
    pub spare_layers: usize,
}

/// Factors that values are multiplied with between the embedding and the logits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Multipliers {
    /// The factor on rows of the embedding.
    pub embedding: f64,
    /// The factor on what attention and feed-forward network add to the residual stream.
    pub residual: f64,
    /// The factor on the logits.
    pub logits: f64,
}

impl Multipliers {
    /// Nothing is scaled.
    pub const NONE: Self = Self { embedding: 1.0, residual: 1.0, logits: 1.0 };
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
    /// How q and k are normalised.
    pub qk_norm: Option<QkNorm>,
    /// What scores are multiplied with, commonly `1 / sqrt(head_dim)`.
    pub scale: f64,
}

/// The values over which one norm of q or k is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// Each head by itself.
    PerHead,
    /// All heads together.
    FullWidth,
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
    /// A router, experts, and shared experts beside them.
    Sparse(Box<MoeConfig>),
}

pub use crate::ops::Activation;

/// Rotary position embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct RotaryConfig {
    /// Base of the frequencies.
    pub theta: f64,
    /// How the frequencies are stretched.
    pub scaling: RotaryScaling,
    /// The share of a head, from its first column on, that is rotated.
    pub share: f64,
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

impl DecoderConfig {
    /// Name and shape of every tensor of the model, in the order of the forward pass; a tied head has none.
    #[must_use]
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let hidden = self.hidden_size;
        let mut tensors = vec![(EMBEDDING.to_string(), vec![self.vocab_size, hidden])];
        for (index, layer) in self.layers.iter().enumerate() {
            let path = format!("model.layers.{index}");
            tensors.push((format!("{path}.input_layernorm.weight"), vec![hidden]));
            tensors.push((format!("{path}.post_attention_layernorm.weight"), vec![hidden]));
            if let Some((q, k)) = layer.attention.qk_norm_widths() {
                tensors.push((format!("{path}.self_attn.q_norm.weight"), vec![q]));
                tensors.push((format!("{path}.self_attn.k_norm.weight"), vec![k]));
            }
            if let FeedForwardConfig::Sparse(moe) = &layer.feed_forward
                && moe.selection_bias
            {
                tensors.push((moe.selection_bias_path(index), vec![moe.experts]));
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

    /// The sparse layers: number and network.
    pub fn sparse_layers(&self) -> impl Iterator<Item = (usize, &MoeConfig)> {
        self.layers.iter().enumerate().filter_map(|(index, layer)| match &layer.feed_forward {
            FeedForwardConfig::Sparse(moe) => Some((index, &**moe)),
            FeedForwardConfig::Dense { .. } => None,
        })
    }

    /// Changes how experts are chosen in every sparse layer: how many, and in which way.
    pub fn reroute(&mut self, active: Option<usize>, variant: RoutingVariant) -> Result<()> {
        for layer in &mut self.layers {
            let FeedForwardConfig::Sparse(moe) = &mut layer.feed_forward else { continue };
            moe.active = active.unwrap_or(moe.active);
            moe.variant = variant;
            if moe.active > moe.experts {
                return Err(Error::request(format!(
                    "`routing.active` is {}, and the model has {} experts",
                    moe.active, moe.experts
                )));
            }
        }
        Ok(())
    }

    /// Lists the tensors that hold several of [`DecoderConfig::tensors`] in one, as other layouts of the same weights do.
    #[must_use]
    pub fn packed_tensors(&self) -> Vec<PackedTensor> {
        self.sparse_layers().flat_map(|(index, moe)| moe.packed_tensors(index, self.hidden_size)).collect()
    }

    /// Whether a tensor belongs to a layer that is left aside.
    #[must_use]
    pub fn is_spare(&self, name: &str) -> bool {
        let layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse().ok());
        let spare = self.layers.len()..self.layers.len() + self.spare_layers;
        layer.is_some_and(|layer: usize| spare.contains(&layer))
    }

    /// Whether a tensor belongs to a router. Routers are held in f32 whatever the model computes in.
    #[must_use]
    pub fn is_held_in_f32(&self, name: &str) -> bool {
        let in_layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'));
        in_layer.is_some_and(|(layer, rest)| {
            let layer = layer.parse().ok().and_then(|layer: usize| self.layers.get(layer));
            match layer.map(|layer| &layer.feed_forward) {
                Some(FeedForwardConfig::Sparse(moe)) => {
                    rest.strip_prefix(moe.names.router).is_some_and(|rest| rest.starts_with('.'))
                }
                _ => false,
            }
        })
    }

    /// Numbers in all tensors together.
    #[must_use]
    pub fn num_parameters(&self) -> usize {
        self.tensors().iter().map(|(_, shape)| shape.iter().product::<usize>()).sum()
    }
}

impl AttentionConfig {
    /// Columns of q: all query heads side by side. A product that is too large for the type stays the largest number, which
    /// no tensor has.
    #[must_use]
    pub fn q_width(&self) -> usize {
        self.num_heads.saturating_mul(self.head_dim)
    }

    /// Columns of k and of v, bounded in the same way.
    #[must_use]
    pub fn kv_width(&self) -> usize {
        self.num_kv_heads.saturating_mul(self.head_dim)
    }

    /// Values in the weights of the norms of q and k, where there are any.
    #[must_use]
    pub fn qk_norm_widths(&self) -> Option<(usize, usize)> {
        self.qk_norm.map(|norm| match norm {
            QkNorm::PerHead => (self.head_dim, self.head_dim),
            QkNorm::FullWidth => (self.q_width(), self.kv_width()),
        })
    }
}
