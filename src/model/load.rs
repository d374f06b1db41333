//! The parts of a layer, from the tensors that the configuration names.

use std::collections::BTreeMap;

use super::attention::Attention;
use super::block::Block;
use super::config::{AttentionConfig, DecoderConfig, FeedForwardConfig, LayerConfig, MoeConfig, Projection};
use super::feed_forward::FeedForward;
use super::linear::Linear;
use super::moe::{Experts, Moe, Shared};
use super::network::Network;
use super::norm::Norm;
use super::router::Router;
use super::rule::Rule;
use crate::error::{Context, Error, Result};
use crate::ops::attention::Heads;
use crate::ops::{Parameter, Weight};

/// Wraps `read` to refuse a tensor whose shape differs from the configuration's, because sizes of products follow from
/// that shape.
pub(super) fn in_shape(
    config: &DecoderConfig,
    mut read: impl FnMut(&str) -> Result<Weight>,
) -> impl FnMut(&str) -> Result<Weight> {
    let shapes: BTreeMap<String, Vec<usize>> = config.tensors().into_iter().collect();
    move |name| {
        let weight = read(name)?;
        let found = match &weight {
            Weight::Dense(parameter) => parameter.tensor().dims().to_vec(),
            Weight::Quantized(quantized) => <[usize; 2]>::from(quantized.dims()).to_vec(),
        };
        match shapes.get(name) {
            Some(expected) if *expected != found => {
                Err(Error::invalid(format!("has shape {found:?}, expected {expected:?}"))).in_tensor(name)
            }
            _ => Ok(weight),
        }
    }
}

/// Plain values: those of norms and biases.
pub(super) fn parameter(read: &mut impl FnMut(&str) -> Result<Weight>, name: &str) -> Result<Parameter> {
    match read(name)? {
        Weight::Dense(parameter) => Ok(parameter),
        Weight::Quantized(_) => {
            Err(Error::invalid("is quantized; norms and biases have plain values")).in_tensor(name)
        }
    }
}

pub(super) fn load_block(
    read: &mut impl FnMut(&str) -> Result<Weight>,
    config: &DecoderConfig,
    index: usize,
    layer: &LayerConfig,
) -> Result<Block> {
    let LayerConfig { attention: a, feed_forward } = layer;
    let path = format!("model.layers.{index}");
    let mut of_layer = |block: &str, projection: Projection, bias: bool| -> Result<Linear> {
        linear(read, format!("{path}.{block}.{}", projection.name()), bias)
    };
    let q = of_layer("self_attn", Projection::Q, a.qkv_bias)?;
    let k = of_layer("self_attn", Projection::K, a.qkv_bias)?;
    let v = of_layer("self_attn", Projection::V, a.qkv_bias)?;
    let o = of_layer("self_attn", Projection::O, a.output_bias)?;
    let feed_forward = match feed_forward {
        FeedForwardConfig::Dense { bias, activation, .. } => {
            let gate = of_layer("mlp", Projection::Gate, *bias)?;
            let up = of_layer("mlp", Projection::Up, *bias)?;
            let down = of_layer("mlp", Projection::Down, *bias)?;
            Network::Dense(Box::new(FeedForward { gate, up, down, activation: *activation }))
        }
        FeedForwardConfig::Sparse(moe) => Network::Sparse(Box::new(load_moe(read, index, moe)?)),
    };
    let mut norm = |name: &str| -> Result<Norm> {
        Ok(Norm { weight: parameter(read, &format!("{path}.{name}.weight"))?, eps: config.norm_eps })
    };
    let qk_norm = match a.qk_norm {
        Some(_) => Some((norm("self_attn.q_norm")?, norm("self_attn.k_norm")?)),
        None => None,
    };
    Ok(Block {
        input_norm: norm("input_layernorm")?,
        attention: Attention { q, k, v, o, qk_norm, heads: heads(a) },
        post_norm: norm("post_attention_layernorm")?,
        feed_forward,
        residual: config.multipliers.residual,
    })
}

fn load_moe(read: &mut impl FnMut(&str) -> Result<Weight>, layer: usize, config: &MoeConfig) -> Result<Moe> {
    let bias = match config.selection_bias {
        true => Some(parameter(read, &config.selection_bias_path(layer))?),
        false => None,
    };
    let router = Router {
        layer,
        linear: linear(read, config.router_path(layer), false)?,
        bias,
        rule: Rule::of(config),
        noise: None,
        unit: 1.0,
    };
    let mut experts = |projection| -> Result<Vec<Linear>> {
        let paths = (0..config.experts).map(|expert| config.expert_path(layer, expert, projection));
        paths.map(|path| linear(read, path, false)).collect()
    };
    let (gate, up, down) = (experts(0)?, experts(1)?, experts(2)?);
    let shared = match config.shared {
        None => None,
        Some(shared) => Some(Shared {
            network: FeedForward {
                gate: linear(read, config.shared_path(layer, 0), false)?,
                up: linear(read, config.shared_path(layer, 1), false)?,
                down: linear(read, config.shared_path(layer, 2), false)?,
                activation: config.activation,
            },
            gate: match shared.gated {
                true => Some(linear(read, config.shared_gate_path(layer), false)?),
                false => None,
            },
        }),
    };
    Ok(Moe { router, experts: Experts { gate, up, down, activation: config.activation }, shared })
}

fn linear(read: &mut impl FnMut(&str) -> Result<Weight>, path: String, bias: bool) -> Result<Linear> {
    let weight = read(&format!("{path}.weight"))?;
    let bias = if bias { Some(parameter(read, &format!("{path}.bias"))?) } else { None };
    Ok(Linear { path, weight, bias, low_rank: None })
}

fn heads(config: &AttentionConfig) -> Heads {
    Heads {
        num_heads: config.num_heads,
        num_kv_heads: config.num_kv_heads,
        head_dim: config.head_dim,
        window: config.window,
        scale: config.scale,
    }
}
