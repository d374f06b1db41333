//! The linear layers of a decoder, from the configuration alone.

use super::{DecoderConfig, FeedForwardConfig, MoeConfig};

/// The kinds of linear layer.
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
    /// The router, which chooses experts. `all-linear` does not include it.
    Router,
    /// The gate that weighs the shared expert. `all-linear` does not include it.
    SharedGate,
    /// The output embedding. `all-linear` does not include it.
    Head,
}

impl Projection {
    /// Returns the name that recipes use, which is the last part of the module's path in most families.
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
            Self::Router => "gate",
            Self::SharedGate => "shared_expert_gate",
            Self::Head => "lm_head",
        }
    }

    /// Whether a layer gets an adapter only where a target names it: `all-linear` leaves it out.
    #[must_use]
    pub fn is_special(self) -> bool {
        matches!(self, Self::Head | Self::Router | Self::SharedGate)
    }
}

/// Where in its layer a linear layer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Site {
    /// Not in a mixture of experts.
    Dense,
    /// In this expert.
    Expert(usize),
    /// In the shared expert, or its gate.
    Shared,
    /// The router.
    Router,
}

/// A linear layer as the configuration knows it, without its weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinearConfig {
    /// Module path, as Hugging Face has it: `model.layers.0.mlp.gate_proj`.
    pub path: String,
    /// The layer it is in; `None` for the head.
    pub layer: Option<usize>,
    /// The kind of projection that it is.
    pub projection: Projection,
    /// The part of the layer that it belongs to: a router, an expert, or neither.
    pub site: Site,
    /// Rows of the weight.
    pub out_features: usize,
    /// Columns of the weight.
    pub in_features: usize,
    /// Whether it has a bias.
    pub bias: bool,
}

impl LinearConfig {
    /// The last part of its path.
    #[must_use]
    pub fn name(&self) -> &str {
        self.path.rsplit('.').next().unwrap_or(&self.path)
    }
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
                    site: Site::Dense,
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
            match &layer.feed_forward {
                FeedForwardConfig::Dense { width, bias, .. } => {
                    push(Projection::Gate, "mlp", *width, hidden, *bias);
                    push(Projection::Up, "mlp", *width, hidden, *bias);
                    push(Projection::Down, "mlp", hidden, *width, *bias);
                }
                FeedForwardConfig::Sparse(moe) => linears.extend(moe.linears(index, hidden)),
            }
        }
        linears.push(LinearConfig {
            path: "lm_head".to_string(),
            layer: None,
            projection: Projection::Head,
            site: Site::Dense,
            out_features: self.vocab_size,
            in_features: hidden,
            bias: false,
        });
        linears
    }
}

/// The projections of a feed-forward network, in the order of [`super::MoeNames::projections`].
const FEED_FORWARD: [Projection; 3] = [Projection::Gate, Projection::Up, Projection::Down];

impl MoeConfig {
    fn linears(&self, layer: usize, hidden: usize) -> Vec<LinearConfig> {
        let linear = |path, projection, site, (out_features, in_features)| LinearConfig {
            path,
            layer: Some(layer),
            projection,
            site,
            out_features,
            in_features,
            bias: false,
        };
        let sizes = |width| [(width, hidden), (width, hidden), (hidden, width)];
        let router = (self.experts, hidden);
        let mut linears = vec![linear(self.router_path(layer), Projection::Router, Site::Router, router)];
        for expert in 0..self.experts {
            for (i, (projection, size)) in FEED_FORWARD.into_iter().zip(sizes(self.width)).enumerate() {
                let path = self.expert_path(layer, expert, i);
                linears.push(linear(path, projection, Site::Expert(expert), size));
            }
        }
        if let Some(shared) = self.shared {
            for (i, (projection, size)) in FEED_FORWARD.into_iter().zip(sizes(shared.width)).enumerate() {
                linears.push(linear(self.shared_path(layer, i), projection, Site::Shared, size));
            }
            if shared.gated {
                let path = self.shared_gate_path(layer);
                linears.push(linear(path, Projection::SharedGate, Site::Shared, (1, hidden)));
            }
        }
        linears
    }
}
