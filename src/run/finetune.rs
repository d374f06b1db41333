//! A fine-tuning run, from plan to files.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use candle_core::{Device, Var};

use super::artifact::{AdapterFiles, ModelFiles, Unchanged, publish};
use super::describe::describe;
use super::directory::RunDirectory;
use super::disk::Disk;
use super::memory::{Memory, Way};
use super::prepared::{PlacedAdapter, Prepared, Trainee};
use super::units::Units;
use super::warnings::warnings;
use crate::adapter::{attach, init};
use crate::data::Row;
use crate::error::{Context, Error, Result};
use crate::generate::{Limits, Sampling, Session};
use crate::model::Decoder;
use crate::model::config::RouterNoise;
use crate::ops::Trainables;
use crate::recipe::{Final, Plan, Trained};
use crate::train::{
    self, AdamWConfig, Artifact, Difference, Event, FinalWeights, Identity, Job, Reporter, Sample, Settings,
    Summary, Teacher,
};

/// Tokens of a sample that shows what the model says.
const SAMPLE_TOKENS: usize = 48;

/// Trains as `plan` says and leaves the result in its run directory. With `resume` it goes on from the last checkpoint
/// there; `interrupt` stops it after the current step, with everything saved.
pub fn finetune(
    plan: &Plan,
    resume: bool,
    interrupt: &AtomicBool,
    reporter: &mut dyn Reporter,
) -> Result<Summary> {
    let asked = plan;
    let plan = &if resume { RunDirectory::as_begun(plan) } else { plan.clone() };
    RunDirectory::check(plan, resume)?;
    let prepared = Prepared::of(plan)?;
    let memory = Memory::of(plan, &prepared);
    memory.refuse_excess(plan)?;
    Disk::of(plan, &prepared).refuse_excess(&plan.output)?;
    let identity = prepared.identity(plan)?;
    // A new directory is made once the model is there: a program that runs out of memory would leave it empty.
    let taken = plan.output.is_dir().then(|| RunDirectory::take(&plan.output, resume)).transpose()?;
    if resume {
        refuse_other(plan, &identity)?;
    }
    if let Some(text) = RunDirectory::nothing_to_resume(&plan.output).filter(|_| resume) {
        reporter.report(&Event::Warning { text });
    }
    for text in describe(plan, &prepared, &memory)? {
        reporter.report(&Event::Note { text });
    }
    // The date of the run that goes on is nothing that the user wrote.
    for text in warnings(asked, &prepared, &memory) {
        reporter.report(&Event::Warning { text });
    }
    let mut model = Decoder::open(&prepared.base, prepared.dtype, &Device::Cpu)?;
    let teacher = match &prepared.teacher {
        None => None,
        Some(teacher) => Some((teacher.open((&model, &prepared.base), prepared.dtype)?, teacher.terms)),
    };
    let (trainables, artifact, biases) = make_trainable(plan, &prepared, &mut model)?;
    let artifact = Unchanged { prepared: &prepared, artifact };
    let directory = taken.map_or_else(|| RunDirectory::take(&plan.output, resume), Ok)?;
    let date = prepared.text.template_asks_for("strftime_now").then_some(prepared.told.date);
    directory.write_recipe(plan, date)?;

    let sample_row = prepared.dataset.eval.first();
    let goes_on = resume && !train::checkpoints(&plan.output)?.is_empty();
    if resume && !goes_on {
        let text = format!("no checkpoint in {}: starting from the beginning", plan.output.display());
        reporter.report(&Event::Note { text });
    }
    if !goes_on {
        sample(&prepared, &model, sample_row, 0, reporter)?;
    }
    let eval = prepared.eval_batches(plan);
    let written = train::digests_of_run(&plan.output, &identity)?;
    let job = Job {
        model: &model,
        trainables: &trainables,
        biases: &biases,
        artifact: &artifact,
        teacher: teacher.as_ref().map(|(model, terms)| Teacher { model, terms: *terms }),
        train: prepared.sampler(plan),
        eval: &eval,
        output: &plan.output,
        identity,
        resume,
        interrupt,
    };
    let summary = train::run(job, &settings(plan, &prepared, memory.way()), reporter).map_err(|error| {
        // A loss that is no number, say, may have its cause in a file that was overwritten.
        let is_failure = !matches!(error, Error::Interrupted { .. });
        is_failure.then(|| prepared.refuse_changed().err()).flatten().unwrap_or(error)
    })?;
    directory.refuse_moved()?;
    let mut result = final_weights(plan, &summary);
    if let Some(best) = publish(&artifact, &plan.output, &written, result.is_best)? {
        (result.step, result.eval_loss) = (best.step, Some(best.eval_loss));
    }
    sample(&prepared, &model, sample_row, summary.state.step, reporter)?;
    if !summary.routing.is_empty() {
        reporter.report(&Event::Routing { routing: summary.routing.clone() });
    }
    reporter.report(&Event::End { path: plan.output.clone(), seconds: summary.seconds, result });
    Ok(summary)
}

