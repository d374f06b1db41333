//! The router of a sparse layer: logits in f32, the experts of each token, and the weights of what they give.
//!
//! Of `z = W x` and scores `s`, which are a softmax or sigmoids of `z`, the `active` largest are chosen (a bias may be added for
//! the choice; of equal ones the first is taken). Their weights are `scale * s`, or `scale * s / sum of the chosen s`.

use candle_core::{DType, Tensor};

use super::config::{MoeConfig, Scoring};
use super::linear::Linear;
use crate::error::Result;
use crate::ops::{Gradients, Groups, Parameter, Pass, linear};

/// What a router decided: facts for losses and reports.
#[derive(Debug, Clone)]
pub struct Routing {
    /// The layer.
    pub layer: usize,
    /// `[tokens, experts]`, f32.
    pub logits: Tensor,
    /// The experts of each token, the highest score first, `[tokens * active]`.
    pub chosen: Vec<u32>,
    /// What their results are weighed with.
    pub weights: Vec<f32>,
    /// Experts of a token.
    pub active: usize,
    /// Experts to choose from.
    pub experts: usize,
}

/// The router of one layer.
#[derive(Debug, Clone)]
pub(super) struct Router {
    pub(super) layer: usize,
    /// `[experts, hidden]`, f32.
    pub(super) linear: Linear,
    /// `[experts]`, added to the scores for the choice.
    pub(super) bias: Option<Parameter>,
    pub(super) rule: Rule,
}

/// How logits become a choice and weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rule {
    experts: usize,
    active: usize,
    scoring: Scoring,
    renormalise: bool,
    scale: f32,
}

impl Router {
    /// What it decides for `x [tokens, hidden]`, and what the backward needs.
    pub(super) fn forward(&self, x: &Tensor, pass: &Pass<'_>) -> Result<(Routing, linear::Saved)> {
        let (logits, saved) = self.linear.forward(&x.to_dtype(DType::F32)?, pass)?; // [tokens, experts]
        let rows: Vec<f32> = logits.flatten_all()?.to_vec1()?;
        let bias: Option<Vec<f32>> = match &self.bias {
            Some(bias) => Some(bias.tensor().to_dtype(DType::F32)?.to_vec1()?),
            None => None,
        };
        let (chosen, weights) = self.rule.choose(&rows, bias.as_deref());
        let Rule { active, experts, .. } = self.rule;
        Ok((Routing { layer: self.layer, logits, chosen, weights, active, experts }, saved))
    }

    /// `dx` in f32 when `wants_dx`, from the gradient of the weights and, where a loss has one, of the logits.
    pub(super) fn backward(
        &self,
        (routing, saved): (&Routing, &linear::Saved),
        pass: &Pass<'_>,
        (d_weights, d_logits): (&[f32], Option<&Tensor>),
        wants_dx: bool,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let rows: Vec<f32> = routing.logits.flatten_all()?.to_vec1()?;
        let through = self.rule.backward(&rows, &routing.chosen, &routing.weights, d_weights);
        let mut dz = Tensor::from_vec(through, routing.logits.dims(), routing.logits.device())?;
        if let Some(d_logits) = d_logits {
            dz = (dz + d_logits)?;
        }
        self.linear.backward(saved, pass, &dz, wants_dx, gradients)
    }
}

impl Rule {
    /// That of a configuration.
    #[must_use]
    pub fn of(config: &MoeConfig) -> Self {
        let MoeConfig { experts, active, scoring, renormalise, scale, .. } = *config;
        Self { experts, active, scoring, renormalise, scale: scale as f32 }
    }

    /// The experts of each row of `logits [tokens, experts]`, and their weights, `[tokens * active]` both.
    #[must_use]
    pub fn choose(&self, logits: &[f32], bias: Option<&[f32]>) -> (Vec<u32>, Vec<f32>) {
        let tokens = logits.len() / self.experts;
        let (mut chosen, mut weights) =
            (Vec::with_capacity(tokens * self.active), Vec::with_capacity(tokens * self.active));
        for row in logits.chunks_exact(self.experts) {
            let scores = self.scores(row);
            let ranked: Vec<f32> = match bias {
                Some(bias) => scores.iter().zip(bias).map(|(score, bias)| score + bias).collect(),
                None => scores.clone(),
            };
            let start = chosen.len();
            largest(&ranked, self.active, &mut chosen);
            self.weigh(&scores, &chosen[start..], &mut weights);
        }
        (chosen, weights)
    }

