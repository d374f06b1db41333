//! What to look at before a run starts.

use std::path::Path;

use super::figures;
use super::memory::Memory;
use super::prepared::{Prepared, Trainee};
use crate::adapter::Init;
use crate::data::Warning;
use crate::model::family;
use crate::recipe::{AdapterPlan, ContinuedAdapter, Length, Plan, Trained, Warmup};

/// What to look at before starting.
pub(super) fn warnings(plan: &Plan, prepared: &Prepared, memory: &Memory) -> Vec<String> {
    let teacher = prepared.teacher.iter().flat_map(|teacher| teacher.base.warnings());
    let model = prepared.base.warnings().iter().chain(teacher).cloned();
    let unread = plan.data.template.unread(&prepared.text);
    let unread =
        unread.iter().map(|name| format!("no chat template of the model reads `data.template.{name}`"));
    let data = prepared.dataset.warnings.iter().map(of_data).chain(unread);
    let excess = memory.excess(plan).map(|(text, remedies)| format!("{text}; {remedies}"));
    let of_mixture = [own_number(plan, prepared), own_pieces(plan, memory)].into_iter().flatten();
    let (rate, of_text) = (high_rate(plan), other_text(prepared));
    let course = course(plan, prepared);
    model
        .chain(data)
        .chain(idle_init(plan))
        .chain(excess)
        .chain(of_mixture)
        .chain(rate)
        .chain(course)
        .chain(of_text)
        .collect()
}

/// What there is to say of the data, with the key of the recipe that changes it.
fn of_data(warning: &Warning) -> String {
    match warning {
        Warning::ControlTokens(_, 1, _) => {
            format!("{warning}, and `data.special_tokens = \"text\"` encodes it as text")
        }
        Warning::ControlTokens(..) => {
            format!("{warning}, and `data.special_tokens = \"text\"` encodes them as text")
        }
        _ => warning.to_string(),
    }
}

/// A learning rate that ends in the same loss whatever the data.
fn high_rate(plan: &Plan) -> Option<String> {
    /// No published recipe for AdamW has as much.
    const HIGH: f64 = 0.1;

    let rate = plan.train.learning_rate;
    (rate > HIGH).then(|| {
        format!(
            "`train.learning_rate` is {rate}: each step moves every trained value by about as much, and training will \
             not converge; adapters learn with 1e-4 to 1e-2"
        )
    })
}

/// Warns where the adapter that training goes on with was trained on texts that became other tokens.
fn other_text(prepared: &Prepared) -> Option<String> {
    let Trainee::Adapter(adapter) = &prepared.trained else { return None };
    let source = &adapter.from.as_ref()?.source;
    match prepared.base.adapter_text(Path::new(source)) {
        Ok(text) => Some(text?.said(&format!(
            "the adapter `{source}` has tokenizer files of its own, and this run uses the model's"
        ))),
        Err(error) => Some(format!("the tokenizer files beside the adapter are not used: {error}")),
    }
}

/// An adapter has no place for a number of experts.
fn own_number(plan: &Plan, prepared: &Prepared) -> Option<String> {
    let (_, moe) = prepared.base.config().sparse_layers().next()?;
    let model = family::read(prepared.base.config_json()).ok()?;
    let (_, own) = model.sparse_layers().next()?;
    if moe.active == own.active || plan.trained == Trained::Full {
        return None;
    }
    Some(format!(
        "`routing.active` is {} in this run alone: `peft eval`, `generate` and `merge` take the model's own {} experts of a \
         token",
        moe.active, own.active
    ))
}

/// What a loss on routers is depends on what is computed at once.
fn own_pieces(plan: &Plan, memory: &Memory) -> Option<String> {
    let mixture = &plan.mixture;
    let by_piece = match (mixture.capacity_factor.is_some(), mixture.losses.are_on()) {
        (false, false) => return None,
        (true, false) => "the capacity of experts is",
        (false, true) => "losses on routers are",
        (true, true) => "losses on routers and the capacity of experts are",
    };
    if !memory.several_pieces || memory.budget_is_asked_for {
        return None;
    }
    Some(format!(
        "{by_piece} taken over the tokens computed at once, {} of a batch, and these follow the memory that is free: set \
         `train.memory_budget` for a run that can be repeated",
        figures::count(memory.piece_tokens as u64)
    ))
}

/// First values are for a new adapter.
fn idle_init(plan: &Plan) -> Option<String> {
    let Trained::Adapter(adapter) = &plan.trained else { return None };
    let AdapterPlan::Continue(ContinuedAdapter { expected, .. }) = &**adapter else { return None };
    expected.init.filter(|init| *init != Init::default()).map(|_| {
        "`adapter.init` does nothing beside `adapter.from`: training goes on from the values of that adapter"
            .to_string()
    })
}

/// Below so many updates, one at rate 0 is a good part of them.
const FEW_UPDATES: u64 = 5;

/// Warns of a course that is hardly what was meant.
fn course(plan: &Plan, prepared: &Prepared) -> Vec<String> {
    let (train, steps) = (&plan.train, prepared.steps);
    let mut warnings = Vec::new();
    let rising = train.warmup.updates(steps);
    let says = match train.warmup {
        Warmup::Share(share) => format!("`train.warmup` is {share}, which is {rising} updates"),
        Warmup::Steps(_) => format!("`train.warmup` is {rising} updates"),
    };
    if rising >= steps && steps > 1 {
        warnings.push(format!(
            "{says}, and the run has {steps}: the learning rate rises to the end and is never `train.learning_rate`; a share \
             such as 0.05 is usual"
        ));
    } else if rising > 0 && steps <= FEW_UPDATES {
        warnings.push(format!(
            "the first of {steps} updates has the learning rate 0, where the warmup begins, as in transformers; \
             `train.warmup = 0` begins with the full rate"
        ));
    }
    let mut sampler = prepared.sampler(plan);
    let per_epoch = sampler.batches_in(0).div_ceil(train.accumulate as u64);
    let documents: usize = prepared.dataset.train.iter().map(|part| part.rows.len()).sum();
    let unpacked = (documents as u64).div_ceil(train.batch_size as u64).div_ceil(train.accumulate as u64);
    if plan.data.pack && per_epoch == 1 && unpacked > 1 {
        let epochs = match train.length {
            Length::Epochs(epochs) => format!("{epochs} epochs are {steps} updates"),
            Length::Steps(steps) => format!("{steps} updates are as many epochs"),
        };
        warnings.push(format!(
            "packing puts all {documents} documents into one update, so {epochs}; `data.pack = false` makes {unpacked} \
             updates of an epoch, and so does a smaller `train.batch_size` in part"
        ));
    }
    warnings
}
