//! The plan of a run in lines of text: what its first lines and `peft check` say.

use std::collections::BTreeSet;

use super::figures;
use super::kernels::ChosenKernels;
use super::memory::Memory;
use super::prepared::{Prepared, Trainee};
use super::teacher::PreparedTeacher;
use crate::data::{Counts, Layout};
use crate::error::Result;
use crate::model::RouterLosses;
use crate::model::config::{Overflow, RouterNoise, RoutingKind, RoutingVariant};
use crate::ops::distillation::Terms;
use crate::recipe::{Evaluation, Length, MixturePlan, Plan, RouterTraining, Trained};

/// The model, what is trained, the data and the course of training.
pub(super) fn describe(plan: &Plan, prepared: &Prepared, memory: &Memory) -> Result<Vec<String>> {
    let mut lines = vec![model(prepared)];
    lines.extend(trained(plan, prepared));
    lines.extend(mixture(plan, prepared));
    lines.extend(prepared.teacher.iter().map(teacher));
    lines.extend(prepared.dataset.train_counts.iter().map(|counts| data("train", counts)));
    lines.extend(prepared.dataset.eval_counts.iter().map(|counts| data("eval", counts)));
    lines.extend(evaluation(plan, prepared));
    let counts = &prepared.dataset;
    let is_templated = |counts: &Counts| counts.templated > 0;
    if counts.train_counts.iter().chain(&counts.eval_counts).any(is_templated) {
        lines.extend(prepared.told.read_by(&prepared.text).map(|told| format!("template: told {told}")));
    }
    lines.push(course(plan, prepared));
    lines.push(ChosenKernels::of(prepared.base.config())?.to_string());
    lines.push(memory.line());
    let trainable = prepared.trainable();
    lines.push(figures::trainable(trainable.trainable, trainable.all));
    Ok(lines)
}

/// What is evaluated where no file says it.
fn evaluation(plan: &Plan, prepared: &Prepared) -> Option<String> {
    match plan.data.eval {
        Evaluation::Files(_) => None,
        Evaluation::Off => Some("eval: none".to_string()),
        Evaluation::ShareOfMany if prepared.dataset.eval.is_empty() => Some(format!(
            "eval: none, for all of fewer than {} documents are trained on; `data.eval_share = 0.1` holds a tenth out",
            Evaluation::MANY
        )),
        Evaluation::Share(_) | Evaluation::ShareOfMany => {
            let held_out = figures::count(prepared.dataset.eval.len() as u64);
            Some(format!("eval: {held_out} documents held out of training"))
        }
    }
}

fn model(prepared: &Prepared) -> String {
    let config = prepared.base.config();
    let numbers = figures::count(config.num_parameters() as u64);
    let (name, layers) = (prepared.base.name(), config.layers.len());
    let dtype = prepared.dtype.as_str();
    let mut line = format!("model: {name}, {layers} layers, {numbers} parameters, computing in {dtype}");
    let base = &prepared.base;
    let stored: BTreeSet<String> =
        base.quantized().filter_map(|name| Some(base.stored_dtype(name).ok()?.to_string())).collect();
    if !stored.is_empty() {
        line += &format!(", weights stay {}", stored.into_iter().collect::<Vec<_>>().join(" and "));
    }
    line
}

fn trained(plan: &Plan, prepared: &Prepared) -> Vec<String> {
    let Trainee::Adapter(adapter) = &prepared.trained else {
        return vec!["training: all weights".to_string()];
    };
    let config = &adapter.config;
    let scale = config.scale(config.rank, config.alpha());
    let mut line = format!("adapter: LoRA, rank {}, alpha {}, scale {scale}", config.rank, config.alpha());
    if config.dropout > 0.0 {
        line += &format!(", dropout {}", config.dropout);
    }
    if let Trained::Adapter(written) = &plan.trained {
        match written.earlier() {
            Some(from) => line += &format!(", going on from {}", from.display()),
            None => line += &format!(", seed {}", config.seed),
        }
    }
    let targets = adapter.placements.counts.iter().map(|count| format!("{} {}", count.target, count.placed));
    vec![line, format!("targets: {}", targets.collect::<Vec<_>>().join(", "))]
}

