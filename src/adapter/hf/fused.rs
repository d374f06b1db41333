//! Adapters that other tools hold on all experts of a layer together, taken apart into one on each expert's projections: the
//! same mathematics.
//!
//! On a parameter `[experts, out, in]` (`target_parameters`) PEFT 0.19.1 and later store `A [experts * rank, in]`, rows of an
//! expert side by side, and `B [out, experts * rank]`, where column `k * experts + e` is column `k` of expert `e`.
//! `gate_up_proj` gives gate and up an `A` in common and the halves of `B`. Of two parameters the first that the module
//! declares, `gate_up_proj`, is the inner one: `experts.base_layer.lora_A`; a single one is `experts.lora_A`.
//!
//! PEFT 0.17 to 0.19.0 take the parameter's second dimension for the input: `A [experts * rank, out]` and
//! `B [in, experts * rank]`, the other way round. Shapes tell which it is, and where a layer has as many outputs as inputs the
//! version that the configuration names.
//!
//! Where the halves of `B` are zero for halves of the ranks, gate and up get these back as their own: see [`super::halves`].
//!
//! Others pack: `experts.gate_proj.lora_A [experts, rank, in]` and `lora_B [experts, out, rank]`.

use candle_core::Tensor;

use super::halves::Pair;
use super::{Adapter, WRITER};
use crate::adapter::config::Targets;
use crate::adapter::lora::tensor_names;
use crate::adapter::patterns::Patterns;
use crate::adapter::target::{alpha_at, is_named};
use crate::error::{Context, Error, Result};
use crate::model::config::{Bundle, DecoderConfig, MoeConfig};

/// The kinds of projections that a parameter holds: gate and up, or down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    GateUp,
    Down,
}

impl Kind {
    fn parameter(self) -> &'static str {
        match self {
            Self::GateUp => "gate_up_proj",
            Self::Down => "down_proj",
        }
    }

    fn projections(self) -> &'static [usize] {
        match self {
            Self::GateUp => &[0, 1],
            Self::Down => &[2],
        }
    }
}

/// The modules of a packed adapter, beside those with the family's own names, and what they hold.
const PACKED: [(&str, &[usize]); 4] =
    [("gate_proj", &[0]), ("up_proj", &[1]), ("down_proj", &[2]), ("gate_up_proj", &[0, 1])];

/// Rank and alpha of a projection, the same in all layers.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Found {
    /// Gate, up and down of experts are 0, 1 and 2; those of the shared expert are 3, 4 and 5.
    projection: usize,
    rank: usize,
    alpha: f64,
}

/// A sparse layer.
#[derive(Debug, Clone, Copy)]
struct Place<'a> {
    layer: usize,
    moe: &'a MoeConfig,
    hidden: usize,
}

impl Place<'_> {
    /// Returns the paths of gate and up of each expert if `projections` are these two, else nothing.
    fn pairs(self, projections: &[usize]) -> Vec<Pair> {
        let paths = |expert| [0, 1].map(|projection| self.moe.expert_path(self.layer, expert, projection));
        if projections == [0, 1] { (0..self.moe.experts).map(paths).collect() } else { Vec::new() }
    }
}

