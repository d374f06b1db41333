//! Entries of `adapter_config.json` that make PEFT read adapters on experts. PEFT holds all experts of a layer in one
//! parameter, while an adapter here has tensors for each: see [`InPeft`].

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::super::config::LoraConfig;
use super::super::target::{Placement, Placements, is_named};
use super::fields::number;
use crate::model::config::{Bundle, InPeft, Projection, Site};

/// PEFT joins the terms of gate and up, so that their ranks and alphas add up.
const JOINED: &str = r".*\.gate_up_proj";
const JOINED_DOWN: &str = r".*\.experts\.down_proj";

/// Whether any expert has an adapter.
pub(super) fn are_adapted(placements: &Placements) -> bool {
    placements.placements.iter().any(is_expert)
}

/// Values of `target_parameters`, none for most models.
pub(super) fn target_parameters(placements: &Placements) -> BTreeSet<String> {
    match placements.names.map(|names| names.in_peft) {
        Some(InPeft::Translated) => placements
            .placements
            .iter()
            .filter(|p| is_feed_forward(p) && !is_expert(p))
            .map(parameter)
            .collect(),
        Some(InPeft::TensorsTranslated) => {
            let has = |projection| {
                placements.placements.iter().any(|p| is_expert(p) && p.linear.projection == projection)
            };
            let both = has(Projection::Gate) && has(Projection::Up);
            let bundles = [(Bundle::GateUp, both), (Bundle::Down, has(Projection::Down))];
            let there = bundles.into_iter().filter(|(_, is_there)| *is_there);
            there.filter_map(|(bundle, _)| parameter_of(placements, bundle)).collect()
        }
        Some(InPeft::Unknown) | None => BTreeSet::new(),
    }
}

/// Adds the patterns of rank and alpha for the parameters that `target_parameters` names.
pub(super) fn join_patterns(
    config: &LoraConfig,
    placements: &Placements,
    parameters: &BTreeSet<String>,
    ranks: &mut Map<String, Value>,
    alphas: &mut Map<String, Value>,
) {
    // The rank of the first expert is written for all, because PEFT has one rank for a whole parameter.
    let first = |projection| {
        let of_expert = |p: &&Placement| is_expert(p) && p.linear.projection == projection;
        placements.placements.iter().find(of_expert).map(|p| (p.rank, p.alpha))
    };
    let targets = |bundle| parameter_of(placements, bundle).is_some_and(|name| parameters.contains(&name));
    let mut insert = |pattern: &str, rank: usize, alpha: f64| {
        ranks.insert(pattern.to_string(), json!(rank));
        alphas.insert(pattern.to_string(), number(alpha));
    };
    if let (Some((gate, alpha)), Some((up, _))) = (first(Projection::Gate), first(Projection::Up))
        && targets(Bundle::GateUp)
    {
        let rank = gate + up;
        // A larger rank lowers the scale, so alpha grows to keep the scale of both projections.
        let share = rank as f64 / gate as f64;
        insert(JOINED, rank, alpha * if config.rslora { share.sqrt() } else { share });
    }
    if let Some(down) = first(Projection::Down)
        && targets(Bundle::Down)
        && down != (config.rank, config.alpha())
    {
        insert(JOINED_DOWN, down.0, down.1);
    }
}

/// The parameter that transformers 5 holds the projections of all experts in, below the layer's path.
fn parameter_of(placements: &Placements, bundle: Bundle) -> Option<String> {
    placements.names?.in_transformers(bundle).map(str::to_string)
}

/// Whether a value of `target_parameters` names experts, or a plain weight, whose adapter is known from its tensors.
pub(super) fn is_known(parameter: &str) -> bool {
    ["gate_up_proj", "down_proj", "_proj.weight"].iter().any(|end| parameter.ends_with(end))
}

/// `modules_to_save` for these weights of routers: the ends of their modules' paths, null where there are none.
pub(super) fn router_modules(routers: &[&str]) -> Value {
    let module = |name: &&str| {
        let path = name.rsplit_once('.').map_or(*name, |(path, _)| path);
        let below = path.splitn(4, '.').nth(3).unwrap_or(path);
        below.to_string()
    };
    let modules: BTreeSet<String> = routers.iter().map(module).collect();
    if modules.is_empty() { Value::Null } else { json!(modules) }
}

/// Whether a module is a router by its name.
pub(super) fn is_router_module(module: &str) -> bool {
    ["gate", "router.layer", "router"].iter().any(|name| is_named(module, name))
}

fn is_expert(placement: &Placement) -> bool {
    matches!(placement.linear.site, Site::Expert(_))
}

fn is_feed_forward(placement: &Placement) -> bool {
    matches!(placement.linear.projection, Projection::Gate | Projection::Up | Projection::Down)
}

/// `mlp.gate_proj.weight`: the end of a weight's name.
fn parameter(placement: &Placement) -> String {
    let mut parts = placement.linear.path.rsplitn(3, '.');
    let (name, block) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    format!("{block}.{name}.weight")
}
