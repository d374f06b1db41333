//! An experiment as text: [`Document`] (TOML with flags laid over) -> [`Recipe`] (what was written) -> [`Plan`] (what
//! will happen).
//!
//! A recipe opens no file but its own. Every key may be left out unless a run has no sense without it; a key that
//! is not known is an error. Relative paths are relative to the current directory, not to the recipe.
//!
//! ```
//! use peft::recipe::{Document, Plan, Recipe};
//!
//! let text = r#"
//!     task = "finetune"
//!     model.source = "examples/tiny-llama"
//!     adapter.rank = 8
//!     data.train = [{ path = "datasets/quickstart.jsonl" }]
//! "#;
//! let recipe = Recipe::read(&Document::parse("first.toml", text)?)?;
//! let plan = Plan::of(&recipe, "first");
//! assert_eq!(plan.output.to_str(), Some("runs/first"));
//! # Ok::<(), peft::Error>(())
//! ```

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::adapter::{Init, Targets};
use crate::data::{Format, SpecialTokens, TrainOn};
use crate::error::{Error, Result};
use crate::train::Schedule;

mod artifact;
mod bounds;
mod calibration;
mod check;
mod choice;
mod continued;
mod conversion;
mod describe;
mod disk;
mod distill;
mod document;
pub mod figures;
mod files;
mod finetune;
mod fitting;
mod kernels;
mod loaded;
mod memory;
mod mixture;
pub mod other_tools;
mod output;
mod plan;
mod prepared;
mod template;
mod told;
mod typed;
mod units;
mod upcycle;

pub use check::{Report, Segment, Target, check};
pub use choice::{Bytes, DtypeChoice, Method, RecomputeChoice, Task};
pub use conversion::{UpcycleCheck, check_upcycle, upcycle};
pub use distill::{DistillPlan, PreparedTeacher};
pub use document::Document;
pub use finetune::finetune;
pub use fitting::Memory;
pub use kernels::ChosenKernels;
pub use loaded::{Loaded, read_adapter};
pub use memory::{Components, Moment, Needs, Way};
pub use plan::{
    AdapterPlan, DataPlan, Evaluation, Length, MemoryBudget, ModelPlan, Plan, Said, TrainPlan, Trained,
};
pub use prepared::{PlacedAdapter, Prepared, Trainable, Trainee};
pub use template::{Date, TemplateVariables};
pub use told::text_of;
pub use upcycle::{UpcyclePlan, UpcycleRecipe};

use distill::Distill;
pub use mixture::{ExpertChoice, MixturePlan, RouterTraining};
use mixture::{Losses, Routing};

/// A fine-tuning recipe as it was written: what is `None` was left out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub struct Recipe {
    /// Always [`Task::Finetune`] here.
    pub task: Task,
    /// The seed of everything random.
    #[serde(default, deserialize_with = "bounds::at_least::<_, 0>")]
    pub seed: Option<u64>,
    /// The run directory.
    pub output: Option<PathBuf>,
    /// What is trained.
    pub model: ModelRecipe,
    /// The adapter; left out when all weights are trained.
    pub adapter: Option<AdapterRecipe>,
    /// What it is trained on.
    pub data: DataRecipe,
    /// How it is trained.
    #[serde(default)]
    pub train: TrainRecipe,
    #[serde(default, skip_serializing_if = "Routing::is_default")]
    routing: Routing,
    #[serde(default, skip_serializing_if = "Losses::is_default")]
    losses: Losses,
    #[serde(default, skip_serializing_if = "Distill::is_default")]
    distill: Distill,
}

/// `[model]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub struct ModelRecipe {
    /// A folder, a `.gguf` file or a Hub id.
    pub source: String,
    /// The number format of the frozen weights.
    pub dtype: Option<DtypeChoice>,
}

/// `[adapter]`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a table")]
pub struct AdapterRecipe {
    /// The kind of adapter.
    pub method: Option<Method>,
    /// Columns of the low-rank factors; 0: no adapter.
    #[serde(deserialize_with = "bounds::count::<_, 0, { bounds::RANK }>")]
    pub rank: Option<usize>,
    /// The numerator of the scale.
    #[serde(deserialize_with = "bounds::positive::<_, 1_000_000>")]
    pub alpha: Option<f64>,
    /// Share of the inputs dropped in training.
    #[serde(deserialize_with = "bounds::below_one")]
    pub dropout: Option<f64>,
    /// The layers that get one.
    pub targets: Option<Targets>,
    /// How the factors begin.
    pub init: Option<Init>,
    /// Whether the scale is alpha / sqrt(rank) instead of alpha / rank.
    pub rslora: Option<bool>,
    /// Seed of the factors.
    #[serde(deserialize_with = "bounds::at_least::<_, 0>")]
    pub seed: Option<u64>,
    /// Seed of the dropout masks.
    #[serde(deserialize_with = "bounds::at_least::<_, 0>")]
    pub dropout_seed: Option<u64>,
    /// The adapter to go on training.
    pub from: Option<PathBuf>,
    /// Which experts of a mixture get one.
    pub experts: Option<ExpertChoice>,
    /// Whether shared experts get one.
    pub shared_experts: Option<bool>,
}

