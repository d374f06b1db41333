//! What the sparse families share: numbers of experts that fit each other, and which layers have any.

use std::collections::BTreeSet;

use super::fields::{Fields, wrong};
use crate::error::{Error, Result};
use crate::model::config::{
    Bundle, DecoderConfig, EVEN_EXPONENT, FeedForwardConfig, InPeft, MoeConfig, MoeNames, RoutingVariant,
    Scoring,
};

/// How many experts a token goes to, in every family.
pub(in crate::model) const ACTIVE: &str = "num_experts_per_tok";

/// Names of Qwen's kind, which most families have taken over.
pub(super) const NAMES: MoeNames = MoeNames {
    router: "mlp.gate",
    experts: "mlp.experts",
    projections: ["gate_proj", "up_proj", "down_proj"],
    shared: "mlp.shared_expert",
    shared_gate: "mlp.shared_expert_gate",
    packed: &[("mlp.experts.gate_up_proj", Bundle::GateUp), ("mlp.experts.down_proj", Bundle::Down)],
    in_peft: InPeft::Translated,
};

/// The fields that differ in name from family to family, and what their classes have where a file says nothing.
pub(super) struct Keys {
    pub(super) experts: (&'static str, usize),
    pub(super) active: usize,
    pub(super) width: (&'static str, usize),
}

impl Fields<'_> {
    /// Experts with softmax before the choice, not renormalised, none shared.
    pub(super) fn experts(&self, keys: &Keys) -> Result<MoeConfig> {
        let count =
            |(name, default): (&str, usize)| Ok::<_, Error>(self.optional_count(name)?.unwrap_or(default));
        // Two names of one field; the newer class writes either.
        let (key, experts) = match self.optional_count("num_local_experts")? {
            Some(experts) if !self.has(keys.experts.0) => ("num_local_experts", experts),
            _ => (keys.experts.0, count(keys.experts)?),
        };
        self.capacity.refuse_experts(key, experts)?;
        let active = count((ACTIVE, keys.active))?;
        if active > experts {
            return Err(Error::invalid(format!(
                "`{ACTIVE}` must be at most the {experts} experts there are, found {active}"
            )));
        }
        Ok(MoeConfig {
            experts,
            active,
            width: count(keys.width)?,
            activation: self.activation()?,
            scoring: Scoring::Softmax,
            renormalise: false,
            scale: 1.0,
            selection_bias: false,
            shared: None,
            router_exponent: 0,
            names: NAMES,
            variant: RoutingVariant::default(),
        })
    }

    /// Which layers have experts, as Qwen's families say it: every `decoder_sparse_step`-th, but none of
    /// `mlp_only_layers`.
    pub(super) fn sparse_by_step(&self) -> Result<impl Fn(usize) -> bool + use<>> {
        let step = self.optional_count("decoder_sparse_step")?.unwrap_or(1);
        let mut dense = BTreeSet::new();
        if let Some(value) = self.get("mlp_only_layers") {
            let layer = |value: &serde_json::Value| value.as_u64().and_then(|n| usize::try_from(n).ok());
            let layers =
                value.as_array().and_then(|list| list.iter().map(layer).collect::<Option<BTreeSet<_>>>());
            dense = layers.ok_or_else(|| wrong("mlp_only_layers", "a list of layer numbers", value))?;
        }
        Ok(move |layer: usize| !dense.contains(&layer) && (layer + 1).is_multiple_of(step))
    }
}

/// Reads which of an upcycled model's routers are stored times a power of two. These powers made logits of one deviation of
/// what energies they had been fitted to, so that the deviation, and not the power, says what a step of training is to be.
pub(super) fn read_exponents(fields: &Fields<'_>, config: &mut DecoderConfig) -> Result<()> {
    const NAME: &str = "router_exponents";

    let Some(value) = fields.get("upcycled").and_then(|note| note.get(NAME)) else { return Ok(()) };
    let exponents = value
        .as_array()
        .and_then(|list| list.iter().map(serde_json::Value::as_i64).collect::<Option<Vec<_>>>());
    let Some(exponents) = exponents.filter(|list| list.len() == config.layers.len()) else {
        let expected = format!("a list of {} whole numbers", config.layers.len());
        return Err(wrong(NAME, &expected, value));
    };
    for (layer, power) in config.layers.iter_mut().zip(exponents) {
        if let FeedForwardConfig::Sparse(moe) = &mut layer.feed_forward {
            moe.router_exponent = if power == 0 { 0 } else { EVEN_EXPONENT };
        }
    }
    Ok(())
}

/// Puts experts into the layers that have them.
pub(super) fn place(config: &mut DecoderConfig, moe: &MoeConfig, is_sparse: impl Fn(usize) -> bool) {
    for (index, layer) in config.layers.iter_mut().enumerate() {
        if is_sparse(index) {
            layer.feed_forward = FeedForwardConfig::Sparse(Box::new(moe.clone()));
        }
    }
}
