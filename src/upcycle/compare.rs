//! The mixture beside its rivals on held-out text: the dense model, static pruning to as many neurons, and the mixture with
//! a router that knows what each expert would give.

use candle_core::{DType, Tensor};
use serde::Serialize;

use super::slices::{Slices, masked, top};
use super::solve::values;
use super::statistics::{Observed, Scores, observe};
use super::windows::Windows;
use crate::error::{Error, Result};
use crate::model::{Decoder, FeedForward, Stream};
use crate::ops::{cross_entropy, matmul_f32};

/// The mean loss of a model on held-out text.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Loss {
    /// Natural-log loss per predicted token.
    pub nll: f64,
    /// Its exponential.
    pub perplexity: f64,
}

/// Losses on the same held-out tokens.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// Tokens predicted.
    pub tokens: usize,
    /// The dense model.
    pub dense: Loss,
    /// As many neurons as are active, the same for every token.
    pub pruned: Loss,
    /// The same, its down projections fitted once more.
    pub pruned_refit: Option<Loss>,
    /// The mixture.
    pub mixture: Loss,
    /// The mixture, each token sent to the experts that give it most.
    pub oracle: Loss,
}

/// One converted layer on held-out text of the dense model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerReport {
    /// The layer.
    pub layer: usize,
    /// `|mixture - dense|^2 / |dense|^2`, without tokens of massive activations.
    pub relative_error: f64,
    /// The energy of the chosen experts, as a share of the best choice's.
    pub recall: f64,
    /// The share of chosen experts that the best choice has too.
    pub hit_rate: f64,
    /// The share of tokens that each expert gets; an even load is `active / experts`.
    pub load: Vec<f64>,
    /// Deviation of the load divided by its mean.
    pub load_variation: f64,
    /// Neurons with massive activations, which are always on.
    pub guarded: usize,
    /// The share of the error that the fit of the down projection left, on text it was not fitted to.
    pub refit_left: Option<f64>,
}

/// The streams that are compared.
pub(super) struct Rivals<'a> {
    windows: &'a [Windows],
    dense: Vec<Stream>,
    pruned: Vec<Stream>,
    pruned_refit: Option<Vec<Stream>>,
    mixture: Vec<Stream>,
    oracle: Vec<Stream>,
}

impl<'a> Rivals<'a> {
    pub(super) fn new(model: &Decoder, windows: &'a [Windows], refit: bool) -> Result<Self> {
        let streams = windows.iter().map(|batch| model.begin_stream(&batch.tokens, batch.documents()));
        let dense: Vec<Stream> = streams.collect::<Result<_>>()?;
        let of = || dense.clone();
        Ok(Self { windows, pruned: of(), pruned_refit: refit.then(of), mixture: of(), oracle: of(), dense })
    }

    /// A layer that stays dense for all.
    pub(super) fn pass_dense(
        &mut self,
        model: &Decoder,
        layer: usize,
        network: &FeedForward,
        down: &Tensor,
    ) -> Result<()> {
        let all = [&mut self.dense, &mut self.pruned, &mut self.mixture, &mut self.oracle];
        for streams in all.into_iter().chain(&mut self.pruned_refit) {
            for (stream, windows) in streams.iter_mut().zip(self.windows) {
                let seen = observe(model, layer, network, down, stream, windows)?;
                model.add_to_stream(layer, stream, &seen.y)?;
            }
        }
        Ok(())
    }

    /// A layer that was converted; gives what it does to the dense model's stream.
    pub(super) fn pass(
        &mut self,
        model: &Decoder,
        layer: usize,
        network: &FeedForward,
        (down, columns, scores): (&Tensor, &[f32], &Scores),
        slices: &Slices,
        (kept, pruned): (&[usize], &Tensor),
    ) -> Result<LayerReport> {
        let neurons = columns.len();
        let mut tally = Tally::new(layer, slices);
        for (stream, windows) in self.dense.iter_mut().zip(self.windows) {
            let seen = observe(model, layer, network, down, stream, windows)?;
            tally.add(&seen, slices, columns, scores)?;
            model.add_to_stream(layer, stream, &seen.y)?;
        }
        let through = |streams: &mut [Stream],
                       down_of: &Tensor,
                       mask: &dyn Fn(&Observed) -> Result<Vec<f32>>|
         -> Result<()> {
            for (stream, windows) in streams.iter_mut().zip(self.windows) {
                let seen = observe(model, layer, network, down, stream, windows)?;
                let (active, _) = masked(&seen.h, &mask(&seen)?)?;
                model.add_to_stream(layer, stream, &matmul_f32(&active, &down_of.t()?)?)?;
            }
            Ok(())
        };
        let mut fixed = vec![0f32; neurons];
        kept.iter().for_each(|neuron| fixed[*neuron] = 1.0);
        let fixed = |seen: &Observed| Ok(fixed.repeat(seen.norms.len()));
        through(&mut self.pruned, down, &fixed)?;
        if let Some(streams) = &mut self.pruned_refit {
            through(streams, pruned, &fixed)?;
        }
        through(&mut self.mixture, &slices.down, &|seen| Ok(slices.mask(&slices.choose(&seen.x)?, neurons)))?;
        through(&mut self.oracle, &slices.down, &|seen| {
            let energies = values(&slices.energies(&seen.h, columns)?)?;
            Ok(slices.mask(&top(&energies, slices.experts.len(), slices.active), neurons))
        })?;
        Ok(tally.finish())
    }

