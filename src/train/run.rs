//! The training loop.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use candle_core::{Tensor, Var};
use serde_json::json;

use super::arrival::Arrival;
use super::best;
use super::checkpoint::{self, Artifact};
use super::event::{Event, Reporter, StepReport};
use super::identity::Identity;
use super::memory::peak_rss_bytes;
use super::metrics::{FILE as METRICS, Metrics};
use super::optimizer::{AdamW, AdamWConfig};
use super::record::{Best, TrainerState};
use super::schedule::Schedule;
use super::step::{Objective, Teacher, objective_gradients};
use crate::data::{Batch, Sampler};
use crate::error::{Context, Error, Result};
use crate::eval::evaluate;
use crate::model::{Decoder, Recompute, RouterLosses, Spread, balanced};
use crate::ops::{Kernels, Trainables};

/// How a run trains.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Updates in all.
    pub steps: u64,
    /// Batches per update.
    pub accumulate: u64,
    /// The highest learning rate.
    pub learning_rate: f64,
    /// How the learning rate changes after the warmup.
    pub schedule: Schedule,
    /// Updates of the warmup.
    pub warmup: u64,
    /// The optimizer.
    pub optimizer: AdamWConfig,
    /// Gradients are scaled down to this norm; 0 leaves them.
    pub max_grad_norm: f64,
    /// Evaluate before the first update and after every so many; 0: only after the last.
    pub eval_every: u64,
    /// Save a checkpoint after every so many updates, and the last; 0: only after the last.
    pub save_every: u64,
    /// Checkpoints kept.
    pub keep: usize,
    /// What the forward keeps for the backward.
    pub recompute: Recompute,
    /// The most tokens of a batch that are computed at once; batches are cut between documents. A resumed run keeps
    /// what it began with.
    pub piece_tokens: usize,
    /// Losses on routers.
    pub losses: RouterLosses,
    /// What a step adds to the selection bias of an expert with less than an equal share of the tokens, and takes from
    /// that of one with more; of a router that is stored scaled down, times [`Decoder::selection_unit`].
    pub bias_update: f64,
}

/// Everything a run needs.
pub struct Job<'a> {
    /// The model, with the trainables in it.
    pub model: &'a Decoder,
    /// What is trained.
    pub trainables: &'a Trainables,
    /// Selection biases by layer, which follow the load.
    pub biases: &'a BTreeMap<usize, (Arc<str>, Var)>,
    /// The same on disk.
    pub artifact: &'a dyn Artifact,
    /// The model that the trained one is to be like.
    pub teacher: Option<Teacher<'a>>,
    /// Batches to train on.
    pub train: Sampler<'a>,
    /// Batches to evaluate on; may be empty.
    pub eval: &'a [Batch],
    /// The run folder; exists.
    pub output: &'a Path,
    /// Data, weights and settings: a resumed run must have the same.
    pub identity: Identity,
    /// Whether to go on from the last checkpoint in `output`.
    pub resume: bool,
    /// Set from outside to stop after the current step.
    pub interrupt: &'a AtomicBool,
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Summary {
    /// Where it stands.
    pub state: TrainerState,
    /// The loss on the evaluation data after the last step.
    pub last_eval_loss: Option<f64>,
    /// How a mixture spread its tokens: those of the evaluation data after the last step, or where there are none those of
    /// the last step.
    pub routing: Vec<Spread>,
    /// Seconds spent.
    pub seconds: f64,
}

