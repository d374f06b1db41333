//! What was written, read back: is it the dense model with all experts on, and does it do what was measured?

use std::path::Path;

use candle_core::{DType, Device, Tensor};

use super::compare::Loss;
use super::report::{Guarantee, Report};
use super::settings::{Refit, Settings, SplitShape};
use super::windows::{Calibration, Windows};
use crate::data::Batch;
use crate::error::Result;
use crate::eval::evaluate;
use crate::model::config::{FeedForwardConfig, Scoring};
use crate::model::family::Layout;
use crate::model::{Decoder, DecoderConfig, Pretrained};
use crate::ops::{Parameter, Weight};

/// What rounding of f32 sums in another order comes to, as a share of the largest logit.
const ROUNDING: f64 = 1e-4;
/// What even but not equal weights of experts may change of the loss.
const EVEN: f64 = 5e-3;
/// What choices between experts of equal scores may change of the loss.
const TIES: f64 = 5e-3;
/// Tokens whose logits are compared.
const COMPARED: usize = 512;

/// Batches for [`evaluate`]: every token but the first of its window is predicted.
pub(super) fn batches(windows: &[Windows]) -> Vec<Batch> {
    let batch = |windows: &Windows| Batch {
        tokens: windows.tokens.clone(),
        supervised: windows.is_first().into_iter().map(|first| !first).collect(),
        offsets: windows.offsets.clone(),
        documents: (0..windows.offsets.len() as u64 - 1).collect(),
    };
    windows.iter().map(batch).collect()
}

/// The first windows, as many as logits are compared of.
fn first_windows(windows: &[Windows]) -> Windows {
    let first = &windows[0];
    let end = first.offsets.iter().rposition(|offset| *offset <= COMPARED).unwrap_or(1).max(1);
    Windows { tokens: first.tokens[..first.offsets[end]].to_vec(), offsets: first.offsets[..=end].to_vec() }
}

/// The largest difference of two models' logits, the largest logit, and the difference of their losses.
pub(super) fn differences(one: &Decoder, other: &Decoder, windows: &[Windows]) -> Result<(f64, f64, f64)> {
    let windows = first_windows(windows);
    let logits = |model: &Decoder| -> Result<Tensor> {
        model.logits(&model.forward(&windows.tokens, &windows.documents())?.hidden)
    };
    let (x, y) = (logits(one)?, logits(other)?);
    let largest = |tensor: &Tensor| -> Result<f64> {
        Ok(f64::from(tensor.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?))
    };
    let difference = largest(&(&x - &y)?)?;
    let batch = batches(std::slice::from_ref(&windows));
    let loss = evaluate(other, &batch)?.nll() - evaluate(one, &batch)?.nll();
    Ok((difference, largest(&x)?, loss))
}

/// Whether a difference of logits is one of rounding.
pub(super) fn is_rounding(difference: f64, largest: f64) -> bool {
    difference <= ROUNDING * (1.0 + largest)
}

/// Tokens to compare models on where there is no text.
pub(super) fn any_tokens(vocab: usize) -> Windows {
    let tokens = (0..64u64).map(|n| (n * n * 7919 + 13 * n) % vocab as u64).map(|id| id as u32).collect();
    Windows { tokens, offsets: vec![0, 64] }
}

/// A configuration with all experts on, each with its full weight.
fn all_on(config: &DecoderConfig, layout: &Layout) -> DecoderConfig {
    let mut config = config.clone();
    for layer in &mut config.layers {
        let FeedForwardConfig::Sparse(moe) = &mut layer.feed_forward else { continue };
        let sums_to_one = moe.renormalise || moe.scoring == Scoring::SoftmaxOfActive;
        if sums_to_one {
            moe.scale = moe.experts as f64 / layout.routed_scale;
        }
        moe.active = moe.experts;
    }
    config
}

/// Opens written weights in f32 under `config`, with routers of zeros if `even`.
fn open(written: &Pretrained, config: &DecoderConfig, even: bool) -> Result<Decoder> {
    let routers: Vec<String> =
        config.sparse_layers().map(|(layer, moe)| format!("{}.", moe.router_path(layer))).collect();
    Decoder::load(config, &Device::Cpu, |name| {
        let weight = written.weight(name, DType::F32, &Device::Cpu)?;
        match &weight {
            Weight::Dense(parameter) if even && routers.iter().any(|router| name.starts_with(router)) => {
                Ok(Weight::Dense(Parameter::new(name, &parameter.tensor().zeros_like()?)))
            }
            _ => Ok(weight),
        }
    })
}

/// The promises of a split, kept or not.
pub(super) fn split(
    base: &Pretrained,
    folder: &Path,
    shape: &SplitShape,
    layout: &Layout,
    settings: &Settings,
    calibration: &Calibration,
    report: &Report,
) -> Result<Vec<Guarantee>> {
    let written = Pretrained::open(&folder.to_string_lossy())?;
    written.check()?;
    let mut guarantees = Vec::new();
    if settings.refit == Refit::None {
        let dense = Decoder::open(base, DType::F32, &Device::Cpu)?;
        let config = all_on(written.config(), layout);
        // Scales that are no powers of two round narrow weights once more.
        let is_exact = base.compute_dtype() == DType::F32 || layout.routed_scale.log2().fract() == 0.0;
        let (difference, largest, loss) =
            differences(&dense, &open(&written, &config, true)?, &calibration.held_out)?;
        guarantees.push(Guarantee {
            what: format!("all {} experts on with equal weights is the dense model", shape.routed),
            promised: is_exact,
            holds: is_rounding(difference, largest),
            max_logit_difference: Some(difference),
            nll_difference: loss,
            largest_logit: Some(largest),
        });
        let (difference, largest, loss) =
            differences(&dense, &open(&written, &config, false)?, &calibration.held_out)?;
        guarantees.push(Guarantee {
            what: "the same with the router as it is stored".to_string(),
            promised: is_exact,
            holds: loss.abs() <= EVEN,
            max_logit_difference: Some(difference),
            nll_difference: loss,
            largest_logit: Some(largest),
        });
    }
    guarantees.push(read_back(&written, calibration, report.comparison.as_ref().map(|c| c.mixture))?);
    Ok(guarantees)
}

/// The promise that the files compute what was measured while they were made.
fn read_back(written: &Pretrained, calibration: &Calibration, measured: Option<Loss>) -> Result<Guarantee> {
    let model = open(written, written.config(), false)?;
    let nll = evaluate(&model, &batches(&calibration.held_out))?.nll();
    let loss = measured.map_or(0.0, |measured| nll - measured.nll);
    Ok(Guarantee {
        what: format!("read back, it predicts as measured (nll {nll:.4})"),
        promised: true,
        holds: nll.is_finite() && loss.abs() <= TIES,
        max_logit_difference: None,
        nll_difference: loss,
        largest_logit: None,
    })
}

/// The promise of a pruned model.
pub(super) fn pruned(folder: &Path, calibration: &Calibration, report: &Report) -> Result<Vec<Guarantee>> {
    let written = Pretrained::open(&folder.to_string_lossy())?;
    written.check()?;
    let measured = report.comparison.as_ref().map(|c| c.pruned_refit.unwrap_or(c.pruned));
    Ok(vec![read_back(&written, calibration, measured)?])
}
