//! OLMoE: q and k are normalised over all heads together; experts in every layer.

use super::fields::{Defaults, Fields};
use super::sparse::{Keys, place};
use crate::error::{Error, Result};
use crate::model::config::{DecoderConfig, MoeConfig, QkNorm};

pub(super) fn read(fields: &Fields<'_>) -> Result<DecoderConfig> {
    if let Some(value) = fields.get("clip_qkv") {
        return Err(Error::invalid(format!(
            "`clip_qkv` is {value}; clipped queries and keys are not supported"
        )));
    }
    let mut config =
        fields.decoder(&Defaults { max_position_embeddings: 4096, norm_eps: 1e-5, ..Defaults::default() })?;
    let attention_bias = fields.flag("attention_bias", false)?;
    for layer in &mut config.layers {
        layer.attention.qk_norm = Some(QkNorm::FullWidth);
        layer.attention.qkv_bias = attention_bias;
        layer.attention.output_bias = attention_bias;
    }
    let moe = fields.experts(&Keys {
        experts: ("num_experts", 64),
        active: 8,
        width: ("intermediate_size", 2048),
    })?;
    let moe = MoeConfig { renormalise: fields.flag("norm_topk_prob", false)?, ..moe };
    place(&mut config, &moe, |_| true);
    Ok(config)
}
