//! Adapters on each expert, put together into adapters on the parameters of all experts, where PEFT does not do so itself
//! (see [`InPeft::Unknown`]): the layout that [`super::fused`] takes apart.
//!
//! Gate and up get ranks of one product: `A = [A_gate; A_up]` and `B = diag(B_gate, B_up)`, so that rank and alpha add up. The
//! same is done to the shared expert, whose gate and up transformers holds in one linear layer.

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{DType, Device, Tensor};

use crate::adapter::config::{Exclude, LoraConfig, Targets};
use crate::adapter::lora::tensor_names;
use crate::adapter::patterns::Patterns;
use crate::adapter::target::{Placement, Placements};
use crate::error::{Context, Error, Result};
use crate::model::config::{Bundle, InPeft, Projection, Site};

/// An adapter in the layout that PEFT reads.
pub(super) struct Joined {
    pub(super) config: LoraConfig,
    pub(super) placements: Placements,
    /// The values of `target_parameters`.
    pub(super) parameters: BTreeSet<String>,
    pub(super) tensors: BTreeMap<String, Tensor>,
}

/// The projections of one parameter or linear layer, up to two of each expert.
type Members<'a> = Vec<(usize, &'a Placement)>;

/// The adapter on parameters; `None` where PEFT reads it as it is, or has no way to say it: other ranks in one layer than
/// in another, biases.
pub(super) fn join(
    config: &LoraConfig,
    placements: &Placements,
    tensors: &BTreeMap<String, Tensor>,
) -> Result<Option<Joined>> {
    let Some(names) = placements.names.filter(|names| names.in_peft == InPeft::Unknown && !config.lora_bias)
    else {
        return Ok(None);
    };
    let is_joined = |p: &&Placement| matches!(p.linear.site, Site::Expert(_)) || is_shared(p);
    let (members, others): (Vec<_>, Vec<_>) = placements.placements.iter().partition(is_joined);
    // Of each kind of projection there is one rank, and of gate and up, which become one product, one scale.
    let mut kinds: BTreeMap<(bool, Projection), (usize, f64)> = BTreeMap::new();
    for member in &members {
        let own = (member.rank, member.scale);
        if *kinds.entry((is_shared(member), member.linear.projection)).or_insert(own) != own {
            return Ok(None);
        }
    }
    let scales =
        |shared| [Projection::Gate, Projection::Up].map(|kind| kinds.get(&(shared, kind)).map(|k| k.1));
    let agree = |[gate, up]: [Option<f64>; 2]| gate.is_none() || up.is_none() || gate == up;
    if members.is_empty() || !agree(scales(false)) || !agree(scales(true)) {
        return Ok(None);
    }
    let mut groups: BTreeMap<String, Members<'_>> = BTreeMap::new();
    for member in &members {
        let expert = match member.linear.site {
            Site::Expert(expert) => expert,
            _ => 0,
        };
        let down = member.linear.projection == Projection::Down;
        let bundle = match (is_shared(member), down) {
            (true, true) => Bundle::SharedDown,
            (true, false) => Bundle::SharedGateUp,
            (false, true) => Bundle::Down,
            (false, false) => Bundle::GateUp,
        };
        let (Some(layer), Some(name)) = (member.linear.layer, names.in_transformers(bundle)) else {
            return Ok(None);
        };
        groups.entry(format!("model.layers.{layer}.{name}")).or_default().push((expert, member));
    }

    let mut joined: BTreeMap<String, Tensor> = tensors
        .iter()
        .filter(|(name, _)| !is_of(name, &members))
        .map(|(n, t)| (n.clone(), t.clone()))
        .collect();
    let mut parameters = BTreeSet::new();
    let mut targets: Vec<String> = others.iter().map(|other| other.linear.path.clone()).collect();
    let mut ranks: BTreeMap<String, (usize, f64)> = others
        .iter()
        .filter(|other| (other.rank, other.alpha) != (config.rank, config.alpha()))
        .map(|other| (other.linear.path.clone(), (other.rank, other.alpha)))
        .collect();
    for (path, group) in &groups {
        let kinds: BTreeMap<Projection, usize> =
            group.iter().map(|(_, member)| (member.linear.projection, member.rank)).collect();
        let is_parameter = path.contains(".experts.");
        let experts = if is_parameter { placements.experts } else { 1 };
        let (rank, scale) = (kinds.values().sum::<usize>(), group[0].1.scale);
        let (a, b) = product(experts, &kinds, group, tensors)?;
        let module = match path.strip_suffix(".gate_up_proj") {
            Some(module) if groups.contains_key(&format!("{module}.down_proj")) => {
                format!("{module}.base_layer")
            }
            Some(module) => module.to_string(),
            None => path.strip_suffix(".down_proj").unwrap_or(path).to_string(),
        };
        let names = tensor_names(&module);
        joined.extend([(names.a, a), (names.b, b)]);
        if is_parameter {
            parameters.insert(path.clone());
        } else {
            targets.push(path.clone())
        }
        let alpha = scale * if config.rslora { (rank as f64).sqrt() } else { rank as f64 };
        if (rank, alpha) != (config.rank, config.alpha()) {
            ranks.insert(path.clone(), (rank, alpha));
        }
    }
    let pattern = |path: &String| path.replace('.', r"\.");
    let config = LoraConfig {
        alpha: Some(config.alpha()),
        dropout: 0.0,
        targets: Targets::Names(targets),
        exclude: Exclude::default(),
        rank_pattern: Patterns(ranks.iter().map(|(path, (rank, _))| (pattern(path), *rank)).collect()),
        alpha_pattern: Patterns(ranks.iter().map(|(path, (_, alpha))| (pattern(path), *alpha)).collect()),
        layers_to_transform: None,
        layers_pattern: Vec::new(),
        ..config.clone()
    };
    let placements =
        Placements { placements: Vec::new(), without: Vec::new(), names: None, ..placements.clone() };
    Ok(Some(Joined { config, placements, parameters, tensors: joined }))
}