/// How experts are chosen, and what makes routers even; nothing of a dense model.
fn mixture(plan: &Plan, prepared: &Prepared) -> Vec<String> {
    let Some((_, moe)) = prepared.base.config().sparse_layers().next() else { return Vec::new() };
    let MixturePlan { router, losses, bias_update, .. } = plan.mixture;
    let RoutingVariant { noise, capacity_factor, capacity_warmup, overflow, kind, .. } = moe.variant;
    let trained = match (&plan.trained, router) {
        (Trained::Full, _) | (_, RouterTraining::Full) => "trained whole",
        (_, RouterTraining::Lora) => "low-rank terms trained",
        (_, RouterTraining::Frozen) => "frozen",
    };
    let noise = match noise {
        RouterNoise::None => None,
        RouterNoise::Gaussian => Some("gaussian noise".to_string()),
        RouterNoise::Learned => Some("learned noise".to_string()),
    };
    let kind = match kind {
        RoutingKind::Model => None,
        RoutingKind::Random => Some("chosen by chance".to_string()),
        RoutingKind::Hash => Some("chosen by the token".to_string()),
    };
    let capacity = capacity_factor.map(|factor| {
        let overflow = match overflow {
            Overflow::Drop => "drop",
            Overflow::Reroute => "reroute",
        };
        let after = if capacity_warmup > 0 { format!(" from step {capacity_warmup}") } else { String::new() };
        format!("capacity {factor}{after} ({overflow})")
    });
    let active = format!("{} of {} experts active", moe.active, moe.experts);
    let routers = [Some(trained.to_string()), Some(active), noise, kind, capacity];
    let RouterLosses { switch, importance, load, load_std, z, pooled } = losses;
    let terms = [
        ("switch", switch),
        ("importance", importance),
        ("load", load),
        ("load_std", load_std),
        ("z", z),
        ("bias_update", bias_update),
    ];
    let terms = terms.iter().filter(|(_, value)| *value > 0.0).map(|(name, value)| format!("{name} {value}"));
    let mut terms: Vec<String> = terms.collect();
    if pooled && plan.mixture.losses.are_on() {
        terms.push("pooled over layers".to_string());
    }
    let mut lines = wrapped("routers:", routers.into_iter().flatten());
    if !terms.is_empty() {
        lines.extend(wrapped("balance:", terms));
    }
    lines
}

/// A list after `head` in lines of at most 80 columns.
fn wrapped(head: &str, parts: impl IntoIterator<Item = String>) -> Vec<String> {
    let (mut lines, mut line) = (Vec::new(), head.to_string());
    let mut comma = "";
    for part in parts {
        line += comma;
        comma = ",";
        // A space goes before the part, and a comma may follow it.
        if line.len() + part.len() + 2 > 80 {
            lines.push(std::mem::replace(&mut line, " ".to_string()));
        }
        line += &format!(" {part}");
    }
    lines.push(line);
    lines
}

fn teacher(teacher: &PreparedTeacher) -> String {
    let Terms { kl, temperature, hidden } = teacher.terms;
    let terms = [
        (kl > 0.0).then(|| format!("kl {kl} at temperature {temperature}")),
        (hidden > 0.0).then(|| format!("hidden {hidden}")),
    ];
    let terms: Vec<String> = terms.into_iter().flatten().collect();
    let own = figures::bytes(teacher.weights);
    format!(
        "teacher: {}, {}; {own} of weights that the model does not have",
        teacher.base.name(),
        terms.join(", ")
    )
}

fn data(use_: &str, counts: &Counts) -> String {
    let number = |n: usize| figures::count(n as u64);
    let layout = match Layout::of(std::slice::from_ref(counts)) {
        Layout::Template => "through the chat template".to_string(),
        Layout::Plain => "plain text without the chat template".to_string(),
        Layout::Mixed => format!("{} through the chat template, the others plain", number(counts.templated)),
    };
    let mut line = format!(
        "{use_}: {} ({}, {layout}), {} documents, {} tokens, {} to learn",
        counts.path.display(),
        counts.format.name(),
        number(counts.rows),
        number(counts.tokens),
        number(counts.supervised),
    );
    if counts.lost.documents > 0 {
        line += &format!(", {} not whole after the template", number(counts.lost.documents));
    }
    if counts.truncated > 0 {
        line += &format!(", {} truncated", number(counts.truncated));
    }
    let dropped = counts.dropped_by_truncation + counts.dropped_without_labels;
    if dropped > 0 {
        line += &format!(", {} dropped", number(dropped));
        if let Some(first) = counts.first_dropped {
            line += &format!(" (the first in line {first})");
        }
    }
    line
}

fn course(plan: &Plan, prepared: &Prepared) -> String {
    let train = &plan.train;
    let steps = figures::count(prepared.steps);
    let per_epoch = prepared.sampler(plan).batches_in(0).div_ceil(train.accumulate as u64);
    let length = match train.length {
        Length::Steps(_) => format!("{steps} steps ({:.1} epochs)", prepared.steps as f64 / per_epoch as f64),
        Length::Epochs(epochs) => format!("{epochs} epochs ({steps} steps)"),
    };
    let kind = if plan.data.pack { "packed rows" } else { "documents" };
    let (batch, accumulate, most) = (train.batch_size, train.accumulate, plan.data.max_length);
    format!(
        "course: {length} of {batch} x {accumulate} {kind} of up to {most} tokens, learning rate {:e} {}",
        train.learning_rate,
        train.schedule.name()
    )
}
