//! The router of a sparse layer: logits in f32, the experts of each token, and the weights of what they give.
//!
//! Of `z = W x` and scores `s`, which are a softmax or sigmoids of `z`, the `active` largest are chosen (a bias may be added for
//! the choice; of equal ones the first is taken). Their weights are `scale * s`, or `scale * s / sum of the chosen s`.

use candle_core::{DType, Tensor};

use super::config::{Overflow, RouterNoise, Scoring};
use super::linear::Linear;
use super::rule::{CHANCE, Rule};
use crate::error::{Error, Result};
use crate::ops::{Gradients, Groups, Parameter, Pass, Weight, cast, dropout, linear, scores};

/// What a router decided: facts for losses and reports.
#[derive(Debug, Clone)]
pub struct Routing {
    /// The layer.
    pub layer: usize,
    /// `[tokens, experts]`, f32, with their noise.
    pub logits: Tensor,
    /// The experts of each token, the highest score first, `[tokens * active]`.
    pub chosen: Vec<u32>,
    /// Whether a choice found room; `None`: all did.
    pub kept: Option<Vec<bool>>,
    /// What their results are weighed with.
    pub weights: Vec<f32>,
    /// Experts of a token.
    pub active: usize,
    /// Experts to choose from.
    pub experts: usize,
    /// How scores come from logits.
    pub scoring: Scoring,
    /// Whether the weights of a token sum to one (times a constant).
    pub renormalised: bool,
    /// The noise in the logits.
    pub noise: Option<Noise>,
    /// What a logit of one is here: less where the router is stored scaled down.
    pub unit: f64,
}

/// What is added to logits: `drawn * deviation`, both `[tokens, experts]`.
#[derive(Debug, Clone)]
pub struct Noise {
    /// Normal values of deviation one.
    pub drawn: Tensor,
    /// The deviation.
    pub deviation: Tensor,
}

/// What losses on a router add to its gradients, both `[tokens, experts]`.
#[derive(Debug, Clone)]
pub struct RoutingGradient {
    /// Of the logits without their noise.
    pub logits: Tensor,
    /// Of the deviation of the noise, if there is noise.
    pub deviation: Option<Tensor>,
}

/// What the backward needs.
#[derive(Debug)]
pub(super) struct Saved {
    logits: linear::Saved,
    /// Of learned noise what gives its deviation, and the slope of that.
    noise: Option<SavedNoise>,
}

type SavedNoise = (linear::Saved, Tensor);

impl Saved {
    /// Drops the input, which [`Saved::set_input`] gives again.
    pub(super) fn drop_input(&mut self) {
        self.logits.drop_input();
        self.noise.iter_mut().for_each(|(saved, _)| saved.drop_input());
    }

    /// Gives the input again.
    pub(super) fn set_input(&mut self, x: &Tensor) {
        self.logits.set_input(x);
        self.noise.iter_mut().for_each(|(saved, _)| saved.set_input(x));
    }
}

impl Routing {
    /// Its tokens by expert.
    #[must_use]
    pub fn groups(&self) -> Groups {
        let Some(kept) = &self.kept else { return Groups::new(&self.chosen, self.active, self.experts) };
        let taken =
            self.chosen.iter().zip(kept).map(|(expert, kept)| if *kept { *expert } else { Groups::NO_ROW });
        Groups::new(&taken.collect::<Vec<_>>(), self.active, self.experts)
    }

    /// Choices that found no room.
    #[must_use]
    pub fn num_dropped(&self) -> u64 {
        self.kept.iter().flatten().filter(|kept| !**kept).count() as u64
    }
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
    /// `[experts, hidden]`, f32: from it comes the deviation of learned noise. A run has it, no file.
    pub(super) noise: Option<Linear>,
    /// What the logits are the linear layer's output times: 1, or in training the power of two that the weight is stored
    /// with. Nothing else differs, not even in the last bit, but that steps of training are of the size of what they change.
    pub(super) unit: f64,
}