/// Trains until `settings.steps` updates are made, or until interrupted; then a checkpoint is saved first.
pub fn run(mut job: Job<'_>, settings: &Settings, reporter: &mut dyn Reporter) -> Result<Summary> {
    if settings.accumulate == 0 || settings.steps.checked_mul(settings.accumulate).is_none() {
        let Settings { steps, accumulate, .. } = settings;
        return Err(Error::request(format!(
            "{steps} updates of {accumulate} batches each cannot be counted"
        )));
    }
    let begin = Instant::now();
    let mut optimizer = AdamW::new(settings.optimizer, job.trainables, !job.artifact.is_exact())?;
    let taken_up = if job.resume { take_up(&job, &mut optimizer, settings, reporter)? } else { None };
    let mut state = match taken_up {
        Some(mut state) => {
            let missing = best::check_best(job.output, job.artifact, &mut state)?;
            missing.into_iter().for_each(|text| reporter.report(&Event::Warning { text }));
            state
        }
        None => {
            best::forget_best(job.output, &job.identity)?;
            TrainerState {
                identity: job.identity.clone(),
                piece_tokens: settings.piece_tokens,
                ..TrainerState::default()
            }
        }
    };
    state.kernel = Kernels::current().to_string();
    let mut metrics = Metrics::open(job.output, state.step)?;
    if !metrics.unreadable.is_empty() {
        let lines: Vec<String> = metrics.unreadable.iter().map(usize::to_string).collect();
        let path = job.output.join(METRICS);
        let text =
            format!("{}: lines that could not be read are left out: {}", path.display(), lines.join(", "));
        reporter.report(&Event::Warning { text });
    }
    reporter.report(&Event::Start { step: state.step, steps: settings.steps });
    let (mut last_eval_loss, mut routing) = (None, Vec::new());
    if state.step == 0
        && settings.eval_every > 0
        && let Some((loss, _)) = evaluation(&job, &mut state, &mut metrics, reporter)?
    {
        last_eval_loss = Some(loss);
        state.first_eval_loss = Some(checkpoint::restorable(loss));
    }
    let mut arrival = Arrival::of(job.trainables, &job.model.routed_parameters());
    let mut saved_at = state.step;
    while state.step < settings.steps {
        if job.interrupt.load(Ordering::Relaxed) {
            metrics.refuse_moved()?;
            metrics.sync()?;
            return Err(interrupted(&job, &optimizer, &state, settings, saved_at, reporter)?);
        }
        let report = update(&mut job, &mut optimizer, &mut state, &mut arrival, settings)?;
        metrics.append(&report)?;
        routing.clone_from(&report.routing);
        reporter.report(&Event::Step(report));
        let last = state.step == settings.steps;
        if (last || is_due(state.step, settings.eval_every))
            && let Some((loss, spreads)) = evaluation(&job, &mut state, &mut metrics, reporter)?
        {
            (last_eval_loss, routing) = (Some(loss), spreads);
        }
        if last || is_due(state.step, settings.save_every) {
            metrics.refuse_moved()?;
            metrics.sync()?;
            save(&job, &optimizer, &state, settings, reporter)?;
            saved_at = state.step;
        }
    }
    Ok(Summary { state, last_eval_loss, routing, seconds: begin.elapsed().as_secs_f64() })
}

/// Restores the newest checkpoint that is whole, and says which newer ones are not. A run without checkpoints has nothing
/// to go on from.
fn take_up(
    job: &Job<'_>,
    optimizer: &mut AdamW,
    settings: &Settings,
    reporter: &mut dyn Reporter,
) -> Result<Option<TrainerState>> {
    let mut broken: Vec<Error> = Vec::new();
    for (step, path) in checkpoint::list(job.output)?.into_iter().rev() {
        let restored =
            checkpoint::restore((step, &path), job.artifact, optimizer, job.trainables, &job.identity);
        match restored {
            Ok(state) => {
                for error in broken {
                    let text = format!("a newer checkpoint is not whole and is not used: {error}");
                    reporter.report(&Event::Warning { text });
                }
                reporter.report(&Event::Note { text: format!("going on from {}", path.display()) });
                let now = Kernels::current().to_string();
                if !state.kernel.is_empty() && state.kernel != now {
                    let (choice, one) = match Kernels::forced() {
                        Ok(Some(_)) => ("`PEFT_KERNELS` chooses", "with one choice"),
                        _ => ("this machine has", "on one machine"),
                    };
                    reporter.report(&Event::Warning {
                        text: format!(
                            "the run was computed with {} so far, and {choice} {now}: the last bits will differ from \
                             those of a run {one}",
                            state.kernel
                        ),
                    });
                }
                let spared = checkpoint::prune(job.output, settings.keep, &state)?;
                spared.into_iter().for_each(|text| reporter.report(&Event::Warning { text }));
                return Ok(Some(state));
            }
            // What was asked for is wrong, whatever the older ones hold.
            Err(error) if error.exit_code() == 2 => return Err(error),
            Err(error) => broken.push(error),
        }
    }
    if broken.is_empty() {
        return Ok(None);
    }
    let each: Vec<String> = broken.iter().map(ToString::to_string).collect();
    Err(Error::invalid(format!("none of the checkpoints is whole: {}", each.join("; ")))
        .with_hint("start anew with another `--output`"))
    .at(job.output)
}

/// What to do about a loss that is not a number.
const REMEDY: &str = "start anew with a lower `train.learning_rate`, or look at the data";

fn is_due(step: u64, every: u64) -> bool {
    every > 0 && step.is_multiple_of(every)
}

