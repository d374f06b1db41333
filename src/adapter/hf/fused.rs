//! Adapters that PEFT holds on the parameters of all experts of a layer (`target_parameters`), taken apart into one on each
//! expert's projections: the same mathematics.
//!
//! On a parameter `[experts, out, in]` PEFT 0.19.1 and later store `A [experts * rank, in]`, rows of an expert side by side,
//! and `B [out, experts * rank]`, where column `k * experts + e` is column `k` of expert `e`. `gate_up_proj` gives
//! gate and up an `A` in common and the halves of `B`. Of two parameters the first that the module declares,
//! `gate_up_proj`, is the inner one: `experts.base_layer.lora_A`; a single one is `experts.lora_A`.

use candle_core::Tensor;

use super::Adapter;
use crate::adapter::config::Targets;
use crate::adapter::lora::tensor_names;
use crate::adapter::patterns::Patterns;
use crate::adapter::target::alpha_at;
use crate::error::{Context, Error, Result};
use crate::model::config::{DecoderConfig, MoeConfig};

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

impl Adapter {
    /// The adapter with a pair of tensors for each expert of `model`, and routers by their names there, whatever its file has.
    pub fn for_model(mut self, model: &DecoderConfig) -> Result<Self> {
        let mut found: Vec<(Kind, usize, f64)> = Vec::new();
        for (layer, moe) in model.sparse_layers() {
            let theirs =
                moe.names.router_in_transformers().map(|name| format!("model.layers.{layer}.{name}"));
            if let Some(router) = theirs.and_then(|name| self.routers.remove(&name)) {
                self.routers.insert(format!("{}.weight", moe.router_path(layer)), router);
            }
            let own = format!("model.layers.{layer}.{}", moe.names.experts);
            // Transformers 5 calls all of them alike.
            for path in [own, format!("model.layers.{layer}.mlp.experts")] {
                for (kind, module) in self.modules(&path)? {
                    let (rank, alpha) = self.take_apart(layer, moe, kind, &module, &path).at(&self.source)?;
                    match found.iter().find(|(other, ..)| *other == kind) {
                        None => found.push((kind, rank, alpha)),
                        Some((_, r, a)) if (*r, *a) == (rank, alpha) => {}
                        Some((_, r, a)) => {
                            return Err(Error::invalid(format!(
                                "`{}` has rank {rank} and alpha {alpha} in layer {layer}, and {r} and {a} below",
                                kind.parameter()
                            )))
                            .at(&self.source);
                        }
                    }
                }
            }
        }
        let Some((_, moe)) = model.sparse_layers().next().filter(|_| !found.is_empty()) else {
            return Ok(self);
        };
        self.target(moe, &found)?;
        Ok(self)
    }

    /// The fused modules of a layer, and what each holds.
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

    /// Puts the tensors of each expert in place of the fused ones; gives their rank and alpha.
    fn take_apart(
        &mut self,
        layer: usize,
        moe: &MoeConfig,
        kind: Kind,
        module: &str,
        path: &str,
    ) -> Result<(usize, f64)> {
        let names = tensor_names(module);
        let missing = || Error::invalid("is missing");
        let a = self.tensors.remove(&names.a).ok_or_else(missing).in_tensor(&names.a)?;
        let b = self.tensors.remove(&names.b).ok_or_else(missing).in_tensor(&names.b)?;
        let (rows, columns) = (a.dim(0)?, b.dim(1)?);
        let rank = rows / moe.experts;
        let outputs = b.dim(0)?;
        let projections = kind.projections();
        if rows != columns || rank * moe.experts != rows || outputs % projections.len() != 0 {
            return Err(Error::invalid(format!(
                "has shape {:?} and its B {:?}, which is no adapter on {} experts",
                a.dims(),
                b.dims(),
                moe.experts
            )))
            .in_tensor(&names.a);
        }
        let all_a = a.reshape((moe.experts, rank, a.dim(1)?))?;
        let all_b = b.reshape((outputs, rank, moe.experts))?;
        let share = outputs / projections.len();
        for expert in 0..moe.experts {
            let a = all_a.get(expert)?.contiguous()?;
            let b = all_b.narrow(2, expert, 1)?.squeeze(2)?;
            for (i, projection) in projections.iter().enumerate() {
                let own = tensor_names(&moe.expert_path(layer, expert, *projection));
                let part: Tensor = b.narrow(0, i * share, share)?.contiguous()?;
                self.tensors.insert(own.a, a.copy()?);
                self.tensors.insert(own.b, part);
            }
        }
        let alpha = alpha_at(&self.config, &format!("{path}.{}", kind.parameter()))?;
        Ok((rank, alpha))
    }

    /// Says of the configuration what it is for each expert.
    fn target(&mut self, moe: &MoeConfig, found: &[(Kind, usize, f64)]) -> Result<()> {
        let Targets::Names(names) = &self.config.targets else {
            return Err(Error::invalid(
                "`target_modules` is a pattern beside `target_parameters`; expected a list of names",
            ))
            .at(&self.source);
        };
        let (mut own, mut ranks, mut alphas) = (Vec::new(), Vec::new(), Vec::new());
        for (kind, rank, alpha) in found {
            for projection in kind.projections() {
                let name = moe.names.projections[*projection];
                own.push(name);
                // Not the name alone, which dense and shared networks have too.
                let pattern = format!(r"experts\.\d+\.{name}");
                ranks.push((pattern.clone(), *rank));
                alphas.push((pattern, *alpha));
            }
        }
        // PEFT asks for `experts.gate_proj` when it looks for the parameter.
        let experts = format!(r".*\.experts\.(?:\d+\.)?(?:{})", own.join("|"));
        let names: Vec<String> = names.iter().map(|name| name.replace('.', r"\.")).collect();
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
