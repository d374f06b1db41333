//! The mixture beside its rivals on text that nothing is fitted to: the dense model, static pruning to as many neurons, and
//! the mixture with an oracle router, which sees what each expert would give. Nothing is chosen by these losses: neurons are
//! pruned, and the oracle chooses, by the scores that the mixture is made with.

use candle_core::{DType, Tensor};
use serde::Serialize;

use super::load::Load;
use super::paired::{Difference, Loss};
use super::slices::{Choice, Slices, fixed_mask, masked, top};
use super::solve::values;
use super::statistics::{Observed, Scores, observe};
use super::windows::{Origin, Text, Windows};
use crate::error::Result;
use crate::model::{Decoder, FeedForward, Stream};
use crate::ops::{cross_entropy, matmul_f32, rows};

/// Losses on the same text, of which nothing was learned.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// Where the text comes from.
    pub origin: Origin,
    /// The name of its file, where it is one of `calibration.eval`.
    pub file: Option<String>,
    /// The number of windows whose text appears mostly in the text that was fitted to.
    pub repeated_windows: usize,
    /// Tokens predicted.
    pub tokens: usize,
    /// Tokens predicted in each window.
    pub window_tokens: Vec<usize>,
    /// The dense model.
    pub dense: Loss,
    /// Static pruning: the dense model with as many neurons as a token uses in the mixture, those of most energy.
    pub pruned: Option<Loss>,
    /// Static pruning with down projections that were fitted once more.
    pub pruned_refit: Option<Loss>,
    /// The mixture, where one is made.
    pub mixture: Option<Loss>,
    /// The mixture, each token sent to the experts whose slices have most energy on it.
    pub oracle: Option<Loss>,
    /// Mixture less static pruning.
    pub mixture_less_pruned: Option<Difference>,
    /// Mixture less static pruning, refitted.
    pub mixture_less_pruned_refit: Option<Difference>,
}

impl Comparison {
    /// Compares two models that were each run whole, from the window losses that [`losses`] returns.
    pub(super) fn of_whole(text: &Text, dense: Vec<f64>, mixture: Vec<f64>) -> Self {
        let tokens = predicted(&text.windows);
        Self {
            origin: text.origin,
            file: text.file.clone(),
            repeated_windows: text.repeated,
            tokens: tokens.iter().sum(),
            mixture: Some(Loss::of(mixture, &dense, &tokens)),
            dense: Loss::of(dense.clone(), &dense, &tokens),
            pruned: None,
            pruned_refit: None,
            oracle: None,
            mixture_less_pruned: None,
            mixture_less_pruned_refit: None,
            window_tokens: tokens,
        }
    }
}

/// Computes the loss of a model on each window of each text, and adds the choices of its routers to `load`.
pub(super) fn losses<'a>(
    model: &Decoder,
    texts: impl Iterator<Item = &'a Text>,
    load: &mut Load,
) -> Result<Vec<Vec<f64>>> {
    let of = |text: &Text| {
        let hidden = |batch: &Windows| {
            let output = model.forward(&batch.tokens, &batch.documents())?;
            load.add(&output.routing);
            Ok(output.hidden)
        };
        window_sums(model, text.windows.iter().map(hidden), &text.windows)
    };
    texts.map(of).collect()
}

/// Predicted tokens of each window.
fn predicted(windows: &[Windows]) -> Vec<usize> {
    let spans = windows.iter().flat_map(|batch| batch.offsets.windows(2));
    spans.map(|span| span[1] - span[0] - 1).collect()
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
    /// Calibration tokens that the router sends to each expert.
    pub calibration_load: Vec<usize>,
    /// Neurons with massive activations, which are always on.
    pub guarded: usize,
    /// The share of the error that the fit of the down projection left, on text it was not fitted to.
    pub refit_left: Option<f64>,
}

/// Selects the models that are compared with the dense one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Compared {
    /// A mixture.
    pub(super) mixture: bool,
    /// Whether static pruning is compared, and beside a mixture the same mixture with an oracle router.
    pub(super) pruned: bool,
    /// Whether static pruning has fitted down projections too.
    pub(super) refit: bool,
}

/// The streams that are compared.
pub(super) struct Rivals<'a> {
    text: &'a Text,
    dense: Vec<Stream>,
    mixture: Option<Vec<Stream>>,
    pruned: Option<Vec<Stream>>,
    pruned_refit: Option<Vec<Stream>>,
    oracle: Option<Vec<Stream>>,
}

impl<'a> Rivals<'a> {
    /// Begins the streams of the dense model, and of the models in `compared`, before the first layer.
    pub(super) fn new(model: &Decoder, text: &'a Text, compared: Compared) -> Result<Self> {
        let streams = text.windows.iter().map(|batch| model.begin_stream(&batch.tokens, batch.documents()));
        let dense: Vec<Stream> = streams.collect::<Result<_>>()?;
        let of = || dense.clone();
        Ok(Self {
            text,
            mixture: compared.mixture.then(of),
            pruned: compared.pruned.then(of),
            pruned_refit: (compared.pruned && compared.refit).then(of),
            oracle: (compared.pruned && compared.mixture).then(of),
            dense,
        })
    }

    /// Takes every stream through a layer that stays dense.
    pub(super) fn pass_dense(
        &mut self,
        model: &Decoder,
        layer: usize,
        network: &FeedForward,
        down: &Tensor,
    ) -> Result<()> {
        let Self { dense, mixture, pruned, pruned_refit, oracle, .. } = self;
        let rivals = [mixture, pruned, pruned_refit, oracle].into_iter().flatten();
        for streams in std::iter::once(dense).chain(rivals) {
            for (stream, windows) in streams.iter_mut().zip(&self.text.windows) {
                let seen = observe(model, layer, network, down, stream, windows)?;
                model.add_to_stream(layer, stream, &seen.y)?;
            }
        }
        Ok(())
    }

