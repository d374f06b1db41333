//! Experts that begin as copies of the network. Their weights sum to one, so the model stays what it is, however many
//! are active, until training tells them apart.
//!
//! - `copy`: whole copies (Komatsuzaki et al., Sparse Upcycling, 2023).
//! - `drop`: of each copy a share of the neurons is drawn anew, gate, up and down together, normal with the mean and the
//!   deviation of their matrix (Nakamura et al., Drop-Upcycling, 2025).
//! - `virtual-groups`: copies cut into slices with one router row a copy, so that whole copies are chosen at first (He et
//!   al. 2024). A slice has the share `1 / groups` of its copy's weight, so down projections are multiplied by `groups`.
//! - `mix`: the networks of several checkpoints; all else is the first one's.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use rand_distr::{Distribution, StandardNormal};
use serde_json::json;

use super::compare::{Comparison, losses};
use super::export::{self, Layer, Sink};
use super::load::{Load, idle, idle_warning};
use super::report::{Guarantee, NEEDLESS, Report, Untied};
use super::settings::{Method, RouterKind, Settings, choose_format, dense_network};
use super::solve::{matrix, values};
use super::statistics::network;
use super::windows::{Origin, Text};
use super::{Event, Job, Watch, verify};
use crate::data::{generator, shuffle};
use crate::error::{Error, Result};
use crate::model::family::{self, MixtureFormat, MixtureShape};
use crate::model::{Decoder, Pretrained, Stream};
use crate::ops::{Documents, Pass};

/// The deviation of a router that begins at random.
const ROUTER_DEVIATION: f32 = 0.02;

/// What follows where a router that was made without text sends nothing to an expert, and what to do.
const UNTRAINED: &str = "so they learn nothing until training sends them some; choose another `seed` or `upcycle.router`, or \
balance the load with `losses.switch`";

/// Writes a mixture of copies.
pub(super) fn copy(
    job: &Job<'_>,
    settings: &Settings,
    folder: &Path,
    watch: &mut Watch<'_>,
) -> Result<Report> {
    let begun = std::time::Instant::now();
    let base = job.base;
    let shape = shape(base, job.sources, settings)?;
    let groups = if settings.method == Method::VirtualGroups { settings.groups } else { 1 };
    let copies = shape.experts / groups;
    let format = choose_format(settings.format, base.config(), &shape)?;
    let layout = format.layout(base.config_json(), base.config(), &shape)?;
    let stored = base.compute_dtype();
    let Routers { rows: routers, idle } = Routers::of(job, settings, copies, &shape)?;
    let config = family::read(&layout.config)?;
    let mut sink = Sink::new(base, &config, format == MixtureFormat::GraniteMoeShared, stored, folder)?;
    for (layer, moe) in config.sparse_layers() {
        for copy in 0..copies {
            let from = if copy == 0 { base } else { job.sources.get(copy - 1).unwrap_or(base) };
            let mut source = Layer::read(from, layer, stored, None)?;
            if settings.method == Method::Drop {
                source.redraw(settings.drop_ratio, [settings.seed, layer as u64, copy as u64])?;
            }
            for group in 0..groups {
                let own: Vec<usize> = (group * shape.width..(group + 1) * shape.width).collect();
                for projection in 0..3 {
                    let name =
                        format!("{}.weight", moe.expert_path(layer, copy * groups + group, projection));
                    sink.write(&name, &source.slice(projection, &own, groups as f64)?)?;
                }
            }
        }
        // All slices of a copy have its row, so that they are chosen together.
        let hidden = config.hidden_size;
        let rows = routers[layer].chunks_exact(hidden).flat_map(|row| row.repeat(groups)).collect();
        sink.write(&format!("{}.weight", moe.router_path(layer)), &matrix(rows, hidden)?)?;
        if moe.selection_bias {
            let bias = Tensor::zeros(shape.experts, DType::F32, &Device::Cpu)?;
            sink.write(&moe.selection_bias_path(layer), &bias)?;
        }
        watch(Event::Layer { done: layer + 1, layers: config.layers.len() })?;
    }
    sink.finish(|name| export::is_of_mixture(&config, name))?;
    export::write_config(folder, &layout.config, stored, json!({}))?;
    base.write_companions(folder)?;
    let mut report = Report::of_copies(base, settings, &shape, format);
    report.untied = Untied::of(base, &config);
    report.warnings.extend(idle_warning(&idle, "the windows of calibration text", NEEDLESS));
    report.seconds = begun.elapsed().as_secs_f64();
    if settings.verify {
        watch(Event::note("reading back and measuring"))?;
        let load;
        (report.guarantees, report.comparisons, load) = measure(job, settings, folder, groups)?;
        // Routers that were made from windows of text are judged by these.
        if settings.router != RouterKind::HiddenKmeans {
            let text = format!("{} tokens of the built-in neutral text", load.tokens());
            report.warnings.extend(idle_warning(&load.idle(), &text, UNTRAINED));
        }
    }
    Ok(report)
}