    /// What weights are taken from: of [`Scoring::SoftmaxOfActive`] the logits themselves.
    fn scores(&self, row: &[f32]) -> Vec<f32> {
        match self.scoring {
            Scoring::Softmax => softmax(row.iter().copied()),
            Scoring::Sigmoid => row.iter().map(|z| 1.0 / (1.0 + (-z).exp())).collect(),
            Scoring::SoftmaxOfActive => row.to_vec(),
        }
    }

    fn weigh(&self, scores: &[f32], chosen: &[u32], weights: &mut Vec<f32>) {
        let taken = chosen.iter().map(|expert| scores[*expert as usize]);
        if self.scoring == Scoring::SoftmaxOfActive {
            return weights.extend(softmax(taken).into_iter().map(|weight| weight * self.scale));
        }
        // The small number is transformers', for sigmoids that all vanish.
        let sum = if self.renormalise { taken.clone().sum::<f32>() + 1e-20 } else { 1.0 };
        weights.extend(taken.map(|score| score / sum * self.scale));
    }

    /// The gradient of the logits, `[tokens * experts]`, from that of the weights.
    ///
    /// With weights `w = scale * v` and `g = scale * dw` over the chosen, zero elsewhere:
    /// - softmax of the chosen, or of all and divided by the chosen's sum, which is the same: `dz = v (g - <v, g>)`
    /// - softmax of all, `v = s`: `dz = s (g - <s, g>)`
    /// - sigmoids: `dz = s (1 - s) g`; divided by their sum `S`: `dz = s (1 - s) (g - <v, g>) / S`
    #[must_use]
    pub fn backward(&self, logits: &[f32], chosen: &[u32], weights: &[f32], d_weights: &[f32]) -> Vec<f32> {
        let mut dz = vec![0f32; logits.len()];
        let choices = chosen.chunks_exact(self.active).zip(weights.chunks_exact(self.active));
        let rows = logits.chunks_exact(self.experts).zip(dz.chunks_exact_mut(self.experts));
        for ((row, dz), ((chosen, weights), d_weights)) in
            rows.zip(choices.zip(d_weights.chunks_exact(self.active)))
        {
            let g: Vec<f32> = d_weights.iter().map(|dw| dw * self.scale).collect();
            let v: Vec<f32> = weights.iter().map(|weight| weight / self.scale).collect();
            let mean: f32 = v.iter().zip(&g).map(|(v, g)| v * g).sum();
            match (self.scoring, self.renormalise) {
                (Scoring::SoftmaxOfActive, _) | (Scoring::Softmax, true) => {
                    for ((expert, v), g) in chosen.iter().zip(&v).zip(&g) {
                        dz[*expert as usize] = v * (g - mean);
                    }
                }
                (Scoring::Softmax, false) => {
                    for (dz, s) in dz.iter_mut().zip(self.scores(row)) {
                        *dz = -s * mean;
                    }
                    for ((expert, v), g) in chosen.iter().zip(&v).zip(&g) {
                        dz[*expert as usize] += v * g;
                    }
                }
                (Scoring::Sigmoid, renormalised) => {
                    let scores = self.scores(row);
                    let taken = chosen.iter().map(|expert| scores[*expert as usize]);
                    let (mean, sum) =
                        if renormalised { (mean, taken.clone().sum::<f32>() + 1e-20) } else { (0.0, 1.0) };
                    for ((expert, s), g) in chosen.iter().zip(taken).zip(&g) {
                        dz[*expert as usize] = s * (1.0 - s) * (g - mean) / sum;
                    }
                }
            }
        }
        dz
    }
}

impl Routing {
    /// Its tokens by expert.
    #[must_use]
    pub fn groups(&self) -> Groups {
        Groups::new(&self.chosen, self.active, self.experts)
    }
}

/// The `count` largest of `values`, the largest first; of equal ones the first.
fn largest(values: &[f32], count: usize, chosen: &mut Vec<u32>) {
    let start = chosen.len();
    for _ in 0..count {
        let mut best: Option<usize> = None;
        for (index, value) in values.iter().enumerate() {
            let is_new = !chosen[start..].contains(&(index as u32));
            if is_new && best.is_none_or(|best| *value > values[best]) {
                best = Some(index);
            }
        }
        chosen.extend(best.map(|index| index as u32));
    }
}

fn softmax(values: impl Iterator<Item = f32> + Clone) -> Vec<f32> {
    let most = values.clone().fold(f32::NEG_INFINITY, f32::max);
    let powers: Vec<f32> = values.map(|value| (value - most).exp()).collect();
    let sum: f32 = powers.iter().sum();
    powers.into_iter().map(|power| power / sum).collect()
}
