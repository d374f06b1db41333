//! Qwen 2 and 2.5: q, k and v have a bias, o has none; the upper layers may have an attention window.

use super::fields::{Defaults, Fields};
use crate::error::Result;
use crate::model::config::DecoderConfig;

pub(super) fn read(fields: &Fields<'_>) -> Result<DecoderConfig> {
    let mut config = fields.decoder(&Defaults {
        num_kv_heads: Some(32),
        max_position_embeddings: 32_768,
        ..Defaults::default()
    })?;
    let windows = fields.windows(config.layers.len())?;
    for (layer, window) in config.layers.iter_mut().zip(windows) {
        layer.attention.qkv_bias = true;
        layer.attention.window = window;
    }
    Ok(config)
}