/// `[data]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub struct DataRecipe {
    /// Files to train on.
    #[serde(deserialize_with = "files::list")]
    pub train: Vec<SourceRecipe>,
    /// Files to evaluate on.
    #[serde(default, deserialize_with = "files::optional")]
    pub eval: Option<Vec<SourceRecipe>>,
    /// Share of the documents of `train` held out when `eval` is left out.
    #[serde(default, deserialize_with = "bounds::part")]
    pub eval_share: Option<f64>,
    /// Tokens of the longest document.
    #[serde(default, deserialize_with = "bounds::count::<_, 2, { bounds::TOKENS }>")]
    pub max_length: Option<usize>,
    /// Whether a batch is filled with as many documents as fit.
    pub pack: Option<bool>,
    /// Which tokens are learned.
    pub train_on: Option<TrainOn>,
    /// Sets the variables that chat templates get in addition to the conversation: the date, and any other.
    pub template: Option<TemplateVariables>,
    /// Whether control tokens such as `<|im_end|>` in the data are the model's own tokens or text.
    pub special_tokens: Option<SpecialTokens>,
}

/// A file of `[data]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table such as { path = \"data.jsonl\" }")]
pub struct SourceRecipe {
    /// A `.jsonl` or `.json` file; in `[data]` also a folder of them, or a pattern such as `data/*.jsonl`.
    pub path: PathBuf,
    /// How often each document is seen per epoch.
    #[serde(default, deserialize_with = "bounds::positive::<_, 1000>")]
    pub weight: Option<f64>,
    /// What its records look like.
    pub format: Option<Format>,
}

/// `[train]`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a table")]
pub struct TrainRecipe {
    /// Whether all weights are trained, without an adapter.
    pub full: Option<bool>,
    /// Optimizer steps.
    #[serde(deserialize_with = "bounds::between::<_, 1, { bounds::STEPS }>")]
    pub steps: Option<u64>,
    /// Passes over the training data, instead of `steps`.
    #[serde(deserialize_with = "bounds::epochs")]
    pub epochs: Option<f64>,
    /// Rows of a batch.
    #[serde(deserialize_with = "bounds::count::<_, 1, { bounds::ROWS }>")]
    pub batch_size: Option<usize>,
    /// Batches of a step.
    #[serde(deserialize_with = "bounds::count::<_, 1, { bounds::ROWS }>")]
    pub accumulate: Option<usize>,
    /// The highest learning rate.
    #[serde(deserialize_with = "bounds::positive::<_, 10>")]
    pub learning_rate: Option<f64>,
    /// Its course.
    pub schedule: Option<Schedule>,
    /// Share of the steps in which it rises.
    #[serde(deserialize_with = "bounds::share")]
    pub warmup: Option<f64>,
    /// Decoupled weight decay.
    #[serde(deserialize_with = "bounds::not_negative::<_, 100>")]
    pub weight_decay: Option<f64>,
    /// Gradients are scaled down to this norm; 0: never.
    #[serde(deserialize_with = "bounds::not_negative::<_, 1_000_000_000>")]
    pub max_grad_norm: Option<f64>,
    /// Steps between evaluations, one before the first step and one at the end; 0: only at the end.
    #[serde(deserialize_with = "bounds::between::<_, 0, { bounds::STEPS }>")]
    pub eval_every: Option<u64>,
    /// Steps between checkpoints, one at the end; 0: only at the end.
    #[serde(deserialize_with = "bounds::between::<_, 0, { bounds::STEPS }>")]
    pub save_every: Option<u64>,
    /// Checkpoints that are kept, the newest.
    #[serde(deserialize_with = "bounds::count::<_, 1, { bounds::CHECKPOINTS }>")]
    pub keep: Option<usize>,
    /// What is recomputed in the backward pass.
    pub checkpoint: Option<RecomputeChoice>,
    /// The memory that recomputation and pieces are chosen for.
    pub memory_budget: Option<Bytes>,
    /// What of the routers of a mixture of experts is trained.
    #[serde(skip_serializing_if = "is_frozen")]
    pub router: RouterTraining,
}

