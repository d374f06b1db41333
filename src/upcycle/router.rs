//! Routers: a linear score for each expert, fitted to who should be chosen, and brought into the form that is stored.

use candle_core::{Device, Tensor};
use rand_distr::{Distribution, StandardNormal};

use super::partition::{energies_of_experts, membership, selection, shares};
use super::settings::RouterKind;
use super::slices::top;
use super::solve::{Linear, Regression, matrix, values};
use super::statistics::Evidence;
use crate::data::generator;
use crate::error::Result;
use crate::model::config::EVEN_EXPONENT;
use crate::ops::matmul;

/// The data that a router is made from.
pub(super) struct Sight<'a> {
    /// Inputs, and energies of the neurons that are shared out.
    pub(super) evidence: &'a Evidence,
    /// The expert of each of these neurons.
    pub(super) experts_of: &'a [usize],
    /// Their gate rows, `[neurons, hidden]`.
    pub(super) gates: &'a Tensor,
    pub(super) experts: usize,
    pub(super) active: usize,
    pub(super) with_bias: bool,
    pub(super) seed: [u64; 2],
}

/// The router of a layer.
pub(super) fn router(kind: RouterKind, sight: &Sight<'_>) -> Result<Linear> {
    let Sight { evidence, experts, .. } = *sight;
    let hidden = sight.gates.dim(1)?;
    let zero = || Linear { weight: vec![0.0; experts * hidden], bias: vec![0.0; experts] };
    let energies = || energies_of_experts(&evidence.energy, sight.experts_of, experts);
    let of_gates = || matmul(&membership(sight.experts_of, experts)?.t()?, sight.gates);
    if evidence.energy.dim(0)? == 0 {
        return Ok(zero());
    }
    let mut linear = match kind {
        RouterKind::Zero | RouterKind::Prompts => zero(),
        RouterKind::Random => {
            let mut chance = generator("upcycle/router", &sight.seed);
            let normal = (0..experts * hidden).map(|_| StandardNormal.sample(&mut chance)).collect();
            Linear { weight: normal, ..zero() }
        }
        RouterKind::GateMean => Linear { weight: values(&of_gates()?)?, ..zero() },
        RouterKind::HiddenKmeans => centres(sight, &energies()?)?,
        RouterKind::Ridge => {
            Regression::new(&evidence.x, sight.with_bias)?.fit(&shares(&energies()?)?.sqrt()?)?
        }
        RouterKind::Logistic => logistic(sight, &energies()?)?,
    };
    if sight.with_bias && !matches!(kind, RouterKind::Zero | RouterKind::Prompts) {
        balance(&mut linear, evidence, sight.active)?;
    }
    centre(&mut linear);
    Ok(linear)
}

/// Makes each row of the router the mean input of the tokens on which the expert has most energy, less the mean of all.
fn centres(sight: &Sight<'_>, energies: &Tensor) -> Result<Linear> {
    let chosen = top(&values(energies)?, sight.experts, sight.active);
    let taken = selection(&chosen, sight.experts, sight.active)?;
    let x = &sight.evidence.x;
    let counts = (taken.sum_keepdim(0)?.t()? + 1.0)?; // [experts, 1]
    let means = matmul(&taken.t()?, x)?.broadcast_div(&counts)?;
    let weight = means.broadcast_sub(&x.mean_keepdim(0)?)?;
    Ok(Linear { weight: values(&weight)?, bias: vec![0.0; sight.experts] })
}

/// Starts from a ridge regression on log energies, and fits the softmax of the scores to the shares of energy by gradient
/// descent.
///
/// With scores `z = W x + b`, `p = softmax(z)` and shares `q`, the divergence `KL(q | p)` has the gradient `p - q` in `z`.
fn logistic(sight: &Sight<'_>, energies: &Tensor) -> Result<Linear> {
    const EPOCHS: usize = 3;
    const BATCH: usize = 1024;
    const RATE: f64 = 2e-3;

    let x = &sight.evidence.x;
    let shares = shares(energies)?;
    let start = Regression::new(x, sight.with_bias)?.fit(&(energies + 1e-6 * mean(energies)?)?.log()?)?;
    let hidden = x.dim(1)?;
    let (mut weight, mut bias) = (matrix(start.weight, hidden)?, Tensor::new(start.bias, &Device::Cpu)?);
    let mut moments = [weight.zeros_like()?, weight.zeros_like()?, bias.zeros_like()?, bias.zeros_like()?];
    let tokens = x.dim(0)?;
    let mut step = 0;
    for _ in 0..EPOCHS {
        for from in (0..tokens).step_by(BATCH) {
            let count = BATCH.min(tokens - from);
            let (x, q) = (x.narrow(0, from, count)?, shares.narrow(0, from, count)?);
            let z = matmul(&x, &weight.t()?)?.broadcast_add(&bias)?;
            let power = z.broadcast_sub(&z.max_keepdim(1)?)?.exp()?;
            let p = power.broadcast_div(&power.sum_keepdim(1)?)?;
            let dz = ((p - q)? / count as f64)?;
            step += 1;
            weight = adam(&weight, &matmul(&dz.t()?, &x)?, &mut moments[..2], RATE, step)?;
            if sight.with_bias {
                bias = adam(&bias, &dz.sum(0)?, &mut moments[2..], RATE, step)?;
            }
        }
    }
    Ok(Linear { weight: values(&weight)?, bias: bias.to_vec1()? })
}