/// The sizes of the mixture; an error where copies cannot be made as `settings` say.
pub(super) fn shape(base: &Pretrained, sources: &[Pretrained], settings: &Settings) -> Result<MixtureShape> {
    let (neurons, _) = dense_network(base.config())?;
    refuse_unfit(base, sources, settings, neurons)?;
    let groups = if settings.method == Method::VirtualGroups { settings.groups.max(1) } else { 1 };
    let copies = if settings.method == Method::Mix { sources.len() + 1 } else { settings.experts };
    Ok(MixtureShape {
        experts: copies * groups,
        active: settings.active * groups,
        width: neurons / groups,
        shared: 0,
        averaged: true,
        dense: settings.dense_layers(base.config().layers.len())?,
    })
}

fn refuse_unfit(
    base: &Pretrained,
    sources: &[Pretrained],
    settings: &Settings,
    neurons: usize,
) -> Result<()> {
    if settings.method == Method::VirtualGroups && !neurons.is_multiple_of(settings.groups) {
        return Err(Error::request(format!(
            "`upcycle.groups` is {}, which does not divide the {neurons} neurons of a network",
            settings.groups
        ))
        .with_hint("a copy is cut into `upcycle.groups` parts of one size"));
    }
    for source in sources {
        source.check()?;
        if source.config() != base.config() {
            return Err(Error::request(format!(
                "the `config.json` of `{}` describes another model than that of `{}`",
                source.name(),
                base.name()
            ))
            .with_hint("`mix` takes fine-tunes of one model"));
        }
    }
    if matches!(settings.router, RouterKind::Ridge | RouterKind::Logistic | RouterKind::GateMean) {
        return Err(Error::request(
            "`upcycle.router`: this one tells slices of one network apart, and the experts here are copies of whole networks",
        )
        .with_hint("`upcycle.router` of copies is `random`, `zero`, `hidden-kmeans` or `prompts`"));
    }
    Ok(())
}

/// The routers of a mixture of copies.
struct Routers {
    /// The rows of each layer, `[copies * hidden]`.
    rows: Vec<Vec<f32>>,
    /// Layers and experts to which no window of the text belongs. It is empty for routers that are made without text.
    idle: Vec<(usize, usize)>,
}

impl Routers {
    fn of(job: &Job<'_>, settings: &Settings, copies: usize, shape: &MixtureShape) -> Result<Self> {
        let hidden = job.base.config().hidden_size;
        let random = |layer: usize| -> Vec<f32> {
            let mut chance = generator("upcycle/router", &[settings.seed, layer as u64]);
            let mut draw = || -> f32 { StandardNormal.sample(&mut chance) };
            (0..copies * hidden).map(|_| ROUTER_DEVIATION * draw()).collect()
        };
        let layers = shape.dense.len();
        let mut empty = Vec::new();
        let rows = match settings.router {
            RouterKind::Zero => vec![vec![0.0; copies * hidden]; layers],
            RouterKind::Prompts => {
                if job.prompts.len() != copies {
                    return Err(Error::request(format!(
                        "`upcycle.prompts` has {} lists, and there are {copies} experts",
                        job.prompts.len()
                    )));
                }
                let batches: Vec<Vec<&Vec<u32>>> =
                    job.prompts.iter().map(|prompts| prompts.iter().collect()).collect();
                from_inputs(job, &batches, |means, layer| {
                    refuse_alike(&means, hidden, layer)?;
                    Ok(directions(means, hidden))
                })?
            }
            RouterKind::HiddenKmeans => {
                let windows: Vec<Vec<u32>> = job
                    .calibration
                    .fitted
                    .iter()
                    .flat_map(|batch| {
                        batch.offsets.windows(2).map(|span| batch.tokens[span[0]..span[1]].to_vec())
                    })
                    .collect();
                job.calibration.refuse_fewer_windows(copies)?;
                let batches: Vec<Vec<&Vec<u32>>> = windows.iter().map(|window| vec![window]).collect();
                from_inputs(job, &batches, |means, layer| {
                    let (centres, counts) = clusters(means, hidden, copies, [settings.seed, layer as u64]);
                    empty.extend(idle([(layer, counts.as_slice())].into_iter()));
                    Ok(centres)
                })?
            }
            _ => (0..layers).map(random).collect(),
        };
        empty.retain(|(layer, _)| !shape.dense[*layer]);
        Ok(Self { rows, idle: empty })
    }
}

