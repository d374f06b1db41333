//! Mistral: Llama without biases, with one attention window for all layers.

use super::fields::{Defaults, Fields};
use crate::error::Result;
use crate::model::config::DecoderConfig;

pub(super) fn read(fields: &Fields<'_>) -> Result<DecoderConfig> {
    let mut config = fields.decoder(&Defaults {
        num_kv_heads: Some(8),
        max_position_embeddings: 131_072,
        ..Defaults::default()
    })?;
    // A file that leaves the field out means its class's default, one with null means no window.
    let window =
        if fields.has("sliding_window") { fields.optional_count("sliding_window")? } else { Some(4096) };
    for layer in &mut config.layers {
        layer.attention.window = window;
    }
    Ok(config)
}