fn is_frozen(router: &RouterTraining) -> bool {
    *router == RouterTraining::Frozen
}

impl Task {
    /// What a recipe is for.
    pub fn of(document: &Document) -> Result<Self> {
        #[derive(Deserialize)]
        struct OfTask {
            task: Task,
        }

        let read = document.typed::<OfTask>().map_err(|error| match error {
            Error::At { .. } => error.with_hint("begin the recipe with `task = \"finetune\"`"),
            other => other,
        })?;
        Ok(read.task)
    }
}

/// What a recipe of either task comes to.
#[derive(Debug, Clone, PartialEq)]
pub enum Work {
    /// A fine-tuning run.
    Finetune(Box<Plan>),
    /// A conversion.
    Upcycle(Box<UpcyclePlan>),
}

impl Work {
    /// Reads a recipe and fills in the defaults; `name` is the recipe's file name without its ending.
    pub fn of(document: &Document, name: &str) -> Result<Self> {
        Ok(match Task::of(document)? {
            Task::Finetune => Self::Finetune(Box::new(Plan::of(&Recipe::read(document)?, name))),
            Task::Upcycle => Self::Upcycle(Box::new(UpcyclePlan::of(&UpcycleRecipe::read(document)?, name))),
        })
    }

    /// The files that it names, and the keys that name them.
    #[must_use]
    pub fn files(&self) -> Vec<(&'static str, PathBuf)> {
        let of = |key, sources: &[crate::data::Source]| -> Vec<(&'static str, PathBuf)> {
            sources.iter().map(|source| (key, source.path.clone())).collect()
        };
        let mut files = Vec::new();
        match self {
            Self::Finetune(plan) => {
                files.push(("model.source", PathBuf::from(&plan.model.source)));
                files.extend(
                    plan.distill.iter().map(|distill| ("distill.teacher", PathBuf::from(&distill.teacher))),
                );
                files.extend(of("data.train", &plan.data.train));
                if let Evaluation::Files(eval) = &plan.data.eval {
                    files.extend(of("data.eval", eval));
                }
            }
            Self::Upcycle(plan) => {
                files.push(("model.source", PathBuf::from(&plan.model.source)));
                files.extend(plan.sources.iter().map(|source| ("upcycle.sources", PathBuf::from(source))));
                files.extend(of("calibration.data", &plan.data));
                files.extend(of("calibration.eval", &plan.eval));
            }
        }
        files
    }
}

impl Recipe {
    /// Types a document and checks that its keys agree with each other.
    pub fn read(document: &Document) -> Result<Self> {
        if Task::of(document)? == Task::Upcycle {
            let error = Error::request("`task = \"upcycle\"` is no fine-tuning run")
                .with_hint("`peft upcycle` runs this recipe");
            return Err(document.error_at("task", error));
        }
        let recipe: Self = document.typed()?;
        match recipe.contradiction() {
            None => Ok(recipe),
            Some((key, error)) => Err(document.error_at(key, error)),
        }
    }

    /// A key that another key, or this version, forbids.
    fn contradiction(&self) -> Option<(&'static str, Error)> {
        let Self { adapter, data, train, .. } = self;
        let full = train.full.unwrap_or(false);
        if let Some(found) = self.contradiction_of_routing() {
            return Some(found);
        }
        if let Some(error) = self.distill.contradiction() {
            return Some(("distill.kl", error));
        }
        if train.steps.is_some() && train.epochs.is_some() {
            let error = Error::request("`train.steps` and `train.epochs` both say how long to train");
            return Some(("train.epochs", error.with_hint("leave one of them out")));
        }
        if full && adapter.is_some() {
            let error =
                Error::request("`train.full = true` trains all weights, so there can be no `[adapter]`");
            return Some(("train.full", error.with_hint("leave one of them out")));
        }
        if !full && adapter.is_none() {
            let error = Error::request("nothing would be trained: there is no `[adapter]`");
            let hint = "add an `[adapter]` table, or set `train.full = true` to train all weights";
            return Some(("adapter", error.with_hint(hint)));
        }
        if let Some(AdapterRecipe { targets: Some(Targets::Names(names)), .. }) = adapter
            && names.is_empty()
        {
            let error = Error::request("`adapter.targets` is empty, so nothing would be trained");
            return Some(("adapter.targets", error.with_hint("\"all-linear\" takes every linear layer")));
        }
        for (key, sources) in [("data.train", Some(&data.train)), ("data.eval", data.eval.as_ref())] {
            if sources.is_some_and(Vec::is_empty) {
                return Some((key, Error::request(format!("`{key}` is empty: expected at least one file"))));
            }
        }
        None
    }
}
