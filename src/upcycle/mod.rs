//! Dense models into mixtures of experts that stock tools load, and the account of what that cost.
//!
//! A split cuts every feed-forward network into slices: `F(x) = sum of D_e h_e(x)`, so with all slices on it is the dense
//! network, and with some of them it is cheaper. Which neurons go together, and what a linear router can tell of who is
//! needed, is found on calibration text, layer by layer: the dense model and the statistics of one layer are all that is in
//! memory. Copies start from the same network in every expert and leave the model as it is until it is trained. And new
//! experts can be added to a mixture, for a task that it has not seen.
//!
//! ```text
//! text -> windows (fitted | held out | of other files | built in)
//! dense model -> per layer: scores -> shared neurons -> partition <-> router -> down projections fitted once more
//!             -> config.json of a family, weights under its names -> read back: all slices on, it is the dense model
//!             -> fitted down projections in the place of the dense ones -> read back -> measured beside its rivals
//! ```

mod account;
mod assign;
mod compare;
mod conclusion;
mod copies;
mod expand;
mod export;
mod gradient;
mod load;
mod neutral;
mod overlap;
mod paired;
mod partition;
mod refit;
mod report;
mod router;
mod settings;
mod slices;
mod solve;
mod split;
mod statistics;
mod verify;
mod windows;

use std::path::{Path, PathBuf};

use candle_core::{DType, Device};
use serde::Serialize;

pub use compare::{Comparison, LayerReport};
pub use paired::{Difference, Loss};
pub use report::{Guarantee, Refitted, Report, Untied};
pub use settings::{
    KeepDense, Method, Partition, Refit, RouterKind, Settings, SplitShape, choose_format, dense_network,
};
pub use windows::{Calibration, Origin, Text, WINDOW, Windows};

use self::conclusion::Conclusion;
use self::slices::Routing;
use crate::error::{Context, Result};
use crate::model::family::{self, MixtureFormat, MixtureShape};
use crate::model::{Decoder, DecoderConfig, Pretrained};
use crate::weights::{Checkpoint, Staged, write_atomic};

/// The file beside the new weights that holds the account of the conversion as JSON.
pub const REPORT_FILE: &str = "upcycle.json";
/// The file that holds the same account as text for people.
pub const REPORT_TEXT: &str = "upcycle.md";

/// An event during a conversion. In JSON, the key `event` has its name.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// A fact, a line of text.
    Note {
        /// The line.
        text: String,
    },
    /// A layer is done.
    Layer {
        /// The number of layers that are done.
        done: usize,
        /// The number of all layers.
        layers: usize,
    },
    /// The new folder is complete. [`crate::run::upcycle`] sends this event last.
    End {
        /// Its folder.
        path: PathBuf,
        /// Seconds since the conversion began.
        seconds: f64,
    },
}

impl Event {
    pub(crate) fn note(text: impl Into<String>) -> Self {
        Self::Note { text: text.into() }
    }
}

/// Called on every event; an error from there ends the conversion, and nothing of it stays.
pub type Watch<'a> = dyn FnMut(Event) -> Result<()> + 'a;

/// What is converted, and where to.
pub struct Job<'a> {
    /// The dense model; for [`Method::Expand`] the mixture.
    pub base: &'a Pretrained,
    /// Further checkpoints of the same shape, for [`Method::Mix`].
    pub sources: &'a [Pretrained],
    /// Tokens of the prompts of each expert, for [`RouterKind::Prompts`].
    pub prompts: &'a [Vec<Vec<u32>>],
    /// Text to learn from and to measure on.
    pub calibration: &'a Calibration,
    /// The type that the dense model computes in.
    pub dtype: DType,
    /// The new folder.
    pub output: &'a Path,
    /// Names and contents of further files that are written into the new folder.
    pub files: &'a [(String, String)],
    /// Warnings from before the conversion, which the account repeats.
    pub warnings: &'a [String],
}

/// Describes the result of a conversion as far as the configuration and file headers show it.
#[derive(Debug, Clone, PartialEq)]
pub struct Outline {
    /// The slices of a split or pruned network.
    pub slices: Option<SplitShape>,
    /// The family that will be written; `None`: the model's own.
    pub format: Option<MixtureFormat>,
    /// Neurons of an expert.
    pub width: usize,
    /// The head, where it becomes a tensor of its own.
    pub untied: Option<Untied>,
    /// The most bytes that the weights will have.
    pub bytes: u64,
}

impl Outline {
    /// Refuses what cannot be converted as `settings` say, before any weight is read.
    pub fn of(base: &Pretrained, sources: &[Pretrained], settings: &Settings) -> Result<Self> {
        let bytes_of = |config: &DecoderConfig| {
            config.num_parameters() as u64 * base.compute_dtype().size_in_bytes() as u64
        };
        let written = |slices: Option<SplitShape>, shape: &MixtureShape| -> Result<Self> {
            let format = choose_format(settings.format, base.config(), shape)?;
            let config = family::read(&format.layout(base.config_json(), base.config(), shape)?.config)?;
            let (untied, bytes) = (Untied::of(base, &config), bytes_of(&config));
            Ok(Self { slices, format: Some(format), width: shape.width, untied, bytes })
        };
        match settings.method {
            Method::Split => {
                let slices = SplitShape::of(settings, base.config())?;
                let shape = slices.mixture();
                written(Some(slices), &shape)
            }
            Method::Prune => {
                let slices = SplitShape::of(settings, base.config())?;
                // A pruned model is smaller than the one that it is made of.
                let (width, bytes) = (slices.width, bytes_of(base.config()));
                Ok(Self { slices: Some(slices), format: None, width, untied: None, bytes })
            }
            Method::Copy | Method::Drop | Method::VirtualGroups | Method::Mix => {
                written(None, &copies::shape(base, sources, settings)?)
            }
            Method::Expand => {
                let moe = expand::refuse_unfit(base, settings)?;
                let grown = expand::grown(base.config_json(), moe.experts, settings.experts)?;
                let bytes = bytes_of(&family::read(&grown)?);
                Ok(Self { slices: None, format: None, width: moe.width, untied: None, bytes })
            }
        }
    }
}

