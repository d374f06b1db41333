//! What training holds in memory, from the configuration alone: the forward and the backward of [`super::Decoder`] gone
//! through with sizes in place of tensors, buffer by buffer, to the moment at which most is held.

mod ledger;
mod sparse;

use std::collections::BTreeMap;

use candle_core::DType;

use super::config::{DecoderConfig, LayerConfig, Projection, Widths};
use super::decoder::Recompute;
use crate::ops::cross_entropy::chunk_rows;
use ledger::Ledger;

/// What is trained, as far as memory is concerned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TrainedParts {
    /// Every weight.
    Everything,
    /// Low-rank terms beside linear layers.
    LowRank {
        /// The rank in each layer that has one, by the layer's number and the projection.
        ranks: BTreeMap<(usize, Projection), usize>,
        /// Whether inputs go through a dropout.
        dropout: bool,
        /// Whether routers' weights are trained too.
        routers: bool,
    },
}

/// The part of a batch that is computed at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Piece {
    /// Its tokens.
    pub tokens: usize,
    /// Those of its longest document.
    pub longest: usize,
    /// Those that are learned.
    pub learned: usize,
}

/// How a step is computed.
#[derive(Debug, Clone, Copy)]
pub struct Computed<'a> {
    /// The type of activations.
    pub dtype: DType,
    /// What is trained.
    pub trained: &'a TrainedParts,
    /// What the forward keeps.
    pub recompute: Recompute,
    /// Threads, each of which has buffers of its own.
    pub threads: usize,
    /// A model that sees the same tokens before, and whether its logits are compared.
    pub teacher: Option<(&'a DecoderConfig, bool)>,
}

/// Bytes held at the moment of a step at which they are most, besides the weights.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Held {
    /// Kept by the forward for the backward.
    pub activations: u64,
    /// What the layer that is computed needs beside them.
    pub layer: u64,
    /// The loss: logits of some rows, and the gradient of the hidden states.
    pub loss: u64,
    /// Gradients of what is trained, in f32.
    pub gradients: u64,
}

impl Held {
    /// All of it.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.activations + self.layer + self.loss + self.gradients
    }
}

/// Bytes of a thread's buffers for packing the factors of a product, which stay.
const PACKED: u64 = 5 << 19;

impl DecoderConfig {
    /// What one thread's buffers for products take.
    #[must_use]
    pub fn packing_bytes(&self, threads: usize) -> u64 {
        PACKED * threads as u64
    }

    /// Bytes that forward and backward over `piece` hold at most, and of what. With `several` pieces to a step there are
    /// the gradients of another already.
    #[must_use]
    pub fn held(&self, piece: Piece, how: &Computed<'_>, several: bool) -> Held {
        let walk = Walk { config: self, piece, how };
        let mut ledger = Ledger { several, ..Ledger::default() };
        if several {
            ledger.now.gradients = walk.gradients();
        }
        walk.forward(&mut ledger);
        walk.loss(&mut ledger);
        walk.backward(&mut ledger);
        ledger.most
    }

    /// Bytes that the forward of `piece` holds at most when nothing is kept, and the losses of its tokens after it.
    #[must_use]
    pub fn held_by_evaluation(&self, piece: Piece, how: &Computed<'_>) -> u64 {
        let walk = Walk { config: self, piece, how };
        let x = walk.values(self.hidden_size);
        let block = walk.largest_forward();
        let rows = chunk_rows(self.vocab_size).min(piece.learned) as u64;
        let losses = walk.rows(piece.learned, self.hidden_size) + rows * 4 * self.vocab_size as u64;
        x + block.max(x + losses)
    }
}

/// A pass over the layers.
#[derive(Clone, Copy)]
struct Walk<'a> {
    config: &'a DecoderConfig,
    piece: Piece,
    how: &'a Computed<'a>,
}

/// Bytes of one layer.
struct BlockBytes {
    /// What its forward keeps for the backward, its input not counted.
    kept: u64,
    /// What its forward holds at most, its input not counted.
    forward: u64,
    /// What its forward has still when it is done, its input and output not counted.
    saved: u64,
    /// What its backward holds at most beside what was kept and the gradient of its output.
    backward: u64,
}