/// Refuses prompts of two experts that have the same mean state, because no router could tell the experts apart.
fn refuse_alike(means: &[f32], width: usize, layer: usize) -> Result<()> {
    /// The distance of equal states, as a share of their length: sums in another order differ by rounding.
    const ROUNDING: f32 = 1e-4;

    let rows: Vec<&[f32]> = means.chunks_exact(width).collect();
    for (expert, row) in rows.iter().enumerate() {
        let length = row.iter().map(|x| x * x).sum::<f32>();
        let is_near = |other: &&[f32]| {
            let distance: f32 = row.iter().zip(other.iter()).map(|(x, y)| (x - y).powi(2)).sum();
            distance <= ROUNDING.powi(2) * length
        };
        if let Some(same) = rows[..expert].iter().position(is_near) {
            return Err(Error::request(format!(
                "`upcycle.prompts[{same}]` and `upcycle.prompts[{expert}]` have the same mean state in layer {layer}: \
                 the router could not tell their experts apart"
            ))
            .with_hint("give each expert prompts of the kind of text that it is for"));
        }
    }
    Ok(())
}

/// Routers from the mean input of the feed-forward network over each batch of documents.
fn from_inputs(
    job: &Job<'_>,
    batches: &[Vec<&Vec<u32>>],
    mut make: impl FnMut(Vec<f32>, usize) -> Result<Vec<f32>>,
) -> Result<Vec<Vec<f32>>> {
    let model = Decoder::open(job.base, job.dtype, &Device::Cpu)?;
    let begin = |documents: &Vec<&Vec<u32>>| -> Result<Stream> {
        let tokens: Vec<u32> = documents.iter().flat_map(|document| document.iter().copied()).collect();
        let mut offsets = vec![0];
        documents.iter().for_each(|document| offsets.push(offsets[offsets.len() - 1] + document.len()));
        model.begin_stream(&tokens, Documents::new(offsets, (0..documents.len() as u64).collect()))
    };
    let mut streams: Vec<Stream> = batches.iter().map(begin).collect::<Result<_>>()?;
    let mut routers = Vec::new();
    for layer in 0..model.config().layers.len() {
        let mut means = Vec::new();
        for stream in &mut streams {
            let x = model.attend(layer, stream)?;
            means.extend(values(&x.to_dtype(DType::F32)?.mean_keepdim(0)?)?);
            let (y, _) = network(&model, layer)?.forward(&x, &Pass::inference(stream.documents()))?;
            model.add_to_stream(layer, stream, &y)?;
        }
        routers.push(make(means, layer)?);
    }
    Ok(routers)
}

/// Takes the mean row's direction out of all rows and scales them to length one. Every input lies along the mean, so that a
/// row with a part of it would get all tokens.
fn directions(mut rows: Vec<f32>, width: usize) -> Vec<f32> {
    let count = (rows.len() / width) as f32;
    let mut mean = vec![0f32; width];
    rows.chunks_exact(width).for_each(|row| mean.iter_mut().zip(row).for_each(|(m, x)| *m += x / count));
    let square = mean.iter().map(|m| m * m).sum::<f32>().max(f32::MIN_POSITIVE);
    for row in rows.chunks_exact_mut(width) {
        let along = row.iter().zip(&mean).map(|(x, m)| x * m).sum::<f32>() / square;
        row.iter_mut().zip(&mean).for_each(|(x, mean)| *x -= along * mean);
        let norm = row.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-12);
        row.iter_mut().for_each(|x| *x /= norm);
    }
    rows
}

/// The centres of spherical k-means, `[count * width]`, and how many rows are nearest to each.
fn clusters(rows: Vec<f32>, width: usize, count: usize, seed: [u64; 2]) -> (Vec<f32>, Vec<usize>) {
    let rows = directions(rows, width);
    let mut order: Vec<usize> = (0..rows.len() / width).collect();
    shuffle(&mut order, &mut generator("upcycle/inputs", &seed));
    let row = |at: usize| &rows[at * width..][..width];
    let mut centres: Vec<f32> = (0..count).flat_map(|n| row(order[n % order.len()]).to_vec()).collect();
    let mut counts = vec![0; count];
    for _ in 0..20 {
        let mut sums = vec![0f32; centres.len()];
        counts.fill(0);
        for own in rows.chunks_exact(width) {
            let nearness = |centre: &[f32]| centre.iter().zip(own).map(|(c, x)| c * x).sum::<f32>();
            let best = centres.chunks_exact(width).map(nearness).enumerate();
            let best = best.reduce(|best, next| if next.1 > best.1 { next } else { best }).map_or(0, |b| b.0);
            counts[best] += 1;
            sums[best * width..][..width].iter_mut().zip(own).for_each(|(sum, x)| *sum += x);
        }
        for (centre, sum) in centres.chunks_exact_mut(width).zip(sums.chunks_exact(width)) {
            let norm = sum.iter().map(|x| x * x).sum::<f32>().sqrt();
            if norm > 0.0 {
                centre.iter_mut().zip(sum).for_each(|(c, x)| *c = x / norm);
            }
        }
    }
    (centres, counts)
}