/// Converts a model as `settings` say and writes it to a new folder, whole or not at all.
///
/// # Errors
///
/// Where the model is not dense, no family can hold the mixture, or a promise does not hold when the result is read back.
pub fn upcycle(job: &Job<'_>, settings: &Settings, watch: &mut Watch<'_>) -> Result<Report> {
    let read = || std::iter::once(job.base).chain(job.sources).map(Pretrained::checkpoint);
    let explain = |error| read().fold(error, |error, checkpoint| checkpoint.explain(error));
    write(job, settings, watch, || read().try_for_each(Checkpoint::refuse_changed)).map_err(explain)
}

/// Writes the new model; `refuse_changed` is asked before it gets its name.
fn write(
    job: &Job<'_>,
    settings: &Settings,
    watch: &mut Watch<'_>,
    refuse_changed: impl Fn() -> Result<()>,
) -> Result<Report> {
    job.base.check()?;
    let staged = Staged::folder(job.output)?;
    let mut report = match settings.method {
        Method::Split | Method::Prune => cut(job, settings, staged.path(), watch)?,
        Method::Copy | Method::Drop | Method::VirtualGroups | Method::Mix => {
            copies::copy(job, settings, staged.path(), watch)?
        }
        Method::Expand => expand::expand(job, settings, staged.path(), watch)?,
    };
    report.refuse_broken()?;
    report.conclusion = Conclusion {
        method: report.method,
        is_calibrated: report.calibration_tokens > 0,
        vocab: job.base.config().vocab_size,
        comparisons: &report.comparisons,
    }
    .lines();
    report.warnings.splice(0..0, job.warnings.iter().cloned());
    for (name, text) in job.files {
        write_atomic(staged.path().join(name), text.as_bytes())?;
    }
    write_atomic(
        staged.path().join(REPORT_FILE),
        (serde_json::to_string_pretty(&report)? + "\n").as_bytes(),
    )?;
    write_atomic(staged.path().join(REPORT_TEXT), report.text().as_bytes())?;
    // From here on there is no way back.
    watch(Event::note("writing the account"))?;
    refuse_changed()?;
    staged.commit().at(job.output)?;
    Ok(report)
}

/// The methods that cut neurons apart.
fn cut(job: &Job<'_>, settings: &Settings, folder: &Path, watch: &mut Watch<'_>) -> Result<Report> {
    let begun = std::time::Instant::now();
    let base = job.base;
    let shape = SplitShape::of(settings, base.config())?;
    let stored = base.compute_dtype();
    let target = match settings.method {
        Method::Prune => None,
        _ => Some(choose_format(settings.format, base.config(), &shape.mixture())?),
    };
    let layout_of =
        |format: MixtureFormat| format.layout(base.config_json(), base.config(), &shape.mixture());
    let routing = target.map(|format| Routing::of(format, &layout_of(format)?)).transpose()?;
    let model = Decoder::open(base, job.dtype, &Device::Cpu)?;
    let cut = split::split(&model, &shape, settings, job.calibration, (routing, stored), watch)?;
    for (layer, slices) in cut.layers.iter().enumerate() {
        slices.iter().try_for_each(|slices| split::refuse_infinite(slices, layer))?;
    }
    drop(model);
    watch(Event::note("writing"))?;
    base.write_companions(folder)?;
    let mut report = Report::new(base, settings, &shape, target, job.calibration.num_tokens(), &cut);
    report.warnings.extend(report.idle_experts());
    let mut seconds = begun.elapsed().as_secs_f64();
    let Some(format) = target else {
        export::write_pruned(base, &cut, settings.refit, stored, folder)?;
        if settings.verify {
            watch(Event::note("reading back and measuring"))?;
            let measured = report.comparisons.first();
            let measured = measured.and_then(|c| c.pruned_refit.as_ref().or(c.pruned.as_ref()));
            let guarantee = verify::read_back(folder, job.calibration, job.dtype, measured)?;
            report.guarantees.push(guarantee);
        }
        return Ok(Report { seconds, ..report });
    };
    let writing = std::time::Instant::now();
    let layout = layout_of(format)?;
    report.untied = Untied::of(base, &family::read(&layout.config)?);
    export::write_split(base, &layout, format, &shape, &cut, stored, folder)?;
    seconds += writing.elapsed().as_secs_f64();
    if settings.verify {
        watch(Event::note("reading back, to compare it with the dense model when all experts are on"))?;
        report.guarantees = verify::split(base, folder, &shape, &layout, settings.refit, job.calibration)?;
        report.refuse_broken()?;
    }
    if settings.refit != Refit::None {
        watch(Event::note("writing the fitted down projections"))?;
        let rewriting = std::time::Instant::now();
        report.refitted = Some(export::rewrite_down(base, &layout, &cut, (stored, settings.verify), folder)?);
        seconds += rewriting.elapsed().as_secs_f64();
    }
    drop(cut);
    if settings.verify {
        watch(Event::note("reading back and measuring"))?;
        let measured = report.comparisons.first().and_then(|held_out| held_out.mixture.as_ref());
        let guarantee = verify::read_back(folder, job.calibration, job.dtype, measured)?;
        report.guarantees.push(guarantee);
    }
    Ok(Report { seconds, ..report })
}
