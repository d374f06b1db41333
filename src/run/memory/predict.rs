//! The memory of a run at its peak, predicted from the plan and the headers of its files, component by component. `peft check`
//! shows it, and a run chooses by it what it keeps and how much it computes at once.

use candle_core::DType;
use serde::Serialize;

use super::super::prepared::{Prepared, Trainee};
use crate::data::Row;
use crate::model::config::MoeConfig;
use crate::model::footprint::{Computed, Held, Piece, TrainedParts};
use crate::model::{DecoderConfig, Recompute};
use crate::recipe::Plan;

/// What the memory of a run follows from.
#[derive(Debug, Clone)]
pub struct Needs {
    /// The model.
    pub config: DecoderConfig,
    /// The type of activations.
    pub dtype: DType,
    /// What is trained.
    pub trained: TrainedParts,
    /// Numbers that are trained.
    pub trainable: u64,
    /// Whether the optimizer holds these numbers in f32 too.
    pub masters: bool,
    /// Bytes of the model's weights in memory.
    pub weights: u64,
    /// The teacher's configuration, whether its logits are compared, and bytes of the weights that it does not share.
    pub teacher: Option<(DecoderConfig, bool, u64)>,
    /// Bytes of the largest tensor in its file, which are in memory twice while it is read.
    pub largest_read: u64,
    /// Tokens and learned tokens of each document of each batch.
    pub batches: Vec<Vec<(usize, usize)>>,
    /// Batches of a step.
    pub accumulate: usize,
    /// The largest batch of the evaluation.
    pub evaluation: Piece,
    /// Threads that compute.
    pub threads: usize,
    /// The program, the tokenizer and the data.
    pub process: u64,
}

/// How a step is computed: what a run may choose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Way {
    /// What the forward keeps for the backward.
    pub recompute: Recompute,
    /// The most tokens that are computed at once; a longer document is computed alone.
    pub piece_tokens: usize,
}

/// Bytes at the peak of a run, by component.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Components {
    /// The model's weights, in the type they are computed with or as they are quantized.
    pub weights: u64,
    /// The teacher's, as far as they are not the model's own.
    #[serde(skip_serializing_if = "is_nothing")]
    pub teacher: u64,
    /// What is trained beside them, in f32.
    pub adapter: u64,
    /// Two moments of each trained number, and the number itself where it is rounded elsewhere.
    pub optimizer: u64,
    /// Gradients of what is trained, in f32.
    pub gradients: u64,
    /// What the forward keeps for the backward.
    pub activations: u64,
    /// What the layer at work needs beside that.
    pub layer: u64,
    /// The loss: logits of some rows, and the gradient of the hidden states.
    pub loss: u64,
    /// Other buffers of this moment: a tensor that is read, copies of one that is updated.
    pub buffers: u64,
    /// Where each thread packs the factors of its products.
    pub packing: u64,
    /// Free space between buffers that nothing fits in.
    pub gaps: u64,
    /// The program, the tokenizer and the data.
    pub process: u64,
}

impl Components {
    /// All of it.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.named().iter().map(|(_, bytes)| bytes).sum()
    }

    /// Each with its name.
    #[must_use]
    pub fn named(&self) -> [(&'static str, u64); 12] {
        [
            ("weights", self.weights),
            ("teacher", self.teacher),
            ("adapter", self.adapter),
            ("optimizer", self.optimizer),
            ("gradients", self.gradients),
            ("activations", self.activations),
            ("layer at work", self.layer),
            ("loss", self.loss),
            ("other buffers", self.buffers),
            ("packed factors", self.packing),
            ("gaps between buffers", self.gaps),
            ("program, tokenizer, data", self.process),
        ]
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde gives a reference")]
fn is_nothing(bytes: &u64) -> bool {
    *bytes == 0
}

/// When a run takes the most memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Moment {
    /// While weights are read.
    Loading,
    /// In forward and backward.
    Training,
    /// While the optimizer changes what is trained.
    Updating,
    /// While the model is evaluated.
    Evaluating,
}

impl Moment {
    /// In a sentence.
    #[must_use]
    pub fn phrase(self) -> &'static str {
        match self {
            Self::Loading => "while weights are read",
            Self::Training => "in forward and backward",
            Self::Updating => "in the optimizer's update",
            Self::Evaluating => "in evaluation",
        }
    }
}