fn mean(x: &Tensor) -> Result<f64> {
    Ok(f64::from(x.mean_all()?.to_scalar::<f32>()?))
}

/// A step of Adam (Kingma and Ba 2015) with its usual constants.
fn adam(x: &Tensor, gradient: &Tensor, moments: &mut [Tensor], rate: f64, step: i32) -> Result<Tensor> {
    const FIRST: f64 = 0.9;
    const SECOND: f64 = 0.999;

    moments[0] = ((&moments[0] * FIRST)? + (gradient * (1.0 - FIRST))?)?;
    moments[1] = ((&moments[1] * SECOND)? + (gradient.sqr()? * (1.0 - SECOND))?)?;
    let first = (&moments[0] / (1.0 - FIRST.powi(step)))?;
    let second = (&moments[1] / (1.0 - SECOND.powi(step)))?;
    Ok((x - (first / (second.sqrt()? + 1e-8)?)? * rate)?)
}

/// An expert with less than this share of an even load is helped.
const LEAST_LOAD: f64 = 0.25;

/// Raises the bias of experts that are hardly chosen, as loss-free balancing does (Wang et al. 2024), and of no others: an
/// even load costs energy, an idle expert is memory for nothing.
fn balance(linear: &mut Linear, evidence: &Evidence, active: usize) -> Result<()> {
    const ROUNDS: usize = 200;

    let experts = linear.bias.len();
    let mut scores = values(&linear.apply(&evidence.x)?)?;
    let tokens = (scores.len() / experts).max(1);
    let mean: f64 = scores.iter().map(|z| f64::from(*z)).sum::<f64>() / scores.len() as f64;
    let variance = scores.iter().map(|z| (f64::from(*z) - mean).powi(2)).sum::<f64>() / scores.len() as f64;
    let step = 0.05 * variance.sqrt() as f32;
    let least = LEAST_LOAD * tokens as f64 * active as f64 / experts as f64;
    for _ in 0..ROUNDS {
        let mut load = vec![0usize; experts];
        top(&scores, experts, active).iter().for_each(|expert| load[*expert as usize] += 1);
        let idle: Vec<usize> = (0..experts).filter(|expert| (load[*expert] as f64) < least).collect();
        if idle.is_empty() {
            break;
        }
        for expert in idle {
            linear.bias[expert] += step;
            scores.iter_mut().skip(expert).step_by(experts).for_each(|score| *score += step);
        }
    }
    Ok(())
}

/// Subtracts the mean of all rows from each row, because a part that all experts share decides nothing.
fn centre(linear: &mut Linear) {
    let experts = linear.bias.len();
    let hidden = linear.weight.len() / experts;
    for column in 0..hidden {
        let of = |expert: usize| expert * hidden + column;
        let mean = (0..experts).map(|expert| linear.weight[of(expert)]).sum::<f32>() / experts as f32;
        (0..experts).for_each(|expert| linear.weight[of(expert)] -= mean);
    }
    let mean = linear.bias.iter().sum::<f32>() / experts as f32;
    linear.bias.iter_mut().for_each(|bias| *bias -= mean);
}

/// The power of two that a router's weight is multiplied with when it is stored.
///
/// It changes no order of scores, and makes the weights of chosen experts nearly equal: with logits of deviation `d` they
/// are equal up to about `d / 2`. Smaller is not better: scores near one half have 24 bits, and at 2^-10 one token in a
/// hundred was so near a tie in each layer that programs which sum in another order chose another expert.
pub(super) fn exponent(linear: &Linear, x: &Tensor) -> Result<i32> {
    let scores = values(&linear.apply(x)?)?;
    let square = scores.iter().map(|z| f64::from(*z).powi(2)).sum::<f64>() / scores.len().max(1) as f64;
    if square == 0.0 || !square.is_finite() {
        return Ok(0);
    }
    Ok((2f64.powi(EVEN_EXPONENT) / square.sqrt()).log2().floor() as i32)
}