    /// Takes every stream through a converted layer. Reports the effect of its slices on the dense model's stream.
    pub(super) fn pass(
        &mut self,
        model: &Decoder,
        layer: usize,
        network: &FeedForward,
        (down, columns, scores): (&Tensor, &[f32], &Scores),
        slices: Option<&Slices>,
        (kept, pruned): (&[usize], &Tensor),
    ) -> Result<Option<LayerReport>> {
        let neurons = columns.len();
        let mut tally = slices.map(|slices| Tally::new(layer, slices));
        for (stream, windows) in self.dense.iter_mut().zip(&self.text.windows) {
            let seen = observe(model, layer, network, down, stream, windows)?;
            if let (Some(tally), Some(slices)) = (&mut tally, slices) {
                tally.add(&seen, slices, columns, scores)?;
            }
            model.add_to_stream(layer, stream, &seen.y)?;
        }
        let through = |streams: &mut [Stream],
                       down_of: &Tensor,
                       mask: &dyn Fn(&Observed) -> Result<Vec<f32>>|
         -> Result<()> {
            for (stream, windows) in streams.iter_mut().zip(&self.text.windows) {
                let seen = observe(model, layer, network, down, stream, windows)?;
                let (active, _) = masked(&seen.h, &mask(&seen)?)?;
                model.add_to_stream(layer, stream, &matmul_f32(&active, &down_of.t()?)?)?;
            }
            Ok(())
        };
        if let (Some(streams), Some(slices)) = (&mut self.mixture, slices) {
            let mask = |seen: &Observed| Ok(slices.mask(&slices.choose(&seen.x)?, neurons));
            through(streams, &slices.down, &mask)?;
        }
        let fixed = |seen: &Observed| fixed_mask(kept, &seen.h);
        for (streams, down_of) in [(&mut self.pruned, down), (&mut self.pruned_refit, pruned)] {
            if let Some(streams) = streams {
                through(streams, down_of, &fixed)?;
            }
        }
        if let (Some(streams), Some(slices)) = (&mut self.oracle, slices) {
            through(streams, &slices.down, &|seen| {
                let energies = values(&slices.energies(&seen.h, columns)?)?;
                let best = top(&energies, slices.experts.len(), slices.active);
                Ok(slices.mask(&Choice::even(best), neurons))
            })?;
        }
        Ok(tally.map(Tally::finish))
    }

    /// The loss of each.
    pub(super) fn finish(self, model: &Decoder) -> Result<Comparison> {
        let windows = &self.text.windows;
        let tokens = predicted(windows);
        let sums = |streams: &[Stream]| {
            window_sums(model, streams.iter().map(|stream| model.end_stream(stream)), windows)
        };
        let dense = sums(&self.dense)?;
        let of = |streams: &Vec<Stream>| -> Result<Loss> { Ok(Loss::of(sums(streams)?, &dense, &tokens)) };
        let mixture = self.mixture.as_ref().map(of).transpose()?;
        let pruned = self.pruned.as_ref().map(of).transpose()?;
        let pruned_refit = self.pruned_refit.as_ref().map(of).transpose()?;
        let less = |rival: &Option<Loss>| {
            let (mixture, rival) = (mixture.as_ref()?, rival.as_ref()?);
            Some(Difference::of(&mixture.window_sums, &rival.window_sums, &tokens))
        };
        Ok(Comparison {
            origin: self.text.origin,
            repeated_windows: self.text.repeated,
            file: self.text.file.clone(),
            tokens: tokens.iter().sum(),
            dense: of(&self.dense)?,
            mixture_less_pruned: less(&pruned),
            mixture_less_pruned_refit: less(&pruned_refit),
            pruned,
            pruned_refit,
            oracle: self.oracle.as_ref().map(of).transpose()?,
            mixture,
            window_tokens: tokens,
        })
    }
}

/// The loss of each window, summed over its predicted tokens, from the last hidden states of each batch.
fn window_sums(
    model: &Decoder,
    hidden: impl Iterator<Item = Result<Tensor>>,
    windows: &[Windows],
) -> Result<Vec<f64>> {
    let mut sums = Vec::new();
    for (hidden, windows) in hidden.zip(windows) {
        let (rows, targets) = windows.targets();
        let hidden = rows::gather(&hidden?, &rows)?;
        let nll = cross_entropy::evaluate(&hidden, model.head(), &targets)?;
        let mut rest = nll.as_slice();
        for span in windows.offsets.windows(2) {
            let (own, others) = rest.split_at(span[1] - span[0] - 1);
            sums.push(own.iter().map(|nll| f64::from(*nll)).sum());
            rest = others;
        }
    }
    Ok(sums)
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
        let choice = slices.choose(&seen.x)?;
        let (active, _) = masked(&seen.h, &slices.mask(&choice, columns.len()))?;
        let y = matmul_f32(&active, &slices.down.t()?)?;
        let errors: Vec<f32> = (y - &seen.y)?.sqr()?.sum(1)?.to_dtype(DType::F32)?.to_vec1()?;
        let energies = values(&slices.energies(&seen.h, columns)?)?;
        let experts = slices.experts.len();
        let best = top(&energies, experts, self.active);
        for token in scores.plain_tokens(seen) {
            let token = token as usize;
            let of = |chosen: &[u32]| chosen[token * self.active..][..self.active].to_vec();
            let (own, best) = (of(&choice.experts), of(&best));
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
            calibration_load: Vec::new(),
            guarded: 0,
            refit_left: None,
        }
    }
}