impl Walk<'_> {
    fn largest_forward(&self) -> u64 {
        (0..self.config.layers.len()).map(|index| self.block(index).forward).max().unwrap_or(0)
    }

    /// The forward of the teacher, of which the hidden states that predict stay until the loss is known.
    fn teacher(&self, ledger: &mut Ledger) {
        let Some((config, _)) = self.how.teacher else { return };
        let (x, rows) = (self.values(config.hidden_size), self.rows(self.piece.learned, config.hidden_size));
        let walk = Walk { config, ..*self };
        ledger.now(|held| held.layer = x + walk.largest_forward().max(x + rows));
        ledger.now(|held| (held.layer, held.loss) = (0, rows));
    }

    fn forward(&self, ledger: &mut Ledger) {
        self.teacher(ledger);
        let x = self.values(self.config.hidden_size);
        let angles = 4 * (self.piece.tokens * self.head_dim()) as u64;
        ledger.now(|held| (held.activations, held.layer) = (angles, x));
        for index in 0..self.config.layers.len() {
            let block = self.block(index);
            ledger.now(|held| held.layer = x + block.forward);
            let kept = match self.how.recompute {
                _ if index < self.lowest() => 0,
                Recompute::Block => x,
                Recompute::None => x + block.kept,
            };
            ledger.now(|held| (held.activations, held.layer) = (held.activations + kept, x));
        }
    }

    /// Its input, the last layer's output, is kept for the last norm.
    fn loss(&self, ledger: &mut Ledger) {
        let (hidden, vocab) = (self.config.hidden_size, self.config.vocab_size);
        let learned = self.rows(self.piece.learned, hidden);
        let rows = chunk_rows(vocab).min(self.piece.learned);
        let (of_teacher, compared) = match self.how.teacher {
            None => (0, 0),
            Some((config, compared)) => {
                (self.rows(self.piece.learned, config.hidden_size), u64::from(compared))
            }
        };
        let powers = (1 + 2 * compared) * (4 * vocab * self.how.threads) as u64;
        // Hidden states, those that predict, the gradients of all of these and once more of some.
        let logits = (1 + compared) * self.rows(rows, vocab);
        let states = of_teacher + self.values(hidden) + 2 * learned + self.rows(rows, hidden);
        ledger.now(|held| held.loss = states + logits + powers);
        if matches!(self.how.trained, TrainedParts::Everything) {
            ledger.now(|held| held.loss = states + logits);
            ledger.gradients(self.head(), self.head(), false);
            if self.piece.learned > rows {
                ledger.gradients(self.head(), self.head(), true);
            }
        }
        ledger.now(|held| held.loss = 2 * learned + self.values(hidden));
        ledger.now(|held| held.loss = self.values(hidden));
    }

    fn backward(&self, ledger: &mut Ledger) {
        let x = self.values(self.config.hidden_size);
        ledger.now(|held| held.layer = 2 * x);
        for index in (self.lowest()..self.config.layers.len()).rev() {
            let block = self.block(index);
            // The gradient of its output.
            let mut beside = x;
            match self.how.recompute {
                Recompute::None => {}
                Recompute::Block => {
                    ledger.now(|held| held.layer = x + block.forward);
                    beside += block.saved;
                }
            }
            let (gradients, largest) = self.gradients_of(index);
            ledger.now(|held| held.layer = beside + block.backward);
            ledger.gradients(gradients, largest, false);
            let kept = match self.how.recompute {
                Recompute::None => x + block.kept,
                Recompute::Block => x,
            };
            ledger.now(|held| (held.activations, held.layer) = (held.activations - kept, x));
        }
        if matches!(self.how.trained, TrainedParts::Everything) {
            ledger.gradients(self.head(), self.head(), self.config.tie_word_embeddings);
        }
    }

    /// The buffers of `Block::forward` and `Block::backward`.
    fn block(&self, index: usize) -> BlockBytes {
        let hidden = self.config.hidden_size;
        let LayerConfig { attention, feed_forward } = &self.config.layers[index];
        let Widths { width, rows, .. } = feed_forward.widths();
        let routed = self.rows_of_experts(index, rows);
        let (q, kv, heads) = (attention.q_width(), attention.kv_width(), attention.num_heads);
        let values = |width: usize| self.values(width);
        let inner = |projections: &[Projection]| -> u64 {
            projections.iter().map(|projection| self.inner(index, *projection)).sum()
        };
        let dropped = |width: usize| if self.drops() { values(width) } else { 0 };

        // q, k, v and what attention gives, q and k before their norms, the logsumexp; the middle of the residual stream.
        let head_norms = if attention.qk_norm.is_some() { values(q + kv) } else { 0 };
        let of_attention = values(q + 2 * kv + q) + head_norms + self.wide(heads);
        let gate = self.gate_of_shared(index);
        let of_feed_forward = values(2 * width) + self.routing(index) + gate.kept;
        let inner_of_attention = inner(&[Projection::Q, Projection::K, Projection::V, Projection::O]);
        let inner_of_feed_forward = inner(&[Projection::Gate, Projection::Up, Projection::Down]);
        let kept =
            of_attention + values(hidden) + of_feed_forward + inner_of_attention + inner_of_feed_forward;
        // And what is dropped behind it: both normalised inputs and the product of the gated unit.
        let saved = kept + values(2 * hidden + width);

        let scratch = self.attention_scratch(index, false);
        let forward_of_attention =
            values(hidden) + of_attention + inner_of_attention + scratch.max(values(hidden) + dropped(q));
        let in_feed_forward = saved + values(hidden); // and what attention has given
        let forward = forward_of_attention
            .max(in_feed_forward + values(hidden).max(dropped(width)) + values(hidden))
            + routed
            + self.stacked(index)
            + gate.forward;

        // `down`: the product again, and its gradient; then the gradients of gate and up.
        let through = if self.drops() { self.wide(width) + self.wide(width) } else { 0 };
        let has_down = self.rank(index, Projection::Down).is_some();
        let down = values(hidden) + values(2 * width) + if has_down { dropped(width) + through } else { 0 };
        let unit = values(hidden) + values(3 * width);
        let through = if self.drops() { 2 * self.wide(hidden) } else { 0 };
        let towards = values(hidden) + values(2 * width) + values(hidden) + through + dropped(hidden);
        // By then the feed-forward network's are freed.
        let freed = of_feed_forward + inner_of_feed_forward;
        let parts = 2 * self.wide(q) + self.attention_scratch(index, true);
        let in_attention = (values(hidden) + values(q) + parts + values(q + kv))
            .max(values(hidden) + values(q + 2 * kv) + 2 * values(hidden) + through);
        let in_network = down.max(unit).max(towards) + routed + self.stacked(index) + gate.backward;
        let backward = in_network.max(in_attention.saturating_sub(freed));
        BlockBytes { kept, forward, saved, backward }
    }

    /// A thread's buffers in attention: scores of some queries with all keys of their document, in f32 and rounded.
    fn attention_scratch(&self, index: usize, backward: bool) -> u64 {
        let attention = &self.config.layers[index].attention;
        let (d, size) = (attention.head_dim, self.how.dtype.size_in_bytes());
        let (rows, of_score) = (192, if backward { 8 + 2 * size } else { 4 + size });
        let rows = rows.min(self.piece.longest * attention.num_heads / attention.num_kv_heads.max(1));
        (self.how.threads * rows * (self.piece.longest * of_score + d * (size + 4))) as u64
    }

    /// Bytes of the gradients that the backward of a layer leaves, and of the largest.
    fn gradients_of(&self, index: usize) -> (u64, u64) {
        let sizes = self.config.layers[index].linear_sizes(self.config.hidden_size);
        let sizes: Vec<(usize, usize)> = sizes
            .into_iter()
            .map(|(projection, out, input, copies)| match self.how.trained {
                TrainedParts::Everything => (4 * copies * out * input, 4 * out * input),
                TrainedParts::LowRank { routers: true, .. } if projection == Projection::Router => {
                    (4 * out * input, 4 * out * input)
                }
                TrainedParts::LowRank { .. } => {
                    let rank = self.rank(index, projection).unwrap_or(0);
                    (4 * copies * rank * (out + input), 4 * rank * out.max(input))
                }
            })
            .collect();
        let all: usize = sizes.iter().map(|(bytes, _)| bytes).sum();
        (all as u64, sizes.iter().map(|(_, largest)| *largest as u64).max().unwrap_or(0))
    }

    /// Bytes of all gradients.
    fn gradients(&self) -> u64 {
        let heads = match (self.how.trained, self.config.tie_word_embeddings) {
            (TrainedParts::LowRank { .. }, _) => 0,
            (TrainedParts::Everything, true) => 1,
            (TrainedParts::Everything, false) => 2,
        };
        let layers = (0..self.config.layers.len()).map(|index| self.gradients_of(index).0);
        heads * self.head() + layers.sum::<u64>()
    }

    /// Bytes of the gradient of the embedding or of the head.
    fn head(&self) -> u64 {
        4 * (self.config.vocab_size * self.config.hidden_size) as u64
    }

    /// The first layer that something is trained in.
    fn lowest(&self) -> usize {
        match self.how.trained {
            TrainedParts::Everything => 0,
            TrainedParts::LowRank { ranks, routers, .. } => {
                let adapted = ranks.keys().map(|(layer, _)| *layer).next();
                let first = self.config.sparse_layers().next().filter(|_| *routers);
                let routers = first.map(|(layer, _)| layer);
                adapted.into_iter().chain(routers).min().unwrap_or(self.config.layers.len())
            }
        }
    }

    fn rank(&self, layer: usize, projection: Projection) -> Option<usize> {
        match self.how.trained {
            TrainedParts::Everything => None,
            TrainedParts::LowRank { ranks, .. } => ranks.get(&(layer, projection)).copied(),
        }
    }

    fn drops(&self) -> bool {
        matches!(self.how.trained, TrainedParts::LowRank { dropout: true, .. })
    }

    fn inner(&self, layer: usize, projection: Projection) -> u64 {
        let times = match projection {
            Projection::Gate | Projection::Up | Projection::Down => {
                self.config.layers[layer].feed_forward.widths().times
            }
            _ => 1,
        };
        self.wide(times * self.rank(layer, projection).unwrap_or(0))
    }

    fn head_dim(&self) -> usize {
        self.config.layers.first().map_or(0, |layer| layer.attention.head_dim)
    }

    /// `[tokens, width]`.
    fn values(&self, width: usize) -> u64 {
        self.rows(self.piece.tokens, width)
    }

    fn rows(&self, rows: usize, width: usize) -> u64 {
        (rows * width * self.how.dtype.size_in_bytes()) as u64
    }

    /// `[tokens, width]` in f32.
    fn wide(&self, width: usize) -> u64 {
        (self.piece.tokens * width * 4) as u64
    }
}
