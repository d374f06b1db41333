//! Checks of what was written, read back from disk: with all experts on it has to be the dense model, and its loss has to
//! be the one that was measured.
//!
//! One model is in memory at a time: of the dense one its logits on some tokens are kept.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};

use super::paired::Loss;
use super::report::Guarantee;
use super::settings::{Refit, SplitShape};
use super::windows::{Calibration, Text, Windows};
use crate::data::Batch;
use crate::error::Result;
use crate::eval::evaluate;
use crate::model::config::{FeedForwardConfig, Scoring};
use crate::model::family::Layout;
use crate::model::{Decoder, DecoderConfig, Pretrained};

/// Sums of f32 values in another order may change logits by this share of the largest one.
const ROUNDING: f64 = 4e-6;
/// The loss may change by this much because stored routers give experts nearly, not exactly, equal weights.
const EVEN: f64 = 5e-3;
/// The loss may change by this much where experts of nearly equal scores are chosen differently.
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

/// The first windows, as many as logits are compared of; where there is no text, any tokens of so many there are.
fn first_windows(text: &Text, vocab: usize) -> Windows {
    let Some(first) = text.windows.first() else {
        let tokens = (0..64u64).map(|n| (n * n * 7919 + 13 * n) % vocab as u64).map(|id| id as u32).collect();
        return Windows { tokens, offsets: vec![0, 64] };
    };
    let end = first.offsets.iter().rposition(|offset| *offset <= COMPARED).unwrap_or(1).max(1);
    Windows { tokens: first.tokens[..first.offsets[end]].to_vec(), offsets: first.offsets[..=end].to_vec() }
}

/// The results of a model on some tokens, with which another model is compared.
pub(super) struct Expected {
    windows: Windows,
    logits: Tensor,
    nll: f64,
}

/// The differences between the results of two models.
pub(super) struct Difference {
    /// The largest difference between two logits.
    logits: f64,
    /// The largest logit.
    largest: f64,
    /// The difference between the mean losses.
    nll: f64,
    /// Tokens that the losses are a mean of.
    tokens: usize,
}

impl Expected {
    /// Computes the results of a model on the first windows of `text`.
    pub(super) fn of(model: &Decoder, text: &Text) -> Result<Self> {
        let windows = first_windows(text, model.config().vocab_size);
        let logits = logits(model, &windows)?;
        let nll = evaluate(model, &batches(std::slice::from_ref(&windows)))?.nll();
        Ok(Self { windows, logits, nll })
    }

    /// Measures how far the results of `model` are from these.
    pub(super) fn compare(&self, model: &Decoder) -> Result<Difference> {
        let largest = |tensor: &Tensor| -> Result<f64> {
            Ok(f64::from(tensor.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?))
        };
        let nll = evaluate(model, &batches(std::slice::from_ref(&self.windows)))?.nll() - self.nll;
        let difference = (logits(model, &self.windows)? - &self.logits)?;
        let tokens = self.windows.tokens.len();
        Ok(Difference { logits: largest(&difference)?, largest: largest(&self.logits)?, nll, tokens })
    }
}

fn logits(model: &Decoder, windows: &Windows) -> Result<Tensor> {
    model.logits(&model.forward(&windows.tokens, &windows.documents())?.hidden)
}

impl Difference {
    /// Whether rounding explains the difference. Rounding errors have either sign, so the mean loss over `n` tokens may differ
    /// by the root of `n` less than a single logit.
    pub(super) fn is_rounding(&self) -> bool {
        let most = ROUNDING * (1.0 + self.largest);
        self.logits <= most && self.nll.abs() <= most / (self.tokens.max(1) as f64).sqrt()
    }