impl Router {
    /// Holds the weight as it is before it is scaled for storage.
    pub(super) fn unscale(&mut self) -> Result<()> {
        if let Some(weight) = self.linear.weight.parameter_mut()
            && self.unit != self.rule.unit
        {
            weight.replace(&(weight.tensor() * (self.unit / self.rule.unit))?);
            self.unit = self.rule.unit;
        }
        Ok(())
    }

    /// What it decides for `x [tokens, hidden]`, and what the backward needs.
    pub(super) fn forward(&self, x: &Tensor, pass: &Pass<'_>) -> Result<(Routing, Saved)> {
        let (mut logits, of_logits) = self.logits(x, pass)?; // [tokens, experts]
        if self.unit != 1.0 {
            logits = (logits * self.unit)?;
        }
        let Rule { active, experts, scoring, renormalise, variant, unit, .. } = self.rule;
        let (noise, of_noise) = self.noise(x, pass)?;
        if let Some(noise) = &noise {
            logits = (logits + (&noise.drawn * &noise.deviation)?)?;
        }
        let rows: Vec<f32> = logits.flatten_all()?.to_vec1()?;
        let bias: Option<Vec<f32>> = match &self.bias {
            Some(bias) => Some(bias.tensor().to_dtype(DType::F32)?.to_vec1()?),
            None => None,
        };
        let ranked = self.rule.ranked(&rows, bias.as_deref(), self.layer, pass);
        let mut chosen = self.rule.choose(&ranked);
        let factor = pass.dropout_step.and_then(|step| variant.capacity_factor_at(step, experts, active));
        let capacity = factor
            .map(|factor| (factor * pass.num_rows() as f64 * active as f64 / experts as f64).ceil() as usize);
        let kept = capacity
            .map(|capacity| limit(&mut chosen, &ranked, (active, experts), capacity, variant.overflow));
        let weights = self.rule.weights(&rows, &chosen);
        let renormalised = renormalise || scoring == Scoring::SoftmaxOfActive;
        let layer = self.layer;
        let routing = Routing {
            layer,
            logits,
            chosen,
            kept,
            weights,
            active,
            experts,
            scoring,
            renormalised,
            noise,
            unit,
        };
        Ok((routing, Saved { logits: of_logits, noise: of_noise }))
    }

    /// `W x` in f32, and what its backward needs.
    fn logits(&self, x: &Tensor, pass: &Pass<'_>) -> Result<(Tensor, linear::Saved)> {
        match (&self.linear.weight, &self.linear.bias, &self.linear.low_rank) {
            (Weight::Dense(weight), None, None) => {
                Ok((scores(x, weight.tensor())?, linear::Saved::of_input(x)))
            }
            _ => self.linear.forward(&cast(x, DType::F32)?, pass),
        }
    }

    /// The noise of a pass, in training, and what its backward needs where it is learned.
    fn noise(&self, x: &Tensor, pass: &Pass<'_>) -> Result<(Option<Noise>, Option<SavedNoise>)> {
        let Rule { experts, variant, unit, .. } = self.rule;
        let is_noisy = match variant.noise {
            RouterNoise::None => false,
            RouterNoise::Gaussian => true,
            RouterNoise::Learned => self.noise.is_some(),
        };
        if !is_noisy || pass.dropout_step.is_none() {
            return Ok((None, None));
        }
        let shape = (pass.num_rows(), experts);
        let drawn = normals(experts, variant.seed, self.layer, pass);
        let drawn = Tensor::from_vec(drawn, shape, x.device())?;
        let Some(linear) = &self.noise else {
            let deviation = Tensor::full((unit / experts as f64) as f32, shape, x.device())?;
            return Ok((Some(Noise { drawn, deviation }), None));
        };
        let (z, saved) = linear.forward(&cast(x, DType::F32)?, pass)?;
        let powers = (z.abs()?.neg()?.exp()? + 1.0)?;
        let deviation = ((z.relu()? + powers.log()?)? * unit)?; // softplus
        let slope = ((z.neg()?.exp()? + 1.0)?.recip()? * unit)?;
        Ok((Some(Noise { drawn, deviation }), Some((saved, slope))))
    }

