//! A dense model cut into slices, layer by layer: one walk in which the text goes through the dense model, through the
//! mixture as far as it is made, and, held out, through everything that is compared with it.

use candle_core::{DType, Tensor};

use super::compare::{Compared, LayerReport, Rivals};
use super::gradient::Importance;
use super::partition::{Grounds, partition};
use super::refit::Walk;
use super::router::{Sight, exponent, router};
use super::settings::{Partition, Refit, Settings, SplitShape};
use super::slices::{Routing, Slices, fixed_mask, routed};
use super::solve::values;
use super::statistics::{Evidence, Moments, Observed, Scores, column_norms, network, observe, plain_values};
use super::windows::{Calibration, Sample, Windows};
use super::{Comparison, Event, Watch};
use crate::error::{Context, Error, Result};
use crate::model::{Decoder, FeedForward, Stream};

/// Tokens whose neurons are kept in memory: neurons are shared out by them, and routers fitted to them.
const SAMPLE: usize = 65_536;
/// Of these the tokens that down projections are fitted to.
const REFIT_SAMPLE: usize = 32_768;
/// The memory that these neurons may take; their energies take as much again while a layer is cut.
const SAMPLE_BYTES: usize = 1 << 30;

/// A model, cut.
pub(super) struct Split {
    /// The slices of each layer; `None` for layers that stay dense or are pruned.
    pub(super) layers: Vec<Option<Slices>>,
    /// For each layer the neurons that static pruning keeps, and their down projection.
    pub(super) kept: Vec<Option<(Vec<usize>, Tensor)>>,
    /// Each converted layer, on held-out text.
    pub(super) reports: Vec<LayerReport>,
    /// All that is compared, on each text.
    pub(super) comparisons: Vec<Comparison>,
}