/// One update, and what is to be said of it.
fn update(
    job: &mut Job<'_>,
    optimizer: &mut AdamW,
    state: &mut TrainerState,
    arrival: &mut Arrival,
    settings: &Settings,
) -> Result<StepReport> {
    let begin = Instant::now();
    let first = state.step * settings.accumulate;
    let batches: Vec<Batch> = (first..first + settings.accumulate)
        .flat_map(|index| job.train.batch(index).pieces(state.piece_tokens))
        .collect();
    let (now, recompute) = (Some(state.step), settings.recompute);
    let objective = Objective { losses: settings.losses, teacher: job.teacher };
    let step = objective_gradients(job.model, job.trainables, &batches, now, recompute, &objective)?;
    let number = state.step + 1;
    if !step.loss.is_finite() || !step.norm.is_finite() {
        let what = if step.loss.is_finite() { "gradient norm" } else { "loss" };
        let value = if step.loss.is_finite() { step.norm } else { step.loss };
        return Err(Error::invalid(format!(
            "the {what} of step {number} is {value}; nothing of it is saved"
        ))
        .with_hint(REMEDY));
    }
    if !arrival.is_done() {
        arrival.check(job.trainables, &step.gradients)?;
    }
    let learning_rate =
        settings.learning_rate * settings.schedule.factor(state.step, settings.steps, settings.warmup);
    let clip = if settings.max_grad_norm > 0.0 {
        (settings.max_grad_norm / (step.norm + 1e-6)).min(1.0)
    } else {
        1.0
    };
    optimizer.update(job.trainables, &step.gradients, clip, learning_rate)?;
    let routing = step.tally.spreads();
    for spread in &routing {
        if let Some((name, variable)) = job.biases.get(&spread.layer) {
            let biases: Vec<f32> = variable.to_vec1().in_tensor(name)?;
            let rate = settings.bias_update * job.model.selection_unit(spread.layer);
            let biases = balanced(&biases, &spread.load, rate);
            variable.set(&Tensor::new(biases, variable.device())?).in_tensor(name)?;
        }
    }
    let tokens = batches.iter().map(|batch| batch.tokens.len() as u64).sum();
    let supervised_tokens = batches.iter().map(|batch| batch.num_supervised() as u64).sum();
    state.step = number;
    state.tokens += tokens;
    state.supervised_tokens += supervised_tokens;
    let next = number * settings.accumulate;
    let (epoch, within) = job.train.place(next);
    Ok(StepReport {
        step: number,
        steps: settings.steps,
        epoch: epoch as f64 + within as f64 / job.train.batches_in(epoch) as f64,
        loss: step.loss,
        learning_rate,
        grad_norm: step.norm,
        tokens,
        supervised_tokens,
        tokens_per_second: tokens as f64 / begin.elapsed().as_secs_f64(),
        peak_rss_bytes: peak_rss_bytes(),
        kl: step.kl,
        hidden: step.hidden,
        router_losses: step.router.values,
        routing,
    })
}

fn evaluation(
    job: &Job<'_>,
    state: &mut TrainerState,
    metrics: &mut Metrics,
    reporter: &mut dyn Reporter,
) -> Result<Option<(f64, Vec<Spread>)>> {
    if job.eval.is_empty() {
        return Ok(None);
    }
    let evaluation = evaluate(job.model, job.eval)?;
    let eval_loss = evaluation.nll();
    if !eval_loss.is_finite() {
        let step = state.step;
        return Err(Error::invalid(format!(
            "the loss on the evaluation data after step {step} is {eval_loss}"
        ))
        .with_hint(REMEDY));
    }
    let best = state.best.is_none_or(|best| eval_loss < best.eval_loss);
    if best {
        state.best = Some(Best { step: state.step, eval_loss: checkpoint::restorable(eval_loss) });
        // The model before the first step is what the user has already.
        if state.step > 0 {
            metrics.refuse_moved()?;
            let kept = best::save_best(job.output, job.artifact, state)?;
            kept.into_iter().for_each(|text| reporter.report(&Event::Warning { text }));
        }
    }
    metrics.append(&json!({ "step": state.step, "eval_loss": eval_loss }))?;
    reporter.report(&Event::Evaluation { step: state.step, eval_loss, best });
    Ok(Some((eval_loss, evaluation.tally.spreads())))
}

/// Saves a checkpoint and says so.
fn save(
    job: &Job<'_>,
    optimizer: &AdamW,
    state: &TrainerState,
    settings: &Settings,
    reporter: &mut dyn Reporter,
) -> Result<()> {
    let (path, kept) = checkpoint::save(job.output, job.artifact, optimizer, state, settings.keep)?;
    reporter.report(&Event::Checkpoint { step: state.step, path });
    kept.into_iter().for_each(|text| reporter.report(&Event::Warning { text }));
    Ok(())
}

fn interrupted(
    job: &Job<'_>,
    optimizer: &AdamW,
    state: &TrainerState,
    settings: &Settings,
    saved_at: u64,
    reporter: &mut dyn Reporter,
) -> Result<Error> {
    if state.step > saved_at {
        save(job, optimizer, state, settings, reporter)?;
    }
    let (step, steps) = (state.step, settings.steps);
    let message = format!("interrupted after step {step} of {steps}; all of it is saved");
    Ok(Error::Interrupted { message, hint: Some("go on with the same command and `--resume`".to_string()) })
}
