//! How the logits of a router become a choice of experts, and weights of what these give.

use rayon::prelude::*;

use super::config::{MoeConfig, RoutingKind, RoutingVariant, Scoring};
use crate::ops::{Pass, dropout, largest};

/// The first number of the modules in which routing draws chance; those of linear layers are below.
pub(super) const CHANCE: u64 = 1 << 40;

/// How logits become a choice and weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rule {
    pub(super) experts: usize,
    pub(super) active: usize,
    pub(super) scoring: Scoring,
    pub(super) renormalise: bool,
    scale: f32,
    pub(super) variant: RoutingVariant,
    /// See [`super::Routing::unit`].
    pub(super) unit: f64,
}

impl Rule {
    /// That of a configuration.
    #[must_use]
    pub fn of(config: &MoeConfig) -> Self {
        let MoeConfig { experts, active, scoring, renormalise, scale, variant, .. } = *config;
        let unit = config.router_unit();
        Self { experts, active, scoring, renormalise, scale: scale as f32, variant, unit }
    }

    /// What experts are chosen by, `[tokens * experts]`.
    pub(super) fn ranked(
        &self,
        logits: &[f32],
        bias: Option<&[f32]>,
        layer: usize,
        pass: &Pass<'_>,
    ) -> Vec<f32> {
        match (self.variant.kind, pass.ids) {
            (RoutingKind::Random, _) => {
                dropout::uniforms(self.experts, self.variant.seed, CHANCE + 2 * layer as u64, pass)
            }
            (RoutingKind::Hash, Some(ids)) => ids
                .iter()
                .flat_map(|id| {
                    (0..self.experts).map(move |e| dropout::hashed(u64::from(*id), (layer << 32 | e) as u64))
                })
                .collect(),
            (RoutingKind::Model | RoutingKind::Hash, _) => self.with_bias(logits, bias),
        }
    }

    /// The scores of all experts, `[tokens * experts]`, with the bias that is added for the choice.
    fn with_bias(&self, logits: &[f32], bias: Option<&[f32]>) -> Vec<f32> {
        self.by_token(logits, self.experts, |token, scores| {
            self.scores(self.row(logits, token), scores);
            if let Some(bias) = bias {
                scores.iter_mut().zip(bias).for_each(|(score, bias)| *score += bias);
            }
        })
    }

    /// The experts that the model itself chooses for each token by these logits and the bias of the choice, and the weights
    /// of what they give, both `[tokens * active]`.
    #[must_use]
    pub fn decide(&self, logits: &[f32], bias: Option<&[f32]>) -> (Vec<u32>, Vec<f32>) {
        let chosen = self.choose(&self.with_bias(logits, bias));
        let weights = self.weights(logits, &chosen);
        (chosen, weights)
    }

    /// The experts of each token, `[tokens * active]`.
    pub(super) fn choose(&self, ranked: &[f32]) -> Vec<u32> {
        self.by_token(ranked, self.active, |token, chosen| largest(self.row(ranked, token), chosen))
    }

    /// The weights of the chosen, `[tokens * active]`.
    #[must_use]
    pub fn weights(&self, logits: &[f32], chosen: &[u32]) -> Vec<f32> {
        self.by_token(logits, self.active, |token, weights: &mut [f32]| {
            let score = self.score(self.row(logits, token));
            let chosen = &chosen[token * self.active..][..self.active];
            weights.iter_mut().zip(chosen).for_each(|(weight, expert)| *weight = score(*expert));
            let sum = if self.scoring == Scoring::SoftmaxOfActive {
                softmax(weights);
                1.0
            } else if self.renormalise {
                sum_of(weights.iter().copied())
            } else {
                1.0
            };
            weights.iter_mut().for_each(|weight| *weight = *weight / sum * self.scale);
        })
    }

    /// `width` values of each token, written by `f(token, values)`; tokens are shared among threads.
    fn by_token<T: Copy + Default + Send>(
        &self,
        of_experts: &[f32],
        width: usize,
        f: impl Fn(usize, &mut [T]) + Sync,
    ) -> Vec<T> {
        /// Tokens of a task.
        const TOKENS: usize = 64;

        let mut values = vec![T::default(); of_experts.len() / self.experts * width];
        values.par_chunks_mut(width * TOKENS).enumerate().for_each(|(task, values)| {
            values.chunks_exact_mut(width).enumerate().for_each(|(i, values)| f(task * TOKENS + i, values));
        });
        values
    }

