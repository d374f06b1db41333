//! What mixtures need beside dense layers.

use candle_core::DType;

use super::{TrainedParts, Walk};
use crate::model::config::{FeedForwardConfig, MoeConfig, Projection};
use crate::ops::experts::is_stacked;

/// Bytes of the gate in front of a shared expert.
#[derive(Default)]
pub(super) struct Gate {
    /// What the expert has given, which is kept for the gate's gradient.
    pub(super) kept: u64,
    /// What it becomes, and where that is not f32 both in f32 on the way.
    pub(super) forward: u64,
    /// Their gradients and products, likewise.
    pub(super) backward: u64,
}

impl Walk<'_> {
    fn moe(&self, layer: usize) -> Option<&MoeConfig> {
        match &self.config.layers[layer].feed_forward {
            FeedForwardConfig::Sparse(moe) => Some(moe),
            FeedForwardConfig::Dense { .. } => None,
        }
    }

    pub(super) fn gate_of_shared(&self, layer: usize) -> Gate {
        let hidden = self.config.hidden_size;
        match self.moe(layer).and_then(|moe| moe.shared) {
            Some(shared) if shared.gated => {
                let is_wide = self.how.dtype == DType::F32;
                Gate {
                    kept: self.values(hidden),
                    forward: if is_wide { self.wide(hidden) } else { 2 * self.wide(hidden) },
                    backward: if is_wide { 2 * self.wide(hidden) } else { 3 * self.wide(hidden) },
                }
            }
            _ => Gate::default(),
        }
    }

    /// Rows of all experts: what they give before it is put together, and as much again where gradients take rows that are
    /// gathered: at most, for they are gathered for the experts that are computed at the time.
    pub(super) fn rows_of_experts(&self, layer: usize, rows: usize) -> u64 {
        let has_rank = |projection| self.rank(layer, projection).is_some();
        let gathers = match self.how.trained {
            TrainedParts::Everything => true,
            TrainedParts::LowRank { .. } => {
                let stacks = self.stacked_rank(layer, &[Projection::Gate, Projection::Up]).is_some();
                (has_rank(Projection::Gate) || has_rank(Projection::Up)) && !stacks
            }
        };
        self.values(rows * self.config.hidden_size) * if gathers { 2 } else { 1 }
    }

    /// What a router leaves for the backward: logits, and of each choice expert, weight and row.
    pub(super) fn routing(&self, layer: usize) -> u64 {
        let Some(moe) = self.moe(layer) else { return 0 };
        self.wide(moe.experts + 4 * moe.active)
    }

    /// The inner states of all experts' adapters for all tokens, in f32 and rounded, as they are while a layer is computed.
    pub(super) fn stacked(&self, layer: usize) -> u64 {
        let ranks = |projections: &[Projection]| {
            let rank = self.stacked_rank(layer, projections).unwrap_or(0);
            rank * projections.iter().filter(|p| self.rank(layer, **p).is_some()).count()
        };
        let ranks = ranks(&[Projection::Gate, Projection::Up]).max(ranks(&[Projection::Down]));
        let Some(moe) = self.moe(layer) else { return 0 };
        2 * self.wide(moe.experts * ranks)
    }

    /// The rank of these projections, which meet the same tokens, where the terms of all experts are one over all tokens.
    fn stacked_rank(&self, layer: usize, projections: &[Projection]) -> Option<usize> {
        let moe = self.moe(layer)?;
        let mut ranks = projections.iter().filter_map(|projection| self.rank(layer, *projection));
        let first = ranks.next()?;
        let is_stacked = !self.drops() && is_stacked(moe.experts, moe.active, first);
        (is_stacked && ranks.all(|rank| rank == first)).then_some(first)
    }
}
