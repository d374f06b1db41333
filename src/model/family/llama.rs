//! Llama: plain pre-norm decoder, biases by configuration.

use super::fields::{Defaults, Fields};
use crate::error::Result;
use crate::model::config::{DecoderConfig, FeedForwardConfig};

pub(super) fn read(fields: &Fields<'_>) -> Result<DecoderConfig> {
    let mut config = fields.decoder(&Defaults::default())?;
    let attention_bias = fields.flag("attention_bias", false)?;
    let mlp_bias = fields.flag("mlp_bias", false)?;
    for layer in &mut config.layers {
        layer.attention.qkv_bias = attention_bias;
        layer.attention.output_bias = attention_bias;
        if let FeedForwardConfig::Dense { bias, .. } = &mut layer.feed_forward {
            *bias = mlp_bias;
        }
    }
    Ok(config)
}