/// Cuts `model`. `routing`: how the mixture that is written chooses, where one is; `stored`: the type of written weights.
pub(super) fn split(
    model: &Decoder,
    shape: &SplitShape,
    settings: &Settings,
    calibration: &Calibration,
    (routing, stored): (Option<Routing>, DType),
    watch: &mut Watch<'_>,
) -> Result<Split> {
    let most = SAMPLE.min(SAMPLE_BYTES / (4 * shape.neurons.max(1)));
    let sample = Sample::of(&calibration.fitted, most);
    let refit_sample = sample.part(&calibration.fitted, REFIT_SAMPLE);
    let begin = |windows: &[Windows]| -> Result<Vec<Stream>> {
        windows.iter().map(|batch| model.begin_stream(&batch.tokens, batch.documents())).collect()
    };
    let mut dense = begin(&calibration.fitted)?;
    let refit = settings.refit != Refit::None;
    let is_mixture = routing.is_some();
    // A pruned model is what is asked for, or what the mixture has to be better than.
    let compared = Compared { mixture: is_mixture, pruned: settings.baselines || !is_mixture, refit };
    let refitted = |there: bool| -> Vec<Stream> {
        refit_sample.batches().filter(|_| there && refit).map(|batch| dense[batch].clone()).collect()
    };
    let (mut mixture, mut pruned_streams) = (refitted(compared.mixture), refitted(compared.pruned));
    let begin_rivals = |text| Rivals::new(model, text, compared);
    let mut rivals: Vec<Rivals<'_>> = calibration.texts().map(begin_rivals).collect::<Result<_>>()?;
    let importance = match is_mixture && settings.partition.takes_gradients() {
        true => Some(Importance::of(model, shape, &calibration.fitted, settings.seed, watch)?),
        false => None,
    };
    let count = model.config().layers.len();
    let mut split =
        Split { layers: Vec::new(), kept: Vec::new(), reports: Vec::new(), comparisons: Vec::new() };
    for layer in 0..count {
        let network = network(model, layer)?;
        let down = plain_values(&network.down.weight)?;
        let columns = column_norms(&down)?;
        let is_dense = shape.dense[layer];

        // The dense model: what there is to be cut.
        let mut moments = Moments::new(shape.neurons);
        let mut observed = Vec::new();
        for (index, (stream, windows)) in dense.iter_mut().zip(&calibration.fitted).enumerate() {
            let seen = observe(model, layer, network, &down, stream, windows)?;
            model.add_to_stream(layer, stream, &seen.y)?;
            if !is_dense {
                moments.add(&seen)?;
                if index < sample.judged.end {
                    observed.push(seen);
                }
            }
        }
        if is_dense {
            for streams in [&mut mixture, &mut pruned_streams] {
                for (stream, batch) in streams.iter_mut().zip(refit_sample.batches()) {
                    let windows = &calibration.fitted[batch];
                    let seen = observe(model, layer, network, &down, stream, windows)?;
                    model.add_to_stream(layer, stream, &seen.y)?;
                }
            }
            for rivals in &mut rivals {
                rivals.pass_dense(model, layer, network, &down)?;
            }
            split.layers.push(None);
            split.kept.push(None);
            watch(Event::Layer { done: layer + 1, layers: count })?;
            continue;
        }
        let scores = moments.finish(&columns);
        let (fitted, judged) = (&observed[sample.fitted.clone()], &observed[sample.judged.clone()]);
        let cut = Cut {
            network,
            down: &down,
            columns: &columns,
            scores: &scores,
            importance: importance.as_ref(),
            fitted,
            judged,
        };
        let made = routing.map(|routing| cut.slices(layer, shape, settings, routing));
        let mut slices = made.transpose()?;
        let kept = scores.ranked()[..shape.active_width()].to_vec();
        let load =
            slices.as_ref().map(|slices| slices.load(observed.iter().map(|seen| &seen.x))).transpose()?;
        drop(observed);

        let goal = (settings.refit == Refit::Stream).then_some(dense.as_slice());
        let text = calibration.fitted.as_slice();
        let sample = &refit_sample;
        let walk = Walk { model, layer, network, down: &down, scores: &scores, goal, text, sample, stored };
        let mut left = None;
        if let Some(slices) = slices.as_mut().filter(|_| refit) {
            let all: Vec<usize> = (0..columns.len()).collect();
            let mask = |seen: &Observed| Ok(slices.mask(&slices.choose(&seen.x)?, columns.len()));
            let fitted = walk.refit(&mask, &all, &mut mixture)?;
            (slices.down, left) = (fitted.down, fitted.left);
        }
        let pruned = match refit && compared.pruned {
            true => walk.refit(&|seen| fixed_mask(&kept, &seen.h), &kept, &mut pruned_streams)?.down,
            false => down.clone(),
        };
        let mut reports = Vec::new();
        for rivals in &mut rivals {
            let sight = (&down, columns.as_slice(), &scores);
            let kept = (kept.as_slice(), &pruned);
            reports.push(rivals.pass(model, layer, network, sight, slices.as_ref(), kept)?);
        }
        // Layers are reported on the held-out text, which comes first.
        split.reports.extend(reports.into_iter().next().flatten().map(|report| LayerReport {
            refit_left: left,
            calibration_load: load.unwrap_or_default(),
            guarded: scores.guarded.iter().filter(|guarded| **guarded).count().min(shape.shared_width()),
            ..report
        }));
        split.layers.push(slices);
        split.kept.push(Some((kept, pruned)));
        watch(Event::Layer { done: layer + 1, layers: count })?;
    }
    split.comparisons = rivals.into_iter().map(|rivals| rivals.finish(model)).collect::<Result<_>>()?;
    Ok(split)
}

/// All that is needed to cut one layer.
struct Cut<'a> {
    network: &'a FeedForward,
    down: &'a Tensor,
    columns: &'a [f32],
    scores: &'a Scores,
    importance: Option<&'a Importance>,
    fitted: &'a [Observed],
    /// The batches that nothing is fitted to; there are none if the text is a single batch.
    judged: &'a [Observed],
}

