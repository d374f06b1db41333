//! Neurons to experts: by place, chance, gates, co-activation, what the loss leans on, or in turns with the router.

use candle_core::{DType, Tensor};
use rand_chacha::ChaCha20Rng;

use super::assign::balanced;
use super::settings::Partition;
use super::slices::top;
use super::solve::{Linear, Regression, matrix, values};
use super::statistics::Evidence;
use crate::data::{generator, shuffle};
use crate::error::{Error, Result};
use crate::ops::{matmul, scores};

/// The data by which neurons are assigned to experts.
pub(super) struct Grounds<'a> {
    /// Inputs and energies of the neurons to assign, on the tokens that routers are fitted to.
    pub(super) fitted: &'a Evidence,
    /// Evidence from other tokens chooses the best of several partitions.
    pub(super) chosen_by: &'a Evidence,
    /// Their gate rows, `[neurons, hidden]`, f32.
    pub(super) gates: &'a Tensor,
    /// Their importance for each kind of text, `[neurons, experts]`, where it was asked for.
    pub(super) importance: Option<&'a Tensor>,
    /// Experts.
    pub(super) experts: usize,
    /// The number of experts that a token uses.
    pub(super) active: usize,
    /// Whether the router can have a bias.
    pub(super) with_bias: bool,
    /// Seed and layer.
    pub(super) seed: [u64; 2],
}

/// The expert of each neuron.
pub(super) fn partition(kind: Partition, grounds: &Grounds<'_>) -> Result<Vec<usize>> {
    let neurons = grounds.gates.dim(0)?;
    let width = neurons / grounds.experts;
    match kind {
        Partition::Sequential => Ok((0..neurons).map(|neuron| neuron / width).collect()),
        Partition::Random => {
            let mut experts: Vec<usize> = (0..neurons).map(|neuron| neuron % grounds.experts).collect();
            shuffle(&mut experts, &mut generator("upcycle/random", &grounds.seed));
            Ok(experts)
        }
        Partition::Kmeans => kmeans(grounds, 20),
        Partition::Coactivation => coactivation(grounds),
        Partition::Alternating => alternating(grounds),
        Partition::Gradient | Partition::GradientSharing => match grounds.importance {
            Some(importance) => Ok(balanced(&values(importance)?, grounds.experts)),
            None => Err(Error::invalid("no gradients were taken of this layer")),
        },
    }
}

/// `[neurons, experts]` with a one where a neuron belongs.
pub(super) fn membership(experts_of: &[usize], experts: usize) -> Result<Tensor> {
    let mut ones = vec![0f32; experts_of.len() * experts];
    experts_of.iter().enumerate().for_each(|(neuron, expert)| ones[neuron * experts + expert] = 1.0);
    matrix(ones, experts)
}

/// The energy of each expert's neurons, `[tokens, experts]`, from `energy [tokens, neurons]`.
pub(super) fn energies_of_experts(energy: &Tensor, experts_of: &[usize], experts: usize) -> Result<Tensor> {
    scores(energy, &membership(experts_of, experts)?.t()?)
}

/// Balanced spherical k-means on gate rows.
fn kmeans(grounds: &Grounds<'_>, rounds: usize) -> Result<Vec<usize>> {
    spherical(grounds.gates, grounds.experts, rounds, &mut generator("upcycle/kmeans", &grounds.seed))
}

/// Balanced k-means of rows by their direction: the cluster of each, all of one size.
pub(super) fn spherical(
    rows: &Tensor,
    clusters: usize,
    rounds: usize,
    chance: &mut ChaCha20Rng,
) -> Result<Vec<usize>> {
    let norms = (rows.sqr()?.sum_keepdim(1)?.sqrt()? + 1e-12)?;
    let rows = rows.broadcast_div(&norms)?;
    let mut order: Vec<u32> = (0..rows.dim(0)? as u32).collect();
    shuffle(&mut order, chance);
    let first = Tensor::new(&order[..clusters], rows.device())?;
    let mut centres = rows.index_select(&first, 0)?;
    let mut found = Vec::new();
    for _ in 0..rounds {
        let next = balanced(&values(&matmul(&rows, &centres.t()?)?)?, clusters);
        if next == found {
            break;
        }
        let sums = matmul(&membership(&next, clusters)?.t()?, &rows)?;
        centres = sums.broadcast_div(&(sums.sqr()?.sum_keepdim(1)?.sqrt()? + 1e-12)?)?;
        found = next;
    }
    Ok(found)
}

