//! GLM 4 with experts: sigmoid scores and a bias that only the choice sees, shared experts without a gate, dense first
//! layers, part of each head rotated.

use super::fields::{Defaults, Fields, multiplier};
use super::sparse::{Keys, NAMES, place};
use crate::error::{Error, Result};
use crate::model::config::{DecoderConfig, MoeConfig, MoeNames, QkNorm, Scoring, SharedConfig};

const GLM_NAMES: MoeNames = MoeNames { shared: "mlp.shared_experts", ..NAMES };

pub(super) fn read(fields: &Fields<'_>) -> Result<DecoderConfig> {
    let mut config = fields.decoder(&Defaults {
        num_kv_heads: Some(8),
        max_position_embeddings: 131_072,
        norm_eps: 1e-5,
        rotary_share: Some(0.5),
        ..Defaults::default()
    })?;
    for name in ["n_group", "topk_group"] {
        if let Some(groups) = fields.optional_count(name)?.filter(|groups| *groups != 1) {
            return Err(Error::invalid(format!(
                "`{name}` is {groups}; only one group of experts is supported"
            )));
        }
    }
    let (bias, norms) = (fields.flag("attention_bias", false)?, fields.flag("use_qk_norm", false)?);
    for layer in &mut config.layers {
        layer.attention.qkv_bias = bias;
        layer.attention.qk_norm = norms.then_some(QkNorm::PerHead);
    }
    let moe = fields.experts(&Keys {
        experts: ("n_routed_experts", 128),
        active: 8,
        width: ("moe_intermediate_size", 1408),
    })?;
    let shared = fields.index("n_shared_experts", 1)?;
    let moe = MoeConfig {
        scoring: Scoring::Sigmoid,
        renormalise: fields.flag("norm_topk_prob", true)?,
        scale: multiplier(fields.get("routed_scaling_factor"), "routed_scaling_factor")?.unwrap_or(1.0),
        selection_bias: true,
        shared: (shared > 0).then_some(SharedConfig { width: shared * moe.width, gated: false }),
        names: GLM_NAMES,
        ..moe
    };
    let dense = fields.index("first_k_dense_replace", 1)?;
    place(&mut config, &moe, |layer| layer >= dense);
    config.spare_layers = fields.index("num_nextn_predict_layers", 1)?;
    Ok(config)
}