/// Which weights the run leaves. The best evaluation may be the one before training; then there is nothing to go back to.
fn final_weights(plan: &Plan, summary: &Summary) -> FinalWeights {
    let state = &summary.state;
    let earlier = state.best.filter(|best| best.step > 0 && best.step < state.step);
    let best = earlier.filter(|_| plan.train.r#final == Final::Best);
    FinalWeights {
        step: best.map_or(state.step, |best| best.step),
        eval_loss: best.map(|best| best.eval_loss).or(summary.last_eval_loss),
        last_eval_loss: summary.last_eval_loss,
        is_best: best.is_some(),
        base: match plan.trained {
            Trained::Adapter(_) => Some(plan.model.source.clone()),
            Trained::Full => None,
        },
    }
}

/// Refuses to go on with other data or another model than the run began with, and says which of them it is.
fn refuse_other(plan: &Plan, now: &Identity) -> Result<()> {
    let Some(then) = train::identity_of_run(&plan.output)? else { return Ok(()) };
    let differences = then.differences(now);
    let has = |part: Difference| differences.contains(&part);
    let keys = differences.iter().filter_map(|difference| match difference {
        Difference::Key(key, then, now) => Some(format!("`{key}` was {then} and is {now} now")),
        Difference::Config(key, then, now) => {
            Some(format!("`{key}` of the model's configuration was {then} and is {now} now"))
        }
        Difference::Data | Difference::Weights | Difference::Teacher => None,
    });
    let what = match (has(Difference::Data), has(Difference::Weights)) {
        _ if differences.is_empty() => return Ok(()),
        (true, true) => "the data and the model are not those that the run was started with".to_string(),
        (true, false) => "the data are not those that the run was started with".to_string(),
        (false, true) => {
            let model = &plan.model.source;
            format!("the weights of `{model}` are not those that the run was started with")
        }
        _ if has(Difference::Teacher) => {
            "the teacher is not the one that the run was started with".to_string()
        }
        _ => format!("the run was started with other settings: {}", keys.collect::<Vec<_>>().join("; ")),
    };
    Err(Error::request(what)
        .with_hint("resume with the files it was started with, or start anew with another `--output`"))
    .at(&plan.output)
}

/// What is trained, what of it is written, and the selection biases that follow the load.
type Made<'a> = (Trainables, Box<dyn Artifact + 'a>, BTreeMap<usize, (Arc<str>, Var)>);

