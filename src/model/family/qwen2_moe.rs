//! Qwen 2 with experts: q, k and v have a bias; a shared expert is weighed by a sigmoid; some layers may be dense.

use super::fields::{Defaults, Fields};
use super::sparse::{Keys, NAMES, place};
use crate::error::Result;
use crate::model::config::{DecoderConfig, InPeft, MoeConfig, MoeNames, SharedConfig};

pub(super) fn read(fields: &Fields<'_>) -> Result<DecoderConfig> {
    let mut config = fields.decoder(&Defaults {
        num_kv_heads: Some(16),
        max_position_embeddings: 32_768,
        ..Defaults::default()
    })?;
    let qkv_bias = fields.flag("qkv_bias", true)?;
    let windows = if fields.get("layer_types").is_some() {
        fields.windows(config.layers.len())?
    } else {
        // Unlike in its dense sister, every other layer below `max_window_layers` slides.
        let slides = fields.flag("use_sliding_window", false)?;
        let (below, window) = (fields.index("max_window_layers", 28)?, fields.index("sliding_window", 4096)?);
        let of = |layer: usize| (slides && layer.is_multiple_of(2) && layer < below).then_some(window);
        (0..config.layers.len()).map(of).collect()
    };
    for (layer, window) in config.layers.iter_mut().zip(windows) {
        layer.attention.qkv_bias = qkv_bias;
        layer.attention.window = window;
    }
    let moe = fields.experts(&Keys {
        experts: ("num_experts", 60),
        active: 4,
        width: ("moe_intermediate_size", 1408),
    })?;
    let width = fields.optional_count("shared_expert_intermediate_size")?.unwrap_or(5632);
    let moe = MoeConfig {
        renormalise: fields.flag("norm_topk_prob", false)?,
        shared: Some(SharedConfig { width, gated: true }),
        names: MoeNames { in_peft: InPeft::TensorsTranslated, ..NAMES },
        ..moe
    };
    place(&mut config, &moe, fields.sparse_by_step()?);
    Ok(config)
}