/// Batches that are looked at: as many as thousands of steps have.
const BATCHES: u64 = 4096;

impl Needs {
    /// Those of a run.
    #[must_use]
    pub fn of(plan: &Plan, prepared: &Prepared) -> Self {
        let Prepared { base, dtype, dataset, .. } = prepared;
        let (trained, from) = match &prepared.trained {
            Trainee::Full => (TrainedParts::Everything, false),
            Trainee::Adapter(adapter) => {
                let ranks = adapter.placements.placements.iter().filter_map(|placement| {
                    Some(((placement.linear.layer?, placement.linear.projection), placement.rank))
                });
                let dropout = adapter.config.dropout > 0.0;
                let routers = adapter.routers;
                (TrainedParts::LowRank { ranks: ranks.collect(), dropout, routers }, adapter.from.is_some())
            }
        };
        let trainable = prepared.trainable().trainable;
        let masters = trained == TrainedParts::Everything
            && (*dtype != DType::F32 || base.compute_dtype() != DType::F32);
        let mut sampler = prepared.sampler(plan);
        let batches = (0..prepared.steps.saturating_mul(plan.train.accumulate as u64).min(BATCHES))
            .map(|index| {
                let batch = sampler.batch(index);
                let spans = batch.offsets.windows(2).map(|span| &batch.supervised[span[0]..span[1]]);
                spans.map(|span| (span.len(), span.iter().filter(|counted| **counted).count())).collect()
            })
            .collect();
        let largest = |all: &[Row]| all.iter().map(|row| row.tokens.len()).max().unwrap_or(0);
        let longest = largest(&dataset.eval);
        let of_eval: usize = dataset.eval.iter().map(|row| row.tokens.len()).sum();
        let tokens = plan.eval_tokens().max(longest).min(of_eval);
        let learned: usize = dataset.eval.iter().map(Row::num_supervised).sum();
        let held = dataset.train.iter().flat_map(|part| &part.rows).chain(&dataset.eval);
        let data: usize = held.map(|row| 5 * row.tokens.len() + 2 * size_of::<Row>()).sum();
        // An adapter that training goes on with stays as it was read.
        let from = if from { 4 * trainable } else { 0 };
        Self {
            config: base.config().clone(),
            dtype: *dtype,
            trained,
            trainable,
            masters,
            weights: base.weight_bytes(*dtype),
            teacher: prepared
                .teacher
                .as_ref()
                .map(|teacher| (teacher.base.config().clone(), teacher.terms.kl > 0.0, teacher.weights)),
            largest_read: base.largest_read_bytes(),
            batches,
            accumulate: plan.train.accumulate,
            evaluation: Piece { tokens, longest, learned: learned.min(tokens) },
            threads: rayon::current_num_threads(),
            process: process_bytes(base.config().vocab_size) + data as u64 + from,
        }
    }

    /// Tokens of the longest document.
    #[must_use]
    pub fn longest(&self) -> usize {
        self.batches.iter().flatten().map(|(tokens, _)| *tokens).max().unwrap_or(0)
    }

    /// Tokens of the largest batch.
    #[must_use]
    pub fn largest_batch(&self) -> usize {
        self.batches.iter().map(|batch| batch.iter().map(|(tokens, _)| tokens).sum()).max().unwrap_or(0)
    }