impl Adapter {
    /// Converts the adapter to the layout of `model`: a pair of tensors for each expert, and routers under the model's names.
    pub fn for_model(mut self, model: &DecoderConfig) -> Result<Self> {
        let (mut found, mut joined) = (Vec::new(), Vec::new());
        // The pairs of gate and up with an A in common: first those of experts, then those of shared experts.
        let mut pairs: [Vec<Pair>; 2] = Default::default();
        for (layer, moe) in model.sparse_layers() {
            let theirs =
                moe.names.router_in_transformers().map(|name| format!("model.layers.{layer}.{name}"));
            if let Some(router) = theirs.and_then(|name| self.routers.remove(&name)) {
                self.routers.insert(format!("{}.weight", moe.router_path(layer)), router);
            }
            let place = Place { layer, moe, hidden: model.hidden_size };
            let own = format!("model.layers.{layer}.{}", moe.names.experts);
            // Transformers 5 has one name for the experts of all families.
            for path in [own, format!("model.layers.{layer}.mlp.experts")] {
                for (kind, module) in self.modules(&path)? {
                    let alpha = alpha_at(&self.config, &format!("{path}.{}", kind.parameter()))?;
                    let rank = self.take_apart(place, kind, &module).at(&self.source)?;
                    self.note(&mut found, layer, kind.projections(), rank, alpha)?;
                    pairs[0].extend(place.pairs(kind.projections()));
                }
                let names =
                    moe.names.projections.iter().zip([&[0][..], &[1], &[2]]).map(|(name, p)| (*name, p));
                for (name, projections) in names.chain(PACKED) {
                    let module = format!("{path}.{name}");
                    if self.tensors.contains_key(&tensor_names(&module).a) {
                        let alpha = alpha_at(&self.config, &module)?;
                        let rank = self.unpack(place, projections, &module).at(&self.source)?;
                        self.note(&mut found, layer, projections, rank, alpha)?;
                        pairs[0].extend(place.pairs(projections));
                    }
                }
            }
        }
        for (layer, moe) in model.sparse_layers() {
            for (name, bundle) in moe.names.packed {
                let projections: &[usize] = match bundle {
                    Bundle::SharedGateUp => &[0, 1],
                    Bundle::SharedDown => &[2],
                    _ => continue,
                };
                let module = format!("model.layers.{layer}.{}", name.trim_end_matches(".weight"));
                if !self.tensors.contains_key(&tensor_names(&module).a) {
                    continue;
                }
                let (a, b) = self.take_pair(&module).at(&self.source)?;
                let (rank, share) = (a.dim(0)?, b.dim(0)? / projections.len());
                for (i, projection) in projections.iter().enumerate() {
                    let names = tensor_names(&moe.shared_path(layer, *projection));
                    self.tensors.insert(names.a, a.clone());
                    self.tensors.insert(names.b, b.narrow(0, i * share, share)?.contiguous()?);
                }
                let alpha = alpha_at(&self.config, &module)?;
                let shared: Vec<usize> = projections.iter().map(|projection| projection + 3).collect();
                self.note(&mut found, layer, &shared, rank, alpha)?;
                if projections.len() == 2 {
                    pairs[1].push([0, 1].map(|projection| moe.shared_path(layer, projection)));
                }
                joined.push(module);
            }
        }
        let Some((_, moe)) = model.sparse_layers().next().filter(|_| !found.is_empty()) else {
            return Ok(self);
        };
        for (pairs, first) in pairs.iter().zip([0, 3]) {
            let rank = found.iter().find(|found| found.projection == first).map_or(0, |found| found.rank);
            if self.halve(pairs, rank)? {
                let both = found.iter_mut().filter(|found| (first..first + 2).contains(&found.projection));
                both.for_each(|found| {
                    // A smaller rank raises the scale, so alpha falls to keep it.
                    found.alpha /= if self.config.rslora { 2f64.sqrt() } else { 2.0 };
                    found.rank /= 2;
                });
            }
        }
        self.target(moe, &found, &joined)?;
        Ok(self)
    }

    /// Records rank and alpha of some projections; refuses a layer in which they differ from those of earlier layers.
    fn note(
        &self,
        found: &mut Vec<Found>,
        layer: usize,
        projections: &[usize],
        rank: usize,
        alpha: f64,
    ) -> Result<()> {
        for projection in projections.iter().copied() {
            let new = Found { projection, rank, alpha };
            match found.iter().find(|other| other.projection == projection) {
                None => found.push(new),
                Some(old) if *old == new => {}
                Some(old) => {
                    let name = PACKED[projection % 3].0;
                    return Err(Error::invalid(format!(
                        "`{name}` of experts has rank {rank} and alpha {alpha} in layer {layer}, and {} and {} below",
                        old.rank, old.alpha
                    )))
                    .at(&self.source);
                }
            }
        }
        Ok(())
    }

