//! Losses on what routers gave, and the facts that tell how evenly they spread tokens.
//!
//! With `P [tokens, experts]` the scores of all experts, summing to one for a token, `g` those of the chosen alone (divided by
//! their sum where the model does so) and `z` the logits:
//!
//! | term | | source |
//! |---|---|---|
//! | switch | `E sum_e f_e mean(P_e)`, `f_e` the choices of `e` per token; the number chosen when all is even | Switch Transformer, (4) |
//! | importance | `CV^2` of `sum_t g_te` | Shazeer et al. 2017, (6) |
//! | load | `CV^2` of `sum_t Phi((z_te - threshold_te) / sigma)` | the same, (8) to (11) |
//! | load_std | `std / mean` of `sum_t P_te` | |
//! | z | mean of `logsumexp(z)^2` | ST-MoE, (5) |
//!
//! `CV^2` is the variance (divided by `E - 1`) by the squared mean. A threshold is the least of the largest logits,
//! as many as are active, when the expert itself is left out, all with their noise, and `z` there is without; a selection bias,
//! chance and capacity do not come into it. `sigma` is the deviation of the noise, and where there is none 1, or what that is for a
//! router that is stored scaled down ([`Routing::unit`]). Choices and thresholds are constants. Each term is the mean over layers, or
//! `pooled`: that of all layers' tokens taken together, which for `switch` is what transformers computes.

use std::collections::BTreeMap;

use candle_core::{D, Tensor, Var};

use super::config::Scoring;
use super::router::{Routing, RoutingGradient};
use crate::error::Result;

/// How much each term counts; 0: not at all.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct RouterLosses {
    /// Of the loss of Switch Transformer.
    pub switch: f64,
    /// Of the squared variation of the weights that experts get.
    pub importance: f64,
    /// Of the squared variation of the tokens that experts can be expected to get.
    pub load: f64,
    /// Of the variation of summed scores.
    pub load_std: f64,
    /// Of the squared size of logits.
    pub z: f64,
    /// Whether all layers are taken together.
    pub pooled: bool,
}

/// The terms of a loss, without their coefficients.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Terms {
    /// By name; those whose coefficient is 0 are left out.
    pub values: BTreeMap<&'static str, f64>,
    /// `sum of coefficient * value`.
    pub total: f64,
}

impl RouterLosses {
    /// Whether anything counts.
    #[must_use]
    pub fn are_on(&self) -> bool {
        self.named().iter().any(|(_, coefficient)| *coefficient > 0.0)
    }