/// `A [experts * rank, in]` and `B [out, rank * experts]` of projections that share an input, of which each expert may have
/// some: the others are zero.
fn product(
    experts: usize,
    kinds: &BTreeMap<Projection, usize>,
    group: &Members<'_>,
    tensors: &BTreeMap<String, Tensor>,
) -> Result<(Tensor, Tensor)> {
    let linear = &group[0].1.linear;
    // A parameter of gate and up has the outputs of both, also where only one is adapted.
    let down = kinds.contains_key(&Projection::Down);
    let (inputs, share, own) = (linear.in_features, linear.out_features, kinds.values().sum::<usize>());
    let outputs = if down { share } else { 2 * share };
    let mut a = vec![0f32; experts * own * inputs];
    let mut b = vec![0f32; outputs * own * experts];
    for (expert, member) in group {
        let names = tensor_names(&member.linear.path);
        let values = |name: &str| -> Result<Vec<f32>> {
            let tensor = tensors.get(name).ok_or_else(|| Error::invalid("is missing")).in_tensor(name)?;
            Ok(tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
        };
        let (kind, rank) = (member.linear.projection, member.rank);
        let first: usize = kinds.range(..kind).map(|(_, rank)| rank).sum();
        a[(expert * own + first) * inputs..][..rank * inputs].copy_from_slice(&values(&names.a)?);
        let above = if kind == Projection::Up { share } else { 0 };
        for (row, values) in values(&names.b)?.chunks_exact(rank).enumerate() {
            for (k, value) in values.iter().enumerate() {
                b[((above + row) * own + first + k) * experts + expert] = *value;
            }
        }
    }
    let device = Device::Cpu;
    Ok((
        Tensor::from_vec(a, (experts * own, inputs), &device)?,
        Tensor::from_vec(b, (outputs, own * experts), &device)?,
    ))
}

fn is_shared(placement: &Placement) -> bool {
    placement.linear.site == Site::Shared
}

fn is_of(name: &str, members: &[&Placement]) -> bool {
    members.iter().any(|member| super::tensors::is_of(name, &member.linear.path))
}