    /// Returns the modules with an adapter on all experts of a layer, and the projections that each is on.
    fn modules(&self, path: &str) -> Result<Vec<(Kind, String)>> {
        let has = |module: &str| self.tensors.contains_key(&tensor_names(module).a);
        let (outer, inner) = (path.to_string(), format!("{path}.base_layer"));
        match (has(&inner), has(&outer)) {
            (true, true) => Ok(vec![(Kind::GateUp, inner), (Kind::Down, outer)]),
            (false, true) => {
                let targeted = |kind: Kind| {
                    self.parameters.iter().any(|parameter| parameter.ends_with(kind.parameter()))
                };
                match (targeted(Kind::GateUp), targeted(Kind::Down)) {
                    (true, false) => Ok(vec![(Kind::GateUp, outer)]),
                    (false, true) => Ok(vec![(Kind::Down, outer)]),
                    _ => Err(Error::invalid(format!(
                        "`{outer}` has one adapter, and `target_parameters` does not say which of its parameters it is on"
                    )))
                    .at(&self.source),
                }
            }
            (true, false) => {
                Err(Error::invalid(format!("`{inner}` has an adapter, and `{outer}` none"))).at(&self.source)
            }
            (false, false) => Ok(Vec::new()),
        }
    }

    fn take_pair(&mut self, module: &str) -> Result<(Tensor, Tensor)> {
        let names = tensor_names(module);
        let missing = || Error::invalid("is missing");
        let a = self.tensors.remove(&names.a).ok_or_else(missing).in_tensor(&names.a)?;
        let b = self.tensors.remove(&names.b).ok_or_else(missing).in_tensor(&names.b)?;
        Ok((a, b))
    }

    /// Puts the tensors of each expert in place of those on a parameter; gives their rank.
    fn take_apart(&mut self, place: Place<'_>, kind: Kind, module: &str) -> Result<usize> {
        let name = tensor_names(module).a;
        let (a, b) = self.take_pair(module)?;
        let experts = place.moe.experts;
        let unfit = || {
            Error::invalid(format!(
                "has shape {:?} and its B {:?}, which is no adapter on {experts} experts",
                a.dims(),
                b.dims()
            ))
        };
        let ([rows, inner], [outer, columns]) = (a.dims(), b.dims()) else {
            return Err(unfit()).in_tensor(&name);
        };
        let rank = rows / experts;
        if rows != columns || rank * experts != *rows {
            return Err(unfit()).in_tensor(&name);
        }
        let (inputs, outputs) = match kind {
            Kind::GateUp => (place.hidden, 2 * place.moe.width),
            Kind::Down => (place.moe.width, place.hidden),
        };
        let swapped = match ((*inner, *outer) == (inputs, outputs), (*inner, *outer) == (outputs, inputs)) {
            (true, false) => false,
            (false, true) => true,
            (true, true) => self.is_swapped(kind).in_tensor(&name)?,
            (false, false) => return Err(unfit()).in_tensor(&name),
        };
        let all_a = a.reshape((experts, rank, *inner))?;
        let all_b = b.reshape((*outer, rank, experts))?;
        for expert in 0..experts {
            let (a, b) = (all_a.get(expert)?, all_b.narrow(2, expert, 1)?.squeeze(2)?);
            let (a, b) = if swapped { (b.t()?, a.t()?) } else { (a, b) };
            self.put(place, expert, kind.projections(), &a, &b)?;
        }
        Ok(rank)
    }

    /// Whether the columns of `A` are outputs, as in PEFT before 0.19.1. It is asked where shapes do not tell.
    fn is_swapped(&self, kind: Kind) -> Result<bool> {
        let version = self.peft_version.as_deref().and_then(|version| {
            let mut numbers = version.split('.').map(|part| part.parse::<u32>().ok());
            Some((numbers.next()??, numbers.next()??, numbers.next().flatten().unwrap_or(0)))
        });
        match version {
            Some(version) => Ok(version < (0, 19, 1)),
            None if self.metadata.contains_key(WRITER) => Ok(false),
            None => Err(Error::invalid(format!(
                "`{}` has as many outputs as inputs, and no `peft_version` says which of them A goes with",
                kind.parameter()
            ))
            .with_hint(
                "PEFT writes its version into `adapter_config.json`: save the adapter with PEFT again",
            )),
        }
    }