    fn row<'v>(&self, of_experts: &'v [f32], token: usize) -> &'v [f32] {
        &of_experts[token * self.experts..][..self.experts]
    }

    /// What weights are taken from: of [`Scoring::SoftmaxOfActive`] the logits themselves.
    fn scores(&self, row: &[f32], scores: &mut [f32]) {
        scores.copy_from_slice(row);
        match self.scoring {
            Scoring::Softmax => softmax(scores),
            Scoring::Sigmoid => scores.iter_mut().for_each(|z| *z = sigmoid(*z)),
            Scoring::SoftmaxOfActive => {}
        }
    }

    /// The score of one expert, to the bit what [`Rule::scores`] has for it.
    fn score(&self, row: &[f32]) -> impl Fn(u32) -> f32 {
        let (most, sum) = match self.scoring {
            Scoring::Softmax => most_and_sum(row),
            Scoring::Sigmoid | Scoring::SoftmaxOfActive => (0.0, 1.0),
        };
        move |expert| {
            let z = row[expert as usize];
            match self.scoring {
                Scoring::Softmax => (z - most).exp() / sum,
                Scoring::Sigmoid => sigmoid(z),
                Scoring::SoftmaxOfActive => z,
            }
        }
    }

    /// The gradient of the logits, `[tokens * experts]`, from that of the weights.
    ///
    /// With weights `w = scale * v` and `g = scale * dw` over the chosen, zero elsewhere:
    /// - softmax of the chosen, or of all and divided by the chosen's sum, which is the same: `dz = v (g - <v, g>)`
    /// - softmax of all, `v = s`: `dz = s (g - <s, g>)`
    /// - sigmoids: `dz = s (1 - s) g`; divided by their sum `S`: `dz = s (1 - s) (g - <v, g>) / S`
    #[must_use]
    pub fn backward(&self, logits: &[f32], chosen: &[u32], weights: &[f32], d_weights: &[f32]) -> Vec<f32> {
        self.by_token(logits, self.experts, |token, dz: &mut [f32]| {
            let own = token * self.active..(token + 1) * self.active;
            let (chosen, weights, d_weights) = (&chosen[own.clone()], &weights[own.clone()], &d_weights[own]);
            let of_chosen =
                || chosen.iter().map(|expert| *expert as usize).zip(weights.iter().zip(d_weights));
            let with_unscaled = || of_chosen().map(|(e, (w, dw))| (e, w / self.scale, dw * self.scale));
            let mean: f32 = with_unscaled().map(|(_, v, g)| v * g).sum();
            match (self.scoring, self.renormalise) {
                (Scoring::SoftmaxOfActive, _) | (Scoring::Softmax, true) => {
                    with_unscaled().for_each(|(expert, v, g)| dz[expert] = v * (g - mean));
                }
                (Scoring::Softmax, false) => {
                    self.scores(self.row(logits, token), dz);
                    dz.iter_mut().for_each(|s| *s *= -mean);
                    with_unscaled().for_each(|(expert, v, g)| dz[expert] += v * g);
                }
                (Scoring::Sigmoid, renormalised) => {
                    let score = self.score(self.row(logits, token));
                    let (mean, sum) = match renormalised {
                        true => (mean, sum_of(chosen.iter().map(|expert| score(*expert)))),
                        false => (0.0, 1.0),
                    };
                    for (expert, _, g) in with_unscaled() {
                        let s = score(expert as u32);
                        dz[expert] = s * (1.0 - s) * (g - mean) / sum;
                    }
                }
            }
        })
    }
}

/// The sum of sigmoids that others are divided by. The small number is transformers', for sigmoids that all vanish.
fn sum_of(scores: impl Iterator<Item = f32>) -> f32 {
    scores.sum::<f32>() + 1e-20
}

fn sigmoid(z: f32) -> f32 {
    1.0 / (1.0 + (-z).exp())
}

fn softmax(values: &mut [f32]) {
    let most = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    values.iter_mut().for_each(|value| *value = (*value - most).exp());
    let sum: f32 = values.iter().sum();
    values.iter_mut().for_each(|value| *value /= sum);
}

/// What [`softmax`] takes off and divides by.
fn most_and_sum(values: &[f32]) -> (f32, f32) {
    let most = values.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    (most, values.iter().map(|value| (value - most).exp()).sum())
}

#[cfg(test)]
impl Rule {
    /// The experts of each token by these logits.
    pub(super) fn example(logits: &[f32], experts: usize, active: usize) -> Vec<u32> {
        let (scoring, renormalise, variant) = (Scoring::Softmax, false, RoutingVariant::default());
        Self { experts, active, scoring, renormalise, scale: 1.0, variant, unit: 1.0 }.choose(logits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_score_by_itself_is_the_score_among_all_to_the_bit() {
        let row = [0.3f32, -2.0, 7.5, 7.5, -0.1, 1e-3, 12.0];
        for scoring in [Scoring::Softmax, Scoring::Sigmoid, Scoring::SoftmaxOfActive] {
            let rule = Rule {
                experts: row.len(),
                active: 2,
                scoring,
                renormalise: false,
                scale: 1.0,
                variant: RoutingVariant::default(),
                unit: 1.0,
            };
            let mut all = [0.0; 7];
            rule.scores(&row, &mut all);
            let score = rule.score(&row);
            assert!(
                (0..7).all(|expert| score(expert as u32).to_bits() == all[expert].to_bits()),
                "{scoring:?}"
            );
        }
    }
}
