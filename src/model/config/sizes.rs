//! Computes the sizes of layers for the memory prediction, and refuses configurations that are too large to compute
//! with.

use super::{DecoderConfig, FeedForwardConfig, LayerConfig, Projection};
use crate::error::{Error, Result};

/// Weights of the largest configuration that is read, some hundred times the largest model: bytes of anything that is
/// computed from so many fit into 64 bits.
const MOST_VALUES: u128 = 1 << 48;

/// What a token takes in a feed-forward network.
pub(in crate::model) struct Widths {
    /// Neurons.
    pub(in crate::model) width: usize,
    /// Rows of the hidden width that are gathered for experts.
    pub(in crate::model) rows: usize,
    /// Networks that it goes through.
    pub(in crate::model) times: usize,
}

impl FeedForwardConfig {
    pub(in crate::model) fn widths(&self) -> Widths {
        match self {
            Self::Dense { width, .. } => Widths { width: *width, rows: 0, times: 1 },
            Self::Sparse(moe) => {
                let shared = moe.shared.map_or(0, |shared| shared.width);
                let times = moe.active + usize::from(moe.shared.is_some());
                Widths { width: moe.active * moe.width + shared, rows: moe.active, times }
            }
        }
    }
}

impl LayerConfig {
    /// Projection, rows and columns of each kind of linear layer, and how many there are.
    pub(in crate::model) fn linear_sizes(&self, hidden: usize) -> Vec<(Projection, usize, usize, usize)> {
        let (q, kv) = (self.attention.q_width(), self.attention.kv_width());
        let mut sizes = vec![
            (Projection::Q, q, hidden, 1),
            (Projection::K, kv, hidden, 1),
            (Projection::V, kv, hidden, 1),
            (Projection::O, hidden, q, 1),
        ];
        let networks = match &self.feed_forward {
            FeedForwardConfig::Dense { width, .. } => vec![(*width, 1)],
            FeedForwardConfig::Sparse(moe) => {
                sizes.push((Projection::Router, moe.experts, hidden, 1));
                std::iter::once((moe.width, moe.experts)).chain(moe.shared.map(|s| (s.width, 1))).collect()
            }
        };
        for (width, copies) in networks {
            sizes.push((Projection::Gate, width, hidden, copies));
            sizes.push((Projection::Up, width, hidden, copies));
            sizes.push((Projection::Down, hidden, width, copies));
        }
        sizes
    }
}

impl DecoderConfig {
    /// Refuses sizes of which products could not be computed.
    pub(in crate::model) fn refuse_excess(&self) -> Result<()> {
        let hidden = self.hidden_size as u128;
        let layers = self.layers.iter().map(|layer| layer.num_values(hidden));
        let values = layers.fold(2 * self.vocab_size as u128 * hidden, u128::saturating_add);
        if values <= MOST_VALUES {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "the sizes come to a model of {values} weights, expected at most {MOST_VALUES}"
        )))
    }
}

impl LayerConfig {
    /// Weights of the linear layers, in numbers that do not wrap.
    fn num_values(&self, hidden: u128) -> u128 {
        let product =
            |numbers: &[u128]| numbers.iter().fold(1, |product: u128, n| product.saturating_mul(*n));
        let heads = 2 * (self.attention.num_heads as u128 + self.attention.num_kv_heads as u128);
        let attention = product(&[heads, self.attention.head_dim as u128, hidden]);
        let feed_forward = match &self.feed_forward {
            FeedForwardConfig::Dense { width, .. } => product(&[3, *width as u128, hidden]),
            FeedForwardConfig::Sparse(moe) => {
                let shared = moe.shared.map_or(0, |shared| shared.width as u128);
                let experts = product(&[moe.experts as u128, 3 * moe.width as u128 + 1, hidden]);
                experts.saturating_add(product(&[3 * shared, hidden]))
            }
        };
        attention.saturating_add(feed_forward)
    }
}
