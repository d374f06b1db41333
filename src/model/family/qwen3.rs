//! Qwen 3, dense: q and k are normalised per head, the head's width is a field of its own.

use super::fields::{Defaults, Fields};
use crate::error::Result;
use crate::model::config::{DecoderConfig, QkNorm};

pub(super) fn read(fields: &Fields<'_>) -> Result<DecoderConfig> {
    let mut config = fields.decoder(&Defaults {
        num_kv_heads: Some(32),
        head_dim: Some(128),
        max_position_embeddings: 32_768,
        ..Defaults::default()
    })?;
    let windows = fields.windows(config.layers.len())?;
    let attention_bias = fields.flag("attention_bias", false)?;
    for (layer, window) in config.layers.iter_mut().zip(windows) {
        layer.attention.qk_norm = Some(QkNorm::PerHead);
        layer.attention.qkv_bias = attention_bias;
        layer.attention.output_bias = attention_bias;
        layer.attention.window = window;
    }
    Ok(config)
}