    /// Puts the tensors of each expert in place of packed ones; gives their rank.
    fn unpack(&mut self, place: Place<'_>, projections: &[usize], module: &str) -> Result<usize> {
        let name = tensor_names(module).a;
        let (a, b) = self.take_pair(module)?;
        let (experts, down) = (place.moe.experts, projections == [2]);
        let width = place.moe.width * projections.len();
        let (inputs, outputs) = if down { (width, place.hidden) } else { (place.hidden, width) };
        let rank = a.dims().get(1).copied().unwrap_or(0);
        if a.dims() != [experts, rank, inputs] || b.dims() != [experts, outputs, rank] {
            return Err(Error::invalid(format!(
                "has shape {:?} and its B {:?}, expected [{experts}, rank, {inputs}] and [{experts}, {outputs}, rank]",
                a.dims(),
                b.dims()
            )))
            .in_tensor(&name);
        }
        for expert in 0..experts {
            self.put(place, expert, projections, &a.get(expert)?, &b.get(expert)?)?;
        }
        Ok(rank)
    }

    /// Stores an adapter on projections of one expert: each gets a copy of `A` and its rows of `B`.
    fn put(
        &mut self,
        place: Place<'_>,
        expert: usize,
        projections: &[usize],
        a: &Tensor,
        b: &Tensor,
    ) -> Result<()> {
        let share = b.dim(0)? / projections.len();
        for (i, projection) in projections.iter().enumerate() {
            let names = tensor_names(&place.moe.expert_path(place.layer, expert, *projection));
            self.tensors.insert(names.a, a.contiguous()?);
            self.tensors.insert(names.b, b.narrow(0, i * share, share)?.contiguous()?);
        }
        Ok(())
    }

    /// Rewrites targets, ranks and alphas of the configuration for tensors on each expert.
    fn target(&mut self, moe: &MoeConfig, found: &[Found], joined: &[String]) -> Result<()> {
        let Targets::Names(names) = &self.config.targets else {
            return Err(Error::invalid(
                "`target_modules` is a pattern beside `target_parameters`; expected a list of names",
            ))
            .at(&self.source);
        };
        let (mut own, mut experts, mut ranks, mut alphas) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for Found { projection, rank, alpha } in found {
            // The name alone would also match dense and shared networks.
            let (expert, pattern) = match projection {
                0..3 => {
                    let name = moe.names.projections[*projection];
                    own.push(name);
                    // PEFT asks for `experts.gate_proj` when it looks for the parameter.
                    (format!(r"experts\.(?:\d+\.)?{name}"), format!(r"experts\.\d+\.{name}"))
                }
                _ => {
                    let path =
                        format!(r"{}\.{}", moe.names.shared.replace('.', r"\."), PACKED[projection - 3].0);
                    (path.clone(), path)
                }
            };
            experts.push(expert);
            ranks.push((pattern.clone(), *rank));
            alphas.push((pattern, *alpha));
        }
        let experts = format!(r".*\.(?:{})", experts.join("|"));
        // Packed experts are targeted by the names that dense and shared networks have too; where these have no tensors, the
        // names are not theirs.
        let is_elsewhere = |name: &&String| {
            let has = |tensor: &str| {
                tensor
                    .split_once(".lora_")
                    .is_some_and(|(path, _)| is_named(path, name) && !path.contains(".experts."))
            };
            !own.contains(&name.as_str()) || self.tensors.keys().any(|tensor| has(tensor))
        };
        let is_joined = |name: &str| joined.iter().any(|module| is_named(module, name));
        let names = names.iter().filter(|name| !is_joined(name)).filter(is_elsewhere);
        let names: Vec<String> = names.map(|name| name.replace('.', r"\.")).collect();
        let pattern = match names.is_empty() {
            true => experts,
            false => format!(r"(?:.*\.)?(?:{})|{experts}", names.join("|")),
        };
        self.config.targets = Targets::Pattern(pattern);
        let is_of_module = |pattern: &str| !pattern.contains("gate_up_proj");
        ranks.extend(self.config.rank_pattern.0.drain(..).filter(|(pattern, _)| is_of_module(pattern)));
        alphas.extend(self.config.alpha_pattern.0.drain(..).filter(|(pattern, _)| is_of_module(pattern)));
        (self.config.rank_pattern, self.config.alpha_pattern) = (Patterns(ranks), Patterns(alphas));
        Ok(())
    }
}