    /// The loss of each.
    pub(super) fn finish(self, model: &Decoder) -> Result<Comparison> {
        let of = |streams: &[Stream]| loss(model, streams, self.windows);
        let tokens = self.windows.iter().map(|batch| batch.targets().1.len()).sum();
        let pruned_refit = self.pruned_refit.as_deref().map(of).transpose()?;
        Ok(Comparison {
            tokens,
            dense: of(&self.dense)?,
            pruned: of(&self.pruned)?,
            pruned_refit,
            mixture: of(&self.mixture)?,
            oracle: of(&self.oracle)?,
        })
    }
}

fn loss(model: &Decoder, streams: &[Stream], windows: &[Windows]) -> Result<Loss> {
    let (mut sum, mut tokens) = (0.0, 0);
    for (stream, windows) in streams.iter().zip(windows) {
        let (rows, targets) = windows.targets();
        let hidden = model.end_stream(stream)?.index_select(&Tensor::new(rows, model.device())?, 0)?;
        let nll = cross_entropy::evaluate(&hidden, model.head(), &targets)?;
        sum += nll.iter().map(|nll| f64::from(*nll)).sum::<f64>();
        tokens += targets.len();
    }
    if tokens == 0 {
        return Err(Error::invalid("the held-out text has no token to predict"));
    }
    Ok(Loss::of(sum / tokens as f64))
}

impl Loss {
    pub(super) fn of(nll: f64) -> Self {
        Self { nll, perplexity: nll.exp() }
    }
}

/// Sums over the held-out text of one layer.
struct Tally {
    layer: usize,
    error: f64,
    dense: f64,
    captured: f64,
    best: f64,
    hits: usize,
    load: Vec<usize>,
    tokens: usize,
    active: usize,
}

impl Tally {
    fn new(layer: usize, slices: &Slices) -> Self {
        let load = vec![0; slices.experts.len()];
        let active = slices.active;
        Self { layer, error: 0.0, dense: 0.0, captured: 0.0, best: 0.0, hits: 0, load, tokens: 0, active }
    }

    fn add(&mut self, seen: &Observed, slices: &Slices, columns: &[f32], scores: &Scores) -> Result<()> {
        let chosen = slices.choose(&seen.x)?;
        let (active, _) = masked(&seen.h, &slices.mask(&chosen, columns.len()))?;
        let y = matmul_f32(&active, &slices.down.t()?)?;
        let errors: Vec<f32> = (y - &seen.y)?.sqr()?.sum(1)?.to_dtype(DType::F32)?.to_vec1()?;
        let energies = values(&slices.energies(&seen.h, columns)?)?;
        let experts = slices.experts.len();
        let best = top(&energies, experts, self.active);
        for token in scores.plain_tokens(seen) {
            let token = token as usize;
            let of = |chosen: &[u32]| chosen[token * self.active..][..self.active].to_vec();
            let (own, best) = (of(&chosen), of(&best));
            let energy = |chosen: &[u32]| -> f64 {
                chosen.iter().map(|expert| f64::from(energies[token * experts + *expert as usize])).sum()
            };
            self.error += f64::from(errors[token]);
            self.dense += f64::from(seen.norms[token]).powi(2);
            self.captured += energy(&own);
            self.best += energy(&best);
            self.hits += own.iter().filter(|expert| best.contains(expert)).count();
            own.iter().for_each(|expert| self.load[*expert as usize] += 1);
            self.tokens += 1;
        }
        Ok(())
    }

    fn finish(self) -> LayerReport {
        let share = |part: f64, whole: f64| if whole > 0.0 { part / whole } else { 1.0 };
        let tokens = self.tokens as f64;
        let load: Vec<f64> = self.load.iter().map(|count| share(*count as f64, tokens)).collect();
        let mean = load.iter().sum::<f64>() / load.len() as f64;
        let variance = load.iter().map(|load| (load - mean).powi(2)).sum::<f64>() / load.len() as f64;
        LayerReport {
            layer: self.layer,
            relative_error: share(self.error, self.dense),
            recall: share(self.captured, self.best),
            hit_rate: share(self.hits as f64, tokens * self.active as f64),
            load_variation: share(variance.sqrt(), mean),
            load,
            guarded: 0,
            refit_left: None,
        }
    }
}