    /// Whether a gradient of `wanted` is computed from its input.
    pub(super) fn needs_input(&self, wanted: &Gradients) -> bool {
        std::iter::once(&self.linear).chain(&self.noise).any(|linear| linear.needs_input(wanted))
    }

    /// Whether any of its values is trained.
    pub(super) fn is_trained(&self, gradients: &Gradients) -> bool {
        std::iter::once(&self.linear).chain(&self.noise).any(|linear| linear.is_trained(gradients))
    }

    /// With the input in f32, where a gradient is computed from it.
    fn in_f32(&self, saved: &linear::Saved, wanted: &Gradients) -> Result<linear::Saved> {
        let mut saved = saved.clone();
        if self.needs_input(wanted) {
            let x = saved
                .input_or(|| Err(Error::invalid("the input of a router was not kept for its gradient")))?;
            saved.set_input(&cast(&x, DType::F32)?);
        }
        Ok(saved)
    }

    /// The gradients of what it holds, and what [`linear::dx`] takes, when `wants_dx`: from the gradient of the weights and, where
    /// a loss has one, of the logits.
    pub(super) fn own_gradients(
        &self,
        (routing, saved): (&Routing, &Saved),
        pass: &Pass<'_>,
        (d_weights, of_losses): (&[f32], Option<&RoutingGradient>),
        wants_dx: bool,
        gradients: &mut Gradients,
    ) -> Result<Vec<linear::Back<'_>>> {
        let rows: Vec<f32> = routing.logits.flatten_all()?.to_vec1()?;
        let through = self.rule.backward(&rows, &routing.chosen, &routing.weights, d_weights);
        let mut dz = Tensor::from_vec(through, routing.logits.dims(), routing.logits.device())?;
        let mut backs = match (&self.noise, &saved.noise, &routing.noise) {
            (Some(linear), Some((saved, slope)), Some(noise)) => {
                let mut d_deviation = (&dz * &noise.drawn)?;
                if let Some(d) = of_losses.and_then(|gradient| gradient.deviation.as_ref()) {
                    d_deviation = (d_deviation + d)?;
                }
                let saved = self.in_f32(saved, gradients)?;
                let towards = [(linear, &saved, &(d_deviation * slope)?)];
                Linear::own_gradients(&towards, pass, wants_dx, gradients)?
            }
            _ => Vec::new(),
        };
        if let Some(of_losses) = of_losses {
            dz = (dz + &of_losses.logits)?;
        }
        if self.unit != 1.0 {
            dz = (dz * self.unit)?;
        }
        let towards = [(&self.linear, &self.in_f32(&saved.logits, gradients)?, &dz)];
        backs.extend(Linear::own_gradients(&towards, pass, wants_dx, gradients)?);
        Ok(backs)
    }
}

/// Normal values of deviation one, `[tokens * experts]` (Box and Muller).
fn normals(experts: usize, seed: u64, layer: usize, pass: &Pass<'_>) -> Vec<f32> {
    let uniform = dropout::uniforms(2 * experts, seed, CHANCE + 2 * layer as u64 + 1, pass);
    let normal = |pair: &[f32]| {
        let radius = (-2.0 * f64::from(pair[0]).ln()).sqrt();
        (radius * (std::f64::consts::TAU * f64::from(pair[1])).cos()) as f32
    };
    uniform.chunks_exact(2).map(normal).collect()
}

/// Lets each expert have `capacity` tokens: all first choices before the second ones, tokens in their order. Gives whether a
/// choice found room; with [`Overflow::Reroute`] it may be another one then.
fn limit(
    chosen: &mut [u32],
    ranked: &[f32],
    (active, experts): (usize, usize),
    capacity: usize,
    overflow: Overflow,
) -> Vec<bool> {
    let mut room = vec![capacity; experts];
    let mut kept = vec![true; chosen.len()];
    for slot in 0..active {
        for (token, ranked) in ranked.chunks_exact(experts).enumerate() {
            let own = &mut chosen[token * active..][..active];
            if room[own[slot] as usize] == 0 && overflow == Overflow::Reroute {
                let free = (0..experts).filter(|e| room[*e] > 0 && !own.contains(&(*e as u32)));
                if let Some(best) = free.reduce(|best, e| if ranked[e] > ranked[best] { e } else { best }) {
                    own[slot] = best as u32;
                }
            }
            let room = &mut room[own[slot] as usize];
            kept[token * active + slot] = *room > 0;
            *room = room.saturating_sub(1);
        }
    }
    kept
}