    fn named(&self) -> [(&'static str, f64); 5] {
        let Self { switch, importance, load, load_std, z, .. } = *self;
        [("switch", switch), ("importance", importance), ("load", load), ("load_std", load_std), ("z", z)]
    }

    /// The terms, and the gradients of `share * total` in each layer.
    pub fn of(&self, routing: &[Routing], share: f64) -> Result<(Terms, BTreeMap<usize, RoutingGradient>)> {
        if !self.are_on() || routing.is_empty() {
            return Ok((Terms::default(), BTreeMap::new()));
        }
        let variables: Vec<Variables> = routing.iter().map(Variables::of).collect::<Result<_>>()?;
        let layers: Vec<Layer> =
            variables.iter().zip(routing).map(|(z, routing)| Layer::of(z, routing)).collect::<Result<_>>()?;
        let layers = if self.pooled { vec![Layer::joined(&layers)?] } else { layers };
        let mut terms = Terms::default();
        let mut total: Option<Tensor> = None;
        for (name, coefficient) in self.named() {
            if coefficient == 0.0 {
                continue;
            }
            let mut sum: Option<Tensor> = None;
            for layer in &layers {
                let value = layer.term(name)?;
                sum = Some(match sum {
                    None => value,
                    Some(sum) => (sum + value)?,
                });
            }
            let Some(sum) = sum else { continue };
            let mean = (sum / layers.len() as f64)?;
            let value = f64::from(mean.to_scalar::<f32>()?);
            terms.values.insert(name, value);
            terms.total += coefficient * value;
            let weighed = (mean * (coefficient * share))?;
            total = Some(match total {
                None => weighed,
                Some(total) => (total + weighed)?,
            });
        }
        let Some(total) = total else { return Ok((terms, BTreeMap::new())) };
        let gradients = total.backward()?;
        let of = |variable: &Var| gradients.get(variable.as_tensor()).map(Tensor::detach);
        let of_layers = variables.iter().zip(routing).filter_map(|(variables, routing)| {
            let deviation = variables.deviation.as_ref().and_then(of);
            Some((routing.layer, RoutingGradient { logits: of(&variables.logits)?, deviation }))
        });
        Ok((terms, of_layers.collect()))
    }
}

/// What losses are differentiated by.
struct Variables {
    /// Without noise.
    logits: Var,
    /// That of the noise.
    deviation: Option<Var>,
}

impl Variables {
    fn of(routing: &Routing) -> Result<Self> {
        let Some(noise) = &routing.noise else {
            return Ok(Self { logits: Var::from_tensor(&routing.logits)?, deviation: None });
        };
        let without = (&routing.logits - (&noise.drawn * &noise.deviation)?)?;
        Ok(Self { logits: Var::from_tensor(&without)?, deviation: Some(Var::from_tensor(&noise.deviation)?) })
    }
}

/// The logits of some tokens, and what was chosen.
struct Layer {
    logits: Tensor,
    /// 1 where an expert was chosen.
    mask: Tensor,
    scoring: Scoring,
    renormalised: bool,
    active: usize,
    /// The logits without noise, `[tokens, experts]`.
    without_noise: Tensor,
    /// The deviation of the noise, `[tokens, experts]`.
    sigma: Tensor,
}

impl Layer {
    fn of(variables: &Variables, routing: &Routing) -> Result<Self> {
        let without_noise = variables.logits.as_tensor();
        let (tokens, experts) = without_noise.dims2()?;
        let (logits, sigma) = match (&routing.noise, &variables.deviation) {
            (Some(noise), Some(sigma)) => {
                ((without_noise + (&noise.drawn * sigma.as_tensor())?)?, sigma.as_tensor().clone())
            }
            _ => {
                let unit = Tensor::full(routing.unit as f32, without_noise.dims(), without_noise.device())?;
                (without_noise.clone(), unit)
            }
        };
        let mut mask = vec![0f32; tokens * experts];
        for (choice, expert) in routing.chosen.iter().enumerate() {
            mask[choice / routing.active * experts + *expert as usize] = 1.0;
        }
        Ok(Self {
            mask: Tensor::from_vec(mask, (tokens, experts), logits.device())?,
            logits,
            scoring: routing.scoring,
            renormalised: routing.renormalised,
            active: routing.active,
            without_noise: without_noise.clone(),
            sigma,
        })
    }

    /// The tokens of all layers, which are of one family and have as many experts.
    fn joined(layers: &[Self]) -> Result<Self> {
        let cat = |of: fn(&Self) -> &Tensor| Tensor::cat(&layers.iter().map(of).collect::<Vec<_>>(), 0);
        Ok(Self {
            logits: cat(|l| &l.logits)?,
            mask: cat(|l| &l.mask)?,
            without_noise: cat(|l| &l.without_noise)?,
            sigma: cat(|l| &l.sigma)?,
            ..layers[0]
        })
    }

    fn term(&self, name: &str) -> Result<Tensor> {
        match name {
            "switch" => self.switch(),
            "importance" => variation(&self.gates()?.sum(0)?),
            "load" => variation(&self.expected_load()?),
            "load_std" => Ok((variation(&self.scores()?.sum(0)?)? + EVEN)?.sqrt()?),
            _ => Ok(logsumexp(&self.logits)?.sqr()?.mean_all()?),
        }
    }

    fn scores(&self) -> Result<Tensor> {
        match self.scoring {
            Scoring::Softmax | Scoring::SoftmaxOfActive => {
                Ok(self.logits.broadcast_sub(&logsumexp(&self.logits)?)?.exp()?)
            }
            Scoring::Sigmoid => {
                let s = (self.logits.neg()?.exp()? + 1.0)?.recip()?;
                Ok(s.broadcast_div(&s.sum_keepdim(1)?)?)
            }
        }
    }

    fn switch(&self) -> Result<Tensor> {
        let experts = self.logits.dim(1)? as f64;
        let (share, mean) = (self.mask.mean(0)?, self.scores()?.mean(0)?);
        Ok(((share * mean)?.sum_all()? * experts)?)
    }

    fn gates(&self) -> Result<Tensor> {
        let gates = (self.scores()? * &self.mask)?;
        match self.renormalised {
            true => Ok(gates.broadcast_div(&gates.sum_keepdim(1)?)?),
            false => Ok(gates),
        }
    }