    /// What the run takes at its peak when it is computed in this way, and when that is.
    #[must_use]
    pub fn peak(&self, way: Way) -> (Components, Moment) {
        let how = Computed {
            dtype: self.dtype,
            trained: &self.trained,
            recompute: way.recompute,
            threads: self.threads,
            teacher: self.teacher.as_ref().map(|(config, compared, _)| (config, *compared)),
        };
        let (piece, several) = self.largest_piece(way.piece_tokens);
        let everything = self.trained == TrainedParts::Everything;
        let is_sparse = self.config.sparse_layers().next().is_some();
        let of_experts = if everything || !is_sparse { 0 } else { gaps_of_small(16 * self.trainable) };
        let idle = Components {
            weights: self.weights,
            teacher: self.teacher.as_ref().map_or(0, |(_, _, weights)| *weights),
            adapter: if everything { 0 } else { 4 * self.trainable },
            optimizer: self.trainable * if self.masters { 12 } else { 8 },
            gradients: 0,
            activations: 0,
            layer: 0,
            loss: 0,
            buffers: 0,
            packing: self.config.packing_bytes(self.threads),
            gaps: of_experts,
            process: self.process,
        };
        let Held { activations, layer, loss, gradients } = self.config.held(piece, &how, several);
        let gaps = idle.gaps + gaps(activations + layer);
        let training = Components { activations, layer, loss, gradients, gaps, ..idle };
        let gradients = 4 * self.trainable;
        let largest = self.largest_trained();
        let evaluating = self.config.held_by_evaluation(self.evaluation, &how);
        let moments = [
            (training, Moment::Training),
            (Components { gradients, buffers: 12 * largest, ..idle }, Moment::Updating),
            (Components { layer: evaluating, ..idle }, Moment::Evaluating),
            (Components { optimizer: 0, buffers: self.largest_read, ..idle }, Moment::Loading),
        ];
        // The first of those that are equal: training.
        moments.into_iter().rev().max_by_key(|(components, _)| components.total()).unwrap_or(moments[0])
    }

    /// The most tokens, the longest document and the most learned tokens of all pieces, and whether a step has several.
    fn largest_piece(&self, piece_tokens: usize) -> (Piece, bool) {
        let mut largest = Piece { tokens: 0, longest: self.longest(), learned: 0 };
        let mut several = self.accumulate > 1;
        for batch in &self.batches {
            let (mut tokens, mut learned, mut pieces) = (0, 0, 0);
            for (of_document, learned_of_document) in batch {
                if pieces == 0 || tokens + of_document > piece_tokens {
                    (tokens, learned, pieces) = (0, 0, pieces + 1);
                }
                (tokens, learned) = (tokens + of_document, learned + learned_of_document);
                largest.tokens = largest.tokens.max(tokens);
                largest.learned = largest.learned.max(learned);
            }
            several |= pieces > 1;
        }
        (largest, several)
    }

    /// Numbers of the largest trained tensor.
    fn largest_trained(&self) -> u64 {
        match &self.trained {
            TrainedParts::Everything => {
                let sizes =
                    self.config.tensors().into_iter().map(|(_, shape)| shape.iter().product::<usize>());
                sizes.max().unwrap_or(0) as u64
            }
            TrainedParts::LowRank { ranks, routers, .. } => {
                let width = self
                    .config
                    .linears()
                    .iter()
                    .map(|l| l.in_features.max(l.out_features))
                    .max()
                    .unwrap_or(0);
                let of_router = |(_, moe): (usize, &MoeConfig)| moe.experts * self.config.hidden_size;
                let router = self.config.sparse_layers().map(of_router).filter(|_| *routers).max();
                (ranks.values().max().unwrap_or(&0) * width).max(router.unwrap_or(0)) as u64
            }
        }
    }
}

/// Of buffers that come and go in other orders than they came: measured.
fn gaps(bytes: u64) -> u64 {
    bytes / 50
}

/// The same of the many small tensors of experts' adapters, their gradients and moments: measured.
fn gaps_of_small(bytes: u64) -> u64 {
    bytes / 4
}

/// The program and its libraries, and a tokenizer with that many words: measured.
fn process_bytes(vocab: usize) -> u64 {
    (40 << 20) + 450 * vocab as u64
}