/// Neurons whose contributions rise and fall together: k-means in which a neuron is as near to an expert as its
/// mean correlation with the neurons there.
fn coactivation(grounds: &Grounds<'_>) -> Result<Vec<usize>> {
    const TOKENS: usize = 8192;

    let contributions =
        grounds.fitted.energy.narrow(0, 0, grounds.fitted.energy.dim(0)?.min(TOKENS))?.sqrt()?;
    let centred = contributions.broadcast_sub(&contributions.mean_keepdim(0)?)?;
    let scaled = centred.broadcast_div(&(centred.sqr()?.sum_keepdim(0)?.sqrt()? + 1e-12)?)?;
    let correlation = matmul(&scaled.t()?, &scaled)?; // [neurons, neurons]
    let mut found = kmeans(grounds, 3)?;
    for _ in 0..20 {
        let nearness = matmul(&correlation, &membership(&found, grounds.experts)?)?;
        let next = balanced(&values(&nearness)?, grounds.experts);
        if next == found {
            break;
        }
        found = next;
    }
    Ok(found)
}

/// The first rounds, in which tokens choose the experts with most energy on them.
const BY_ORACLE: usize = 4;
/// The rounds after these, in which tokens choose by the scores of a linear router, as in the finished model.
const BY_ROUTER: usize = 8;

/// Improves the partition in turns: tokens choose experts, then neurons go to the experts on whose tokens they have most
/// energy.
fn alternating(grounds: &Grounds<'_>) -> Result<Vec<usize>> {
    let Grounds { fitted, experts, active, .. } = *grounds;
    let mut experts_of = kmeans(grounds, 3)?;
    if fitted.energy.dim(0)? == 0 {
        return Ok(experts_of);
    }
    let regression = Regression::new(&fitted.x, grounds.with_bias)?;
    let mut best: Option<(f64, Vec<usize>)> = None;
    for round in 0..BY_ORACLE + BY_ROUTER {
        let energies = energies_of_experts(&fitted.energy, &experts_of, experts)?;
        let scores = match round < BY_ORACLE {
            true => energies,
            false => {
                let router = regression.fit(&shares(&energies)?.sqrt()?)?;
                keep_better(&mut best, captured(grounds, &router, &experts_of)?, &experts_of);
                router.apply(&fitted.x)?
            }
        };
        let chosen = top(&values(&scores)?, experts, active);
        let taken = selection(&chosen, experts, active)?; // [tokens, experts]
        let gains = matmul(&taken.t()?, &fitted.energy)?; // [experts, neurons]
        experts_of = balanced(&values(&gains.t()?.contiguous()?)?, experts);
    }
    let energies = energies_of_experts(&fitted.energy, &experts_of, experts)?;
    let router = regression.fit(&shares(&energies)?.sqrt()?)?;
    keep_better(&mut best, captured(grounds, &router, &experts_of)?, &experts_of);
    Ok(best.map_or(experts_of, |(_, experts_of)| experts_of))
}

/// The share that each expert has in a token's energy, `[tokens, experts]`. Linear routers are fitted to its root: energies
/// themselves have tails that least squares would follow, and a few tokens would decide for all.
pub(super) fn shares(energies: &Tensor) -> Result<Tensor> {
    let total = (energies.sum_keepdim(1)? + 1e-20)?;
    Ok(energies.broadcast_div(&total)?)
}

fn keep_better(best: &mut Option<(f64, Vec<usize>)>, captured: f64, experts_of: &[usize]) {
    if best.as_ref().is_none_or(|(most, _)| captured > *most) {
        *best = Some((captured, experts_of.to_vec()));
    }
}

/// `[tokens, experts]` with a one for each chosen expert.
pub(super) fn selection(chosen: &[u32], experts: usize, active: usize) -> Result<Tensor> {
    let mut ones = vec![0f32; chosen.len() / active * experts];
    for (token, chosen) in chosen.chunks_exact(active).enumerate() {
        chosen.iter().for_each(|expert| ones[token * experts + *expert as usize] = 1.0);
    }
    matrix(ones, experts)
}

/// Computes the energy of the experts that a router chooses, on the tokens by which partitions are compared.
fn captured(grounds: &Grounds<'_>, router: &Linear, experts_of: &[usize]) -> Result<f64> {
    let Grounds { chosen_by, experts, active, .. } = *grounds;
    if chosen_by.energy.dim(0)? == 0 {
        return Ok(0.0);
    }
    let energies = energies_of_experts(&chosen_by.energy, experts_of, experts)?;
    let chosen = top(&values(&router.apply(&chosen_by.x)?)?, experts, active);
    let taken = (energies * selection(&chosen, experts, active)?)?;
    Ok(taken.to_dtype(DType::F64)?.sum_all()?.to_scalar::<f64>()?)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn shares_do_not_depend_on_how_much_a_token_has() {
        let energies = Tensor::new(&[[1f32, 3.0], [100.0, 300.0], [0.0, 0.0]], &Device::Cpu).unwrap();
        let found = shares(&energies).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(found, [[0.25, 0.75], [0.25, 0.75], [0.0, 0.0]]);
    }
}
