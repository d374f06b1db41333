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

use crate::adapter::Targets;
use crate::error::{Error, Result};

mod bounds;
mod builder;
mod choice;
mod declare;
mod distill;
mod document;
mod keys;
mod mixture;
pub mod other_tools;
mod plan;
mod probe;
mod reading;
mod reference;
mod tables;
mod template;
mod typed;
mod upcycle;

pub use builder::PlanBuilder;
pub use choice::{
    Bytes, DtypeChoice, Evaluation, ExpertChoice, Final, Length, MemoryBudget, Method, RecomputeChoice,
    RouterTraining, Task, Warmup,
};
pub use distill::{DistillPlan, DistillRecipe};
pub use document::Document;
pub use keys::{Key, Kind, Table};
pub use mixture::{LossesRecipe, MixturePlan, RoutingRecipe};
pub use plan::{AdapterPlan, ContinuedAdapter, FreshAdapter, Plan, Trained};
pub use reference::{commented, schema};
pub use tables::{
    AdapterRecipe, DataPlan, DataRecipe, EvalFiles, ModelPlan, ModelRecipe, TrainPlan, TrainRecipe,
};
pub use template::{Date, TemplateVariables};
pub use upcycle::{CalibrationRecipe, FormatChoice, MethodRecipe, UpcyclePlan, UpcycleRecipe};

pub(crate) use document::{LARGEST_RECIPE, written};
pub(crate) use upcycle::name_of;

use bounds::Bound;
use declare::keys;

keys! {
    table "" like "a table";

    /// A fine-tuning recipe as it was written: what is `None` was left out.
    written pub struct Recipe;

    /// The tables of a recipe, where those that are left out are empty.
    planned pub(super) struct Tables {
        /// The run directory.
        output: PathBuf,
        /// The adapter; `None`: all weights are trained.
        adapter: Option<AdapterRecipe>,
    }

    /// What the recipe is for.
    task: Task, "\"finetune\"";
    /// The seed of everything random.
    seed: u64 [Bound::at_least(0)] = 42;
    /// The run directory.
    output: PathBuf => "`runs/` and the name of the recipe's file", "\"runs/first\"";
    /// The model that is trained.
    model: ModelRecipe, "{ source = \"HuggingFaceTB/SmolLM2-135M\" }";
    /// The adapter; left out where all weights are trained.
    adapter: AdapterRecipe => "none, which `train.full` needs", "{ rank = 16 }";
    /// The data that the model is trained and evaluated on.
    data: DataRecipe, "{ train = [{ path = \"train.jsonl\" }] }";
    /// How the model is trained.
    train: TrainRecipe = TrainRecipe::default(), "{ epochs = 3 }";
    /// How a mixture of experts sends tokens to its experts.
    routing: RoutingRecipe = RoutingRecipe::default(), "{ capacity_factor = 1.25 }";
    /// Losses that spread the tokens over the experts of a mixture.
    losses: LossesRecipe = LossesRecipe::default(), "{ switch = 0.01 }";
    /// A teacher that the model learns from.
    distill: DistillRecipe = DistillRecipe::default(), "{ teacher = \"models/dense\" }";
}

/// The tables of a fine-tuning recipe.
const FINETUNE: &[Table] = &[
    Recipe::TABLE,
    ModelRecipe::TABLE,
    AdapterRecipe::TABLE,
    DataRecipe::TABLE,
    tables::SOURCE,
    TrainRecipe::TABLE,
    RoutingRecipe::TABLE,
    LossesRecipe::TABLE,
    DistillRecipe::TABLE,
];

/// The tables of an upcycling recipe.
const UPCYCLE: &[Table] =
    &[UpcycleRecipe::TABLE, ModelRecipe::TABLE, MethodRecipe::TABLE, CalibrationRecipe::TABLE];

impl Task {
    /// What a recipe is for.
    pub fn of(document: &Document) -> Result<Self> {
        document.key("task", "begin the recipe with `task = \"finetune\"`")
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

    /// The models, the adapter and the data that it names, and the keys that name them.
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
                if let Trained::Adapter(adapter) = &plan.trained {
                    files.extend(adapter.earlier().map(|from| ("adapter.from", from.to_path_buf())));
                }
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
        let mut document = document.clone();
        document.rename_old_keys()?;
        let recipe: Self = document.read()?;
        let contradictions = recipe.contradictions();
        if contradictions.is_empty() { Ok(recipe) } else { Err(document.errors_at(contradictions)) }
    }

    /// Keys that other keys forbid, each with what is wrong.
    fn contradictions(&self) -> Vec<(&'static str, Error)> {
        let Tables { train, adapter, data, routing, losses, distill, .. } = Tables::of(self, "");
        let full = train.full.unwrap_or(false);
        let mut found = Vec::from_iter(routing.contradiction(&train));
        found.extend(losses.contradiction());
        found.extend(distill.contradiction());
        if train.steps.is_some() && train.epochs.is_some() {
            let error = Error::request("`train.steps` and `train.epochs` both say how long to train");
            found.push(("train.epochs", error.with_hint("leave one of them out")));
        }
        if full && adapter.is_some() {
            let error =
                Error::request("`train.full = true` trains all weights, so there can be no `[adapter]`");
            found.push(("train.full", error.with_hint("leave one of them out")));
        }
        if !full && adapter.is_none() {
            let error = Error::request("nothing would be trained: there is no `[adapter]`");
            let hint = "add an `[adapter]` table, or set `train.full = true` to train all weights";
            found.push(("adapter", error.with_hint(hint)));
        }
        if let Some(AdapterRecipe { targets: Some(Targets::Names(names)), .. }) = adapter
            && names.is_empty()
        {
            let error = Error::request("`adapter.targets` is empty, so nothing would be trained");
            found.push(("adapter.targets", error.with_hint("\"all-linear\" takes every linear layer")));
        }
        let eval = match &data.eval {
            Some(EvalFiles::Files(files)) => Some(files),
            Some(EvalFiles::Off(_)) | None => None,
        };
        if data.eval.is_some() && data.eval_share.is_some() {
            let error = Error::request("`data.eval` and `data.eval_share` both say what to evaluate on");
            found.push(("data.eval_share", error.with_hint("leave one of them out")));
        }
        for (key, sources) in [("data.train", Some(&data.train)), ("data.eval", eval)] {
            if sources.is_some_and(Vec::is_empty) {
                found.push((key, Error::request(format!("`{key}` is empty: expected at least one file"))));
            }
        }
        found
    }
}

impl Tables {
    /// Those of a recipe whose file has this name without its ending.
    pub(super) fn of(recipe: &Recipe, name: &str) -> Self {
        let output = recipe.output.clone().unwrap_or_else(|| PathBuf::from("runs").join(name));
        Self::of_keys(recipe, output, recipe.adapter.clone())
    }
}
