//! The first values of an adapter, the same for the same seed whatever else is adapted, and those that PyTorch draws.
//!
//! Each tensor has a generator of its own, seeded with `seed + 65536 * layer + offset`:
//!
//! | | up | gate | down | q | k | v | o | head |
//! |---|---|---|---|---|---|---|---|---|
//! | A | 1 | 3 | 5 | 7 | 9 | 11 | 13 | 15 |
//! | B | 2 | 4 | 6 | 8 | 10 | 12 | 14 | 16 |
//!
//! In a mixture of experts, expert `e` adds `32 * (e + 1)` to these; the router has 17 and 18, the gate of the shared expert 19
//! and 20, and the shared expert's up, gate and down what is above, plus 20. The head counts as part of layer 0. Biases of B begin at zero.

use std::collections::BTreeMap;

use candle_core::{Device, Tensor};

use super::config::{Init, LoraConfig};
use super::lora::tensor_names;
use super::target::Placement;
use super::torch_random::Generator;
use crate::error::{Context, Result};
use crate::model::config::{DecoderConfig, FeedForwardConfig, LinearConfig, Projection, Site};
use crate::ops::Activation;

const LAYER_STRIDE: u64 = 1 << 16;

/// First values for every placement, by the name of the tensor, in f32 on `device`.
pub fn fresh(
    config: &LoraConfig,
    placements: &[Placement],
    model: &DecoderConfig,
    device: &Device,
) -> Result<BTreeMap<String, Tensor>> {
    let mut tensors = BTreeMap::new();
    for placement in placements {
        let linear = &placement.linear;
        let (inputs, outputs, rank) = (linear.in_features, linear.out_features, placement.rank);
        let seed = seed_of(config.seed, linear);
        let (a, b) = match config.init {
            Init::Nju => nju_pair(gate_of(model, linear.layer), inputs, outputs, rank, seed),
            init => (draw_a(init, inputs, rank, seed.wrapping_add(1)), vec![0.0; outputs * rank]),
        };
        let names = tensor_names(&linear.path);
        tensors.insert(names.a.clone(), Tensor::from_vec(a, (rank, inputs), device).in_tensor(&names.a)?);
        tensors.insert(names.b.clone(), Tensor::from_vec(b, (outputs, rank), device).in_tensor(&names.b)?);
        if config.lora_bias {
            let bias = Tensor::from_vec(vec![0.0_f32; outputs], outputs, device).in_tensor(&names.bias)?;
            tensors.insert(names.bias, bias);
        }
    }
    Ok(tensors)
}

/// The seed of a layer's pair: A is drawn with the next seed, B with the one after.
#[must_use]
pub fn seed_of(seed: u64, linear: &LinearConfig) -> u64 {
    let offset = match linear.projection {
        Projection::Up => 0,
        Projection::Gate => 2,
        Projection::Down => 4,
        Projection::Q => 6,
        Projection::K => 8,
        Projection::V => 10,
        Projection::O => 12,
        Projection::Head => 14,
        Projection::Router => 16,
        Projection::SharedGate => 18,
    };
    let of_site = match linear.site {
        Site::Expert(expert) => 32 * (expert as u64 + 1),
        Site::Shared if linear.projection != Projection::SharedGate => 20,
        Site::Shared | Site::Router | Site::Dense => 0,
    };
    let layer = linear.layer.unwrap_or(0) as u64;
    seed.wrapping_add(layer.wrapping_mul(LAYER_STRIDE)).wrapping_add(offset + of_site)
}

/// The `nju` values of `A [rank, in]` (seed + 1) and `B [out, rank]` (seed + 2), row-major.
///
/// Both are uniform, and drawn as their transposes: `A^T [in, rank]` and `B^T [rank, out]` are what that course stores.
#[must_use]
pub fn nju_pair(
    activation: Activation,
    inputs: usize,
    outputs: usize,
    rank: usize,
    seed: u64,
) -> (Vec<f32>, Vec<f32>) {
    let draw = |fan_in: usize, fan_out: usize, seed: u64| {
        let deviation = if uses_xavier(activation) { xavier(fan_in, fan_out) } else { kaiming(0.0, fan_in) };
        let stored = uniform(fan_in * fan_out, deviation, seed);
        transpose(&stored, fan_in, fan_out)
    };
    (draw(inputs, rank, seed.wrapping_add(1)), draw(rank, outputs, seed.wrapping_add(2)))
}

/// Whether a layer with this gate begins with Xavier values, and not with Kaiming ones.
#[must_use]
pub fn uses_xavier(activation: Activation) -> bool {
    matches!(activation, Activation::Sigmoid | Activation::Identity)
}

/// `A [rank, in]`, row-major, of every initialisation that leaves B zero.
fn draw_a(init: Init, inputs: usize, rank: usize, seed: u64) -> Vec<f32> {
    let count = rank * inputs;
    match init {
        Init::Peft => uniform(count, kaiming(5.0_f64.sqrt(), inputs), seed),
        Init::KaimingUniform => uniform(count, kaiming(0.0, inputs), seed),
        Init::KaimingNormal => normal(count, kaiming(0.0, inputs), seed),
        Init::XavierUniform | Init::Nju => uniform(count, xavier(inputs, rank), seed),
        Init::XavierNormal => normal(count, xavier(inputs, rank), seed),
        Init::Gaussian => normal(count, 1.0 / rank as f64, seed),
    }
}

/// He et al. (2015); `slope` is that of a leaky ReLU. Computed in PyTorch's order, for the same last bit.
fn kaiming(slope: f64, fan_in: usize) -> f64 {
    (2.0 / (1.0 + slope.powi(2))).sqrt() / (fan_in as f64).sqrt()
}

/// Glorot and Bengio (2010).
fn xavier(fan_in: usize, fan_out: usize) -> f64 {
    (2.0 / (fan_in + fan_out) as f64).sqrt()
}

fn uniform(count: usize, deviation: f64, seed: u64) -> Vec<f32> {
    let bound = 3.0_f64.sqrt() * deviation;
    let mut values = vec![0.0; count];
    Generator::new(seed).uniform(&mut values, -bound as f32, bound as f32);
    values
}

fn normal(count: usize, deviation: f64, seed: u64) -> Vec<f32> {
    let mut values = vec![0.0; count];
    Generator::new(seed).normal(&mut values, 0.0, deviation);
    values
}

fn transpose(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|column| (0..rows).map(move |row| values[row * columns + column])).collect()
}

/// Returns the activation of the feed-forward network in the layer of a linear. For the head it is that of the first layer.
fn gate_of(model: &DecoderConfig, layer: Option<usize>) -> Activation {
    model.layers.get(layer.unwrap_or(0)).map_or(Activation::Silu, |layer| match &layer.feed_forward {
        FeedForwardConfig::Dense { activation, .. } => *activation,
        FeedForwardConfig::Sparse(moe) => moe.activation,
    })
}
