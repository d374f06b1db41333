//! How much of what a layer has, for the prediction of memory.

use super::{FeedForwardConfig, LayerConfig, Projection};

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