fn make_trainable<'a>(plan: &'a Plan, prepared: &'a Prepared, model: &mut Decoder) -> Result<Made<'a>> {
    let biases = |model: &mut Decoder| match plan.mixture.bias_update > 0.0 {
        true => model.make_selection_biases_variable(),
        false => Ok(BTreeMap::new()),
    };
    model.unscale_routers()?;
    // What noise is drawn with is of the run alone: no file of a result has a place for it.
    let noise = match plan.mixture.noise {
        RouterNoise::Learned => model.make_noise_trainable()?,
        RouterNoise::None | RouterNoise::Gaussian => Trainables::new(),
    };
    let writes_all = noise.is_empty();
    let (mut trainables, artifact, biases): Made<'a> = match &prepared.trained {
        Trainee::Full => {
            let (trainables, biases) = (model.make_trainable()?, biases(model)?);
            let written = with(&trainables, &biases);
            let artifact = ModelFiles::new(prepared, &written, writes_all)?;
            (trainables, Box::new(artifact), biases)
        }
        Trainee::Adapter(adapter) => {
            let (trainables, biases) = (attach_adapter(adapter, prepared, model)?, biases(model)?);
            let written = with(&trainables, &biases);
            let artifact = AdapterFiles::new(plan, prepared, adapter, &written, writes_all)?;
            (trainables, Box::new(artifact), biases)
        }
    };
    trainables.extend(noise);
    Ok((trainables, artifact, biases))
}

/// What is written: also what follows the load without a gradient.
fn with(trainables: &Trainables, biases: &BTreeMap<usize, (Arc<str>, Var)>) -> Trainables {
    trainables.clone().into_iter().chain(biases.values().cloned()).collect()
}

fn attach_adapter(adapter: &PlacedAdapter, prepared: &Prepared, model: &mut Decoder) -> Result<Trainables> {
    let PlacedAdapter { config, placements, from, routers } = adapter;
    if let Some(from) = from {
        model.set_routers(&from.routers)?;
    }
    let tensors = match from {
        Some(from) => Units::of(prepared.base.config()).all_trained(&from.tensors)?,
        None => init::fresh(config, &placements.placements, prepared.base.config(), model.device())?,
    };
    let (dropout, seed) = (config.dropout, config.dropout_seed);
    let mut trainables = attach(model.linears_mut(), &placements.placements, &tensors, dropout, seed)?;
    if *routers {
        trainables.extend(model.make_routers_trainable()?);
    }
    Ok(trainables)
}

fn settings(plan: &Plan, prepared: &Prepared, way: Way) -> Settings {
    let train = &plan.train;
    let Way { recompute, piece_tokens } = way;
    Settings {
        steps: prepared.steps,
        accumulate: train.accumulate as u64,
        learning_rate: train.learning_rate,
        schedule: train.schedule,
        warmup: train.warmup.updates(prepared.steps),
        optimizer: AdamWConfig { weight_decay: train.weight_decay, ..AdamWConfig::default() },
        max_grad_norm: train.max_grad_norm,
        eval_every: train.eval_every,
        save_every: train.save_every,
        keep: train.keep,
        recompute,
        piece_tokens,
        losses: plan.mixture.losses,
        bias_update: plan.mixture.bias_update,
    }
}

/// Shows what the model answers to the beginning of a row of the evaluation data.
fn sample(
    prepared: &Prepared,
    model: &Decoder,
    row: Option<&Row>,
    step: u64,
    reporter: &mut dyn Reporter,
) -> Result<()> {
    let Some(row) = row else { return Ok(()) };
    let learned = row.supervised.iter().position(|counted| *counted).unwrap_or(1);
    // A text that is learned from its first token on has no question: its first words stand for one.
    let asked = if learned > 1 { learned } else { (row.tokens.len() / 2).clamp(1, 8) };
    let prompt = &row.tokens[..asked];
    let mut answer = Vec::new();
    let limits = Limits { max_new_tokens: SAMPLE_TOKENS, stop: prepared.text.eos_ids().to_vec() };
    Session::new(model).generate(prompt, &limits, Sampling::default(), |token| {
        answer.push(token);
        Ok(true)
    })?;
    let sample = Sample {
        prompt: prepared.text.decode(prompt, false)?,
        completion: prepared.text.decode(&answer, true)?,
    };
    reporter.report(&Event::Sample { step, sample });
    Ok(())
}
