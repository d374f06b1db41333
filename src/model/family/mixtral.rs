//! Mixtral: Mistral's attention, experts in every layer whose chosen scores sum to one.

use super::fields::{Defaults, Fields};
use super::sparse::{Keys, NAMES, place};
use crate::error::Result;
use crate::model::config::{Bundle, DecoderConfig, MoeConfig, MoeNames};

const MIXTRAL_NAMES: MoeNames = MoeNames {
    router: "block_sparse_moe.gate",
    experts: "block_sparse_moe.experts",
    projections: ["w1", "w3", "w2"],
    packed: &[
        ("mlp.experts.gate_up_proj", Bundle::GateUp),
        ("mlp.experts.down_proj", Bundle::Down),
        ("mlp.gate.weight", Bundle::Router),
    ],
    ..NAMES
};

pub(super) fn read(fields: &Fields<'_>) -> Result<DecoderConfig> {
    let mut config = fields.decoder(&Defaults {
        num_kv_heads: Some(8),
        max_position_embeddings: 131_072,
        norm_eps: 1e-5,
        theta: 1_000_000.0,
        ..Defaults::default()
    })?;
    let window = fields.optional_count("sliding_window")?;
    for layer in &mut config.layers {
        layer.attention.window = window;
    }
    let moe = fields.experts(&Keys {
        experts: ("num_local_experts", 8),
        active: 2,
        width: ("intermediate_size", 14_336),
    })?;
    place(&mut config, &MoeConfig { renormalise: true, names: MIXTRAL_NAMES, ..moe }, |_| true);
    Ok(config)
}