impl Layer {
    /// Draws a share of the neurons anew, normal with the mean and the deviation of each projection.
    pub(super) fn redraw(&mut self, share: f64, seed: [u64; 3]) -> Result<()> {
        let mut chance = generator("upcycle/drop", &seed);
        let neurons = self.projections[0].dim(0)?;
        let mut order: Vec<usize> = (0..neurons).collect();
        shuffle(&mut order, &mut chance);
        order.truncate((share * neurons as f64).round() as usize);
        for (projection, tensor) in self.projections.iter_mut().enumerate() {
            let shape = tensor.dims2()?;
            let mut all = values(tensor)?;
            let mean = all.iter().map(|x| f64::from(*x)).sum::<f64>() / all.len() as f64;
            let variance = all.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>() / all.len() as f64;
            let mut draw = || -> f32 {
                let normal: f64 = StandardNormal.sample(&mut chance);
                (mean + variance.sqrt() * normal) as f32
            };
            for neuron in &order {
                match projection {
                    2 => (0..shape.0).for_each(|row| all[row * shape.1 + neuron] = draw()),
                    _ => all[neuron * shape.1..][..shape.1].iter_mut().for_each(|x| *x = draw()),
                }
            }
            *tensor = Tensor::from_vec(all, shape, &Device::Cpu)?.to_dtype(tensor.dtype())?;
        }
        Ok(())
    }
}

/// Whether the mixture is the dense model at one, two and four copies a token; its loss on the built-in text, and how many
/// tokens of that each expert gets.
fn measure(
    job: &Job<'_>,
    settings: &Settings,
    folder: &Path,
    groups: usize,
) -> Result<(Vec<Guarantee>, Vec<Comparison>, Load)> {
    let neutral = || job.calibration.texts().filter(|text: &&Text| text.origin == Origin::Neutral);
    let written = verify::reopened(folder)?;
    let dense = Decoder::open(job.base, DType::F32, &Device::Cpu)?;
    let expected = verify::Expected::of(&dense, &job.calibration.held_out)?;
    let of_dense = losses(&dense, neutral(), &mut Load::default())?;
    drop(dense);
    let experts = written.config().sparse_layers().next().map_or(0, |(_, moe)| moe.experts / groups);
    let mut guarantees = Vec::new();
    for active in [1, 2, 4].into_iter().filter(|active| *active <= experts) {
        let mut config = written.config().clone();
        config.reroute(Some(active * groups), Default::default())?;
        let difference = expected.compare(&verify::open(&written, &config)?)?;
        let what = match active {
            1 => "with 1 active copy of a token it is the dense model".to_string(),
            many => format!("with {many} active copies of a token it is the dense model"),
        };
        let promised = match settings.method {
            // Down projections of groups are multiplied with their number.
            Method::Copy | Method::VirtualGroups => verify::is_exact(job.base, groups as f64),
            _ => false,
        };
        guarantees.push(difference.guarantee(what, promised, difference.is_rounding()));
    }
    let mut load = Load::default();
    let of_mixture = losses(&verify::open(&written, written.config())?, neutral(), &mut load)?;
    let both = neutral().zip(of_dense.into_iter().zip(of_mixture));
    let comparisons = both.map(|(text, (dense, mixture))| Comparison::of_whole(text, dense, mixture));
    Ok((guarantees, comparisons.collect(), load))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_of_the_same_mean_state_are_refused() {
        let means = [1.0, 2.0, 3.0, -1.0, 1.0, 2.000_01];
        let error = refuse_alike(&means, 2, 7).unwrap_err();
        assert_eq!(
            error.to_string(),
            "`upcycle.prompts[0]` and `upcycle.prompts[2]` have the same mean state in layer 7: the router could not tell \
             their experts apart"
        );
        assert_eq!(error.exit_code(), 2);
        refuse_alike(&[1.0, 2.0, 3.0, -1.0, 1.0, 2.01], 2, 7).unwrap();
    }

    #[test]
    fn clusters_that_nothing_belongs_to_are_counted() {
        let rows = vec![1.0, 0.0, 1.0, 0.0, -1.0, 0.1];
        let (_, counts) = clusters(rows, 2, 3, [1, 2]);
        assert_eq!(counts.iter().sum::<usize>(), 3);
        assert_eq!(counts.iter().filter(|count| **count == 0).count(), 1, "two windows are the same");
    }
}