    fn expected_load(&self) -> Result<Tensor> {
        let rows: Vec<Vec<f32>> = self.logits.detach().to_vec2()?;
        let experts = self.logits.dim(1)?;
        let mut thresholds = Vec::with_capacity(rows.len() * experts);
        for row in &rows {
            let mut sorted = row.clone();
            sorted.sort_by(|x, y| y.total_cmp(x));
            // Beside an expert that is among the largest, the next one would be.
            let next = sorted.get(self.active).copied().unwrap_or(f32::NEG_INFINITY).max(f32::MIN / 2.0);
            let last = sorted[self.active - 1];
            thresholds.extend(row.iter().map(|logit| if *logit >= last { next } else { last }));
        }
        let thresholds = Tensor::from_vec(thresholds, (rows.len(), experts), self.logits.device())?;
        let distance = ((&self.without_noise - thresholds)? / (&self.sigma * std::f64::consts::SQRT_2)?)?;
        Ok(((distance.erf()? + 1.0)? * 0.5)?.sum(0)?)
    }
}

/// `[tokens, 1]`.
fn logsumexp(logits: &Tensor) -> Result<Tensor> {
    let most = logits.detach().max_keepdim(D::Minus1)?;
    let sum = logits.broadcast_sub(&most)?.exp()?.sum_keepdim(D::Minus1)?;
    Ok((sum.log()? + most)?)
}

/// Added under a root, whose slope has no end at zero.
const EVEN: f64 = 1e-12;

/// The variance by the squared mean.
fn variation(values: &Tensor) -> Result<Tensor> {
    let count = values.elem_count();
    let mean = values.mean_keepdim(0)?;
    let squares = values.broadcast_sub(&mean)?.sqr()?.sum_keepdim(0)?;
    let variance = (squares / count.saturating_sub(1).max(1) as f64)?;
    Ok((variance / (mean.sqr()? + 1e-10)?)?.squeeze(0)?)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::model::router::Noise;

    fn routing(logits: &[f32], tokens: usize, active: usize, scoring: Scoring) -> Routing {
        let experts = logits.len() / tokens;
        let logits = Tensor::from_slice(logits, (tokens, experts), &Device::Cpu).unwrap();
        Routing::example(logits, active, scoring)
    }

    fn value(losses: RouterLosses, routing: &[Routing]) -> f64 {
        losses.of(routing, 1.0).unwrap().0.total
    }

    const ON: [RouterLosses; 5] = {
        let off =
            RouterLosses { switch: 0.0, importance: 0.0, load: 0.0, load_std: 0.0, z: 0.0, pooled: false };
        [
            RouterLosses { switch: 1.0, ..off },
            RouterLosses { importance: 1.0, ..off },
            RouterLosses { load: 1.0, ..off },
            RouterLosses { load_std: 1.0, ..off },
            RouterLosses { z: 1.0, ..off },
        ]
    };

    const LOGITS: [f32; 12] = [0.3, -1.2, 0.9, 0.1, 1.4, 0.2, -0.7, 0.6, -0.1, 0.8, 0.5, -1.5];

    /// Whether a logit is no threshold of the load, for these are constants.
    fn is_apart(i: usize) -> bool {
        let row = &LOGITS[i / 4 * 4..][..4];
        !(1..=2).contains(&row.iter().filter(|other| **other > LOGITS[i]).count())
    }

    #[test]
    fn even_scores_have_no_slope() {
        let even = routing(&[0.0; 16], 4, 2, Scoring::Softmax);
        for losses in ON {
            let (_, gradients) = losses.of(std::slice::from_ref(&even), 1.0).unwrap();
            let found: Vec<f32> = gradients[&0].logits.flatten_all().unwrap().to_vec1().unwrap();
            assert!(found.iter().all(|slope| slope.is_finite()), "{losses:?}: {found:?}");
        }
    }

    #[test]
    fn gradients_are_slopes() {
        for scoring in [Scoring::Softmax, Scoring::Sigmoid, Scoring::SoftmaxOfActive] {
            for losses in ON {
                let layer = routing(&LOGITS, 3, 2, scoring);
                let (_, gradients) = losses.of(std::slice::from_ref(&layer), 1.0).unwrap();
                let found: Vec<f32> = gradients[&0].logits.flatten_all().unwrap().to_vec1().unwrap();
                for (i, found) in found.iter().enumerate().filter(|(i, _)| losses.load == 0.0 || is_apart(*i))
                {
                    let at = |step: f32| {
                        let mut logits = LOGITS;
                        logits[i] += step;
                        value(losses, &[routing(&logits, 3, 2, scoring)])
                    };
                    let slope = (at(1e-2) - at(-1e-2)) / 2e-2;
                    assert!((f64::from(*found) - slope).abs() < 2e-3, "{losses:?} {i}: {found} for {slope}");
                }
            }
        }
    }

    #[test]
    fn deviations_of_noise_have_slopes() {
        const DRAWN: [f32; 12] = [0.4, -0.3, 1.1, -0.6, 0.2, 0.9, -1.0, 0.5, -0.2, 0.7, -0.8, 0.3];
        let noisy = |deviations: [f32; 12]| {
            let tensor = |values: [f32; 12]| Tensor::from_slice(&values, (3, 4), &Device::Cpu).unwrap();
            let logits: [f32; 12] = std::array::from_fn(|i| LOGITS[i] + DRAWN[i] * (deviations[i] - 0.5));
            let noise = Some(Noise { drawn: tensor(DRAWN), deviation: tensor(deviations) });
            Routing { noise, ..routing(&logits, 3, 2, Scoring::Softmax) }
        };
        for losses in ON {
            let (_, gradients) = losses.of(&[noisy([0.5; 12])], 1.0).unwrap();
            let found = gradients[&0].deviation.as_ref().unwrap();
            let found: Vec<f32> = found.flatten_all().unwrap().to_vec1().unwrap();
            for (i, found) in found.iter().enumerate().filter(|(i, _)| losses.load == 0.0 || is_apart(*i)) {
                let at = |step: f32| {
                    let mut deviations = [0.5; 12];
                    deviations[i] += step;
                    value(losses, &[noisy(deviations)])
                };
                let slope = (at(1e-2) - at(-1e-2)) / 2e-2;
                assert!((f64::from(*found) - slope).abs() < 2e-3, "{losses:?} {i}: {found} for {slope}");
            }
        }
    }

    #[test]
    fn equal_shares_cost_least() {
        // Each expert is chosen once, with the same logits.
        let even: Vec<f32> =
            (0..4).flat_map(|t| (0..4).map(move |e| if e == t { 1.0 } else { 0.0 })).collect();
        let even = routing(&even, 4, 1, Scoring::Softmax);
        let [switch, importance, load, load_std, z] =
            ON.map(|losses| value(losses, std::slice::from_ref(&even)));
        assert!((switch - 1.0).abs() < 1e-6, "{switch}");
        assert!(importance < 1e-9 && load < 1e-9 && load_std < 1e-4, "{importance} {load} {load_std}");
        let expected = f64::from(1f32.exp() + 3.0).ln().powi(2);
        assert!((z - expected).abs() < 1e-5, "{z} for {expected}");
        let one = routing(&[1.0, 0.0, 0.0, 0.0].repeat(4), 4, 1, Scoring::Softmax);
        let p = f64::from(1f32.exp() / (1f32.exp() + 3.0));
        assert!((value(ON[0], std::slice::from_ref(&one)) - 4.0 * p).abs() < 1e-5);
        // One of four gets everything: variance 1/3 * (9 + 3) / 16 of a mean of 1/4, so CV^2 is 4.
        assert!((value(ON[1], &[one]) - 4.0).abs() < 1e-4);
    }

    #[test]
    fn pooled_layers_balance_each_other() {
        let first = routing(&[3.0, 0.0, 3.0, 0.0], 2, 1, Scoring::Softmax);
        let mut second = routing(&[0.0, 3.0, 0.0, 3.0], 2, 1, Scoring::Softmax);
        second.layer = 1;
        let layers = [first, second];
        let apart = value(RouterLosses { switch: 1.0, ..RouterLosses::default() }, &layers);
        let pooled = value(RouterLosses { switch: 1.0, pooled: true, ..RouterLosses::default() }, &layers);
        assert!(apart > 1.9 && (pooled - 1.0).abs() < 1e-6, "{apart} {pooled}");
    }

    #[test]
    fn what_is_off_costs_nothing() {
        let layer = routing(&LOGITS, 3, 2, Scoring::Softmax);
        let (terms, gradients) = RouterLosses::default().of(&[layer], 1.0).unwrap();
        assert!(terms.values.is_empty() && terms.total == 0.0 && gradients.is_empty());
    }
}
