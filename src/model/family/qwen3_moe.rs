//! Qwen 3 with experts: q and k are normalised per head; no expert is shared; some layers may be dense.

use super::fields::{Defaults, Fields};
use super::sparse::{Keys, place};
use crate::error::Result;
use crate::model::config::{DecoderConfig, MoeConfig, QkNorm};

pub(super) fn read(fields: &Fields<'_>) -> Result<DecoderConfig> {
    let mut config = fields.decoder(&Defaults {
        num_kv_heads: Some(4),
        max_position_embeddings: 32_768,
        ..Defaults::default()
    })?;
    let attention_bias = fields.flag("attention_bias", false)?;
    let window = match fields.flag("use_sliding_window", false)? {
        true => fields.optional_count("sliding_window")?.or(Some(4096)),
        false => None,
    };
    for layer in &mut config.layers {
        layer.attention.qk_norm = Some(QkNorm::PerHead);
        layer.attention.qkv_bias = attention_bias;
        layer.attention.output_bias = attention_bias;
        layer.attention.window = window;
    }
    let moe = fields.experts(&Keys {
        experts: ("num_experts", 128),
        active: 8,
        width: ("moe_intermediate_size", 768),
    })?;
    let moe = MoeConfig { renormalise: fields.flag("norm_topk_prob", false)?, ..moe };
    place(&mut config, &moe, fields.sparse_by_step()?);
    Ok(config)
}