#[cfg(test)]
impl Routing {
    /// What a plain router decides for these logits, the choice in order of them.
    pub(super) fn example(logits: Tensor, active: usize, scoring: Scoring) -> Self {
        let experts = logits.dims()[1];
        let rows: Vec<f32> = logits.flatten_all().unwrap().to_vec1().unwrap();
        let chosen = Rule::example(&rows, experts, active);
        let (weights, kept, noise) = (vec![1.0; chosen.len()], None, None);
        Self {
            layer: 0,
            logits,
            chosen,
            kept,
            weights,
            active,
            experts,
            scoring,
            renormalised: false,
            noise,
            unit: 1.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_expert_takes_no_more() {
        // All four tokens want expert 0, then expert 1; each has room for two.
        let ranked = [0.9, 0.5, 0.1].repeat(4);
        let mut chosen = [0, 1].repeat(4);
        let kept = limit(&mut chosen, &ranked, (2, 3), 2, Overflow::Drop);
        assert_eq!(kept, [true, true, true, true, false, false, false, false]);
        assert_eq!(chosen, [0, 1].repeat(4));
        let kept = limit(&mut chosen, &ranked, (2, 3), 3, Overflow::Reroute);
        assert_eq!(chosen, [0, 1, 0, 1, 0, 1, 2, 1]);
        assert_eq!(kept, [true, true, true, true, true, true, true, false]);
    }

    /// The input is kept in bf16; what is computed from it must not be rounded with it.
    #[test]
    fn gradients_do_not_depend_on_the_type_in_which_the_input_is_kept() {
        let cpu = candle_core::Device::Cpu;
        let config: crate::model::DecoderConfig = crate::model::family::read(&serde_json::json!({
            "model_type": "mixtral", "hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 8, "num_local_experts": 5,
            "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 8
        }))
        .unwrap();
        let (_, moe) = config.sparse_layers().next().unwrap();
        let weight =
            candle_core::Var::from_tensor(&Tensor::rand(-1f32, 1.0, (5, 32), &cpu).unwrap()).unwrap();
        let parameter = Parameter::new("w", weight.as_tensor());
        let linear =
            Linear { path: "w".into(), weight: Weight::Dense(parameter.clone()), bias: None, low_rank: None };
        let router = Router { layer: 0, linear, bias: None, rule: Rule::of(moe), noise: None, unit: 1.0 };
        let documents = crate::ops::Documents::new(vec![0, 40], vec![1]);
        let pass = Pass::training(&documents, None);
        let x = Tensor::rand(-1f32, 1.0, (40, 32), &cpu).unwrap().to_dtype(DType::BF16).unwrap();
        let d_weights: Vec<f32> = (0..80).map(|n| (n as f32).sin()).collect();
        let gradient = |dtype| -> Vec<f32> {
            let mut gradients = Gradients::of(&[("w".into(), weight.clone())].into());
            let (routing, saved) = router.forward(&x.to_dtype(dtype).unwrap(), &pass).unwrap();
            let through = (d_weights.as_slice(), None);
            router.own_gradients((&routing, &saved), &pass, through, true, &mut gradients).unwrap();
            gradients.of_name("w").unwrap().flatten_all().unwrap().to_vec1().unwrap()
        };
        assert_eq!(gradient(DType::BF16), gradient(DType::F32));
    }

    #[test]
    fn noise_is_normal() {
        let documents = crate::ops::Documents::new(vec![0, 4000], vec![1]);
        let values = normals(2, 3, 1, &Pass::training(&documents, Some(7)));
        let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / values.len() as f64;
        let variance = values.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / values.len() as f64;
        assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.04, "{mean} {variance}");
    }
}
