//! What training keeps in memory, from the configuration alone.

use candle_core::DType;

use super::config::{DecoderConfig, FeedForwardConfig};
use super::decoder::Recompute;

impl DecoderConfig {
    /// Bytes that the forward of one token keeps for the backward, in all layers.
    #[must_use]
    pub fn activation_bytes_per_token(&self, dtype: DType, recompute: Recompute) -> u64 {
        let hidden = self.hidden_size;
        let kept = self.layers.iter().map(|layer| {
            let (q, kv) = (layer.attention.q_width(), layer.attention.kv_width());
            let FeedForwardConfig::Dense { width, .. } = layer.feed_forward;
            // Two norms' inputs and outputs; q, k, v and what attention gives; gate, up and their product.
            4 * hidden + 2 * q + 2 * kv + 3 * width
        });
        let values = match recompute {
            Recompute::None => kept.sum(),
            Recompute::Block => hidden * self.layers.len() + kept.max().unwrap_or(0),
        };
        (values * dtype.size_in_bytes()) as u64
    }
}