impl Cut<'_> {
    /// Shared neurons, experts and router.
    fn slices(
        &self,
        layer: usize,
        shape: &SplitShape,
        settings: &Settings,
        routing: Routing,
    ) -> Result<Slices> {
        let mut shared = self.by_right_to_be_shared(layer, shape, settings)?;
        shared.truncate(shape.shared_width().min(shape.neurons));
        // Where slices do not divide the network, the shared ones may need neurons of zeros already.
        let missing = shape.shared_width() - shared.len();
        shared.extend((shape.neurons..).take(missing));
        shared.sort_unstable();
        let rest = routed(shape, &shared);
        let evened = settings.partition == Partition::Alternating;
        let evidence = |batches| Evidence::of(batches, self.scores, self.columns, &rest, evened);
        let fitted = evidence(self.fitted)?;
        let chosen_by = evidence(if self.judged.is_empty() { self.fitted } else { self.judged })?;
        let gates = self.gates(&rest)?;
        let importance = match self.importance {
            Some(importance) => importance.of_neurons(layer, &rest)?,
            None => None,
        };
        let seed = [settings.seed, layer as u64];
        let (experts, active, with_bias) = (shape.routed, shape.active, routing.with_bias);
        let grounds = Grounds {
            fitted: &fitted,
            chosen_by: &chosen_by,
            gates: &gates,
            importance: importance.as_ref(),
            experts,
            active,
            with_bias,
            seed,
        };
        let experts_of = partition(settings.partition, &grounds)?;
        let sight = Sight {
            evidence: &fitted,
            experts_of: &experts_of,
            gates: &gates,
            experts,
            active,
            with_bias,
            seed,
        };
        let router = router(settings.router, &sight)?;
        let power = if fitted.energy.dim(0)? == 0 { 0 } else { exponent(&router, &fitted.x)? };
        let mut members = vec![Vec::new(); experts];
        rest.iter().zip(&experts_of).for_each(|(neuron, expert)| members[*expert].push(*neuron));
        Ok(Slices { shared, experts: members, router, power, routing, down: self.down.clone(), active })
    }

    /// The neurons in the order in which they are shared.
    fn by_right_to_be_shared(
        &self,
        layer: usize,
        shape: &SplitShape,
        settings: &Settings,
    ) -> Result<Vec<usize>> {
        let most_shared = match (settings.partition, self.importance) {
            (Partition::GradientSharing, Some(importance)) => {
                importance.most_shared(layer, shape.active_width())?
            }
            _ => None,
        };
        let Some(mut ranked) = most_shared else { return Ok(self.scores.ranked()) };
        // Massive neurons are always on, whatever else is.
        ranked.sort_by_key(|neuron| !self.scores.guarded[*neuron]);
        Ok(ranked)
    }

    /// The gate rows of some neurons, `[neurons, hidden]`; zeros where there is no such neuron.
    fn gates(&self, neurons: &[usize]) -> Result<Tensor> {
        let gate = plain_values(&self.network.gate.weight)?;
        let padded = gate.pad_with_zeros(0, 0, 1)?;
        let last = gate.dim(0)?;
        let rows: Vec<u32> = neurons.iter().map(|neuron| (*neuron).min(last) as u32).collect();
        Ok(padded.index_select(&Tensor::new(rows, gate.device())?, 0)?)
    }
}

/// Whether all weights of a layer are finite, so that nothing wrong is written.
pub(super) fn refuse_infinite(slices: &Slices, layer: usize) -> Result<()> {
    let finite = |values: &[f32]| values.iter().all(|value| value.is_finite());
    if finite(&slices.router.weight) && finite(&slices.router.bias) && finite(&values(&slices.down)?) {
        return Ok(());
    }
    Err(Error::invalid("the fit of this layer gave numbers that are not finite"))
        .in_tensor(&format!("model.layers.{layer}.mlp"))
        .map_err(|error| error.with_hint("give more, or more varied, calibration text"))
}
