//! Granite with experts: multipliers on the residual stream, softmax over the chosen logits, experts stored in one
//! tensor; in the `shared` variant an expert for every token.

use super::fields::{Defaults, Fields, multiplier};
use super::sparse::{Keys, NAMES, place};
use crate::error::Result;
use crate::model::config::{
    Bundle, DecoderConfig, InPeft, MoeConfig, MoeNames, Multipliers, Scoring, SharedConfig,
};

const GRANITE_NAMES: MoeNames = MoeNames {
    router: "block_sparse_moe.router.layer",
    experts: "block_sparse_moe.experts",
    shared: "shared_mlp",
    packed: &[
        ("block_sparse_moe.input_linear.weight", Bundle::GateUp),
        ("block_sparse_moe.output_linear.weight", Bundle::Down),
        ("block_sparse_moe.experts.gate_up_proj", Bundle::GateUp),
        ("block_sparse_moe.experts.down_proj", Bundle::Down),
        ("block_sparse_moe.router.weight", Bundle::Router),
        ("shared_mlp.input_linear.weight", Bundle::SharedGateUp),
        ("shared_mlp.output_linear.weight", Bundle::SharedDown),
    ],
    in_peft: InPeft::Unknown,
    ..NAMES
};

pub(super) fn read(fields: &Fields<'_>, may_share: bool) -> Result<DecoderConfig> {
    let mut config = fields.decoder(&Defaults::default())?;
    let multiplier = |name: &str| Ok::<_, crate::Error>(multiplier(fields.get(name), name)?.unwrap_or(1.0));
    config.multipliers = Multipliers {
        embedding: multiplier("embedding_multiplier")?,
        residual: multiplier("residual_multiplier")?,
        logits: 1.0 / multiplier("logits_scaling")?,
    };
    let (bias, scale) = (fields.flag("attention_bias", false)?, multiplier("attention_multiplier")?);
    for layer in &mut config.layers {
        layer.attention.qkv_bias = bias;
        layer.attention.output_bias = bias;
        layer.attention.scale = scale;
    }
    let moe = fields.experts(&Keys {
        experts: ("num_local_experts", 8),
        active: 2,
        width: ("intermediate_size", 11_008),
    })?;
    let shared = if may_share { fields.index("shared_intermediate_size", 0)? } else { 0 };
    let moe = MoeConfig {
        scoring: Scoring::SoftmaxOfActive,
        shared: (shared > 0).then_some(SharedConfig { width: shared, gated: false }),
        names: GRANITE_NAMES,
        ..moe
    };
    place(&mut config, &moe, |_| true);
    Ok(config)
}