    /// Reports the difference as a promise, and whether it `holds`.
    pub(super) fn guarantee(&self, what: String, promised: bool, holds: bool) -> Guarantee {
        Guarantee {
            what,
            promised,
            holds,
            max_logit_difference: Some(self.logits),
            largest_logit: Some(self.largest),
            nll_difference: self.nll,
        }
    }
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

/// Opens the written model and checks that all tensors of its configuration are there.
pub(super) fn reopened(folder: &Path) -> Result<Pretrained> {
    let written = Pretrained::open(&folder.to_string_lossy())?;
    written.check()?;
    Ok(written)
}

/// Whether weights of `base`, times `scale`, are written without rounding: one that is no power of two rounds narrow ones.
pub(super) fn is_exact(base: &Pretrained, scale: f64) -> bool {
    let stored = base.compute_dtype();
    base.fits(stored) && (stored == DType::F32 || scale.log2().fract() == 0.0)
}

/// Opens written weights in f32 under `config`.
pub(super) fn open(written: &Pretrained, config: &DecoderConfig) -> Result<Decoder> {
    Decoder::load(config, &Device::Cpu, |name| written.weight(name, DType::F32, &Device::Cpu))
}

/// The promises about slices of the dense model, before any of them is fitted once more: all of them on, it is that model.
pub(super) fn split(
    base: &Pretrained,
    folder: &Path,
    shape: &SplitShape,
    layout: &Layout,
    refit: Refit,
    calibration: &Calibration,
) -> Result<Vec<Guarantee>> {
    let written = reopened(folder)?;
    let expected = Expected::of(&Decoder::open(base, DType::F32, &Device::Cpu)?, &calibration.held_out)?;
    let is_exact = is_exact(base, layout.routed_scale);
    let mut mixture = open(&written, &all_on(written.config(), layout))?;
    let stored = expected.compare(&mixture)?;
    let hidden = written.config().hidden_size;
    let zeros = written.config().sparse_layers().map(|(layer, moe)| {
        let zeros = Tensor::zeros((moe.experts, hidden), DType::F32, &Device::Cpu)?;
        Ok((format!("{}.weight", moe.router_path(layer)), zeros))
    });
    mixture.set_routers(&zeros.collect::<Result<BTreeMap<_, _>>>()?)?;
    let even = expected.compare(&mixture)?;
    let when = if refit == Refit::None { "" } else { " before down projections are fitted" };
    let what = format!("with all {} experts on and equal weights it is the dense model{when}", shape.routed);
    let nearly =
        format!("with all {} experts on and the stored router it is nearly the dense model", shape.routed);
    let (is_rounding, is_even) = (even.is_rounding(), stored.nll.abs() <= EVEN);
    Ok(vec![even.guarantee(what, is_exact, is_rounding), stored.guarantee(nearly, is_exact, is_even)])
}

/// The promise that the files compute what was `measured` in `dtype` while they were made; activations that were rounded then
/// promise nothing.
pub(super) fn read_back(
    folder: &Path,
    calibration: &Calibration,
    dtype: DType,
    measured: Option<&Loss>,
) -> Result<Guarantee> {
    let written = reopened(folder)?;
    let model = open(&written, written.config())?;
    let nll = evaluate(&model, &batches(&calibration.held_out.windows))?.nll();
    let loss = measured.map_or(0.0, |measured| nll - measured.nll);
    Ok(Guarantee {
        what: format!("read back from disk, it predicts as was measured before (nll {nll:.4})"),
        promised: dtype == DType::F32,
        holds: nll.is_finite() && loss.abs() <= TIES,
        max_logit_difference: None,
        nll_difference: loss,
        largest_logit: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_told_from_faults() {
        // SmolLM2-135M in eight slices, by AVX2 and by the portable path.
        for (logits, nll) in [(9.5e-5, -8.3e-7), (1.16e-4, 1.84e-6)] {
            assert!(Difference { logits, largest: 38.8, nll, tokens: 512 }.is_rounding(), "{logits} {nll}");
        }
        // Another router, another weight, and a loss that drifts while each logit is near.
        for (logits, nll) in [(1.5e-1, -1.1e-3), (1e-3, 1e-6), (1e-4, 2e-5)] {
            assert!(!Difference { logits, largest: 38.8, nll, tokens: 512 }.is_rounding(), "{logits} {nll}");
        }
    }
}
