//! What will happen: a [`Recipe`] with every default filled in.

use std::path::PathBuf;

use super::choice::{Bytes, DtypeChoice, Method, RecomputeChoice, Task};
use super::distill::DistillPlan;
use super::document::written;
use super::mixture::{ExpertChoice, MixturePlan, excluded};
use super::{AdapterRecipe, DataRecipe, ModelRecipe, Recipe, SourceRecipe, TemplateVariables, TrainRecipe};
use crate::adapter::{Exclude, LoraConfig, Targets};
use crate::data::{Source, SpecialTokens, TrainOn};
use crate::error::Result;
use crate::train::Schedule;

/// A fine-tuning run before it opens anything. Nothing in it means "the default".
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// The seed of everything random.
    pub seed: u64,
    /// The run directory.
    pub output: PathBuf,
    /// What is trained.
    pub model: ModelPlan,
    /// Which part of it.
    pub trained: Trained,
    /// On what.
    pub data: DataPlan,
    /// How.
    pub train: TrainPlan,
    /// How experts are chosen, and what is trained of that.
    pub mixture: MixturePlan,
    /// The model that the trained one is to be like; `None`: none.
    pub distill: Option<DistillPlan>,
}

/// The model to train.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelPlan {
    /// A folder, a `.gguf` file or a Hub id.
    pub source: String,
    /// The number format of the frozen weights.
    pub dtype: DtypeChoice,
}

/// What a run trains.
#[derive(Debug, Clone, PartialEq)]
pub enum Trained {
    /// An adapter beside frozen weights.
    Adapter(Box<AdapterPlan>),
    /// All weights.
    Full,
}

/// The adapter to train.
#[derive(Debug, Clone, PartialEq)]
pub struct AdapterPlan {
    /// Its rank, scale, targets and first values; alpha is always said.
    pub config: LoraConfig,
    /// The adapter to go on training; `None`: a fresh one.
    pub from: Option<PathBuf>,
    /// Which values of `config` the recipe says itself. Those have to be the values of the adapter in `from`; the others
    /// it brings along.
    pub said: Said,
    /// Which experts of a mixture get one.
    pub experts: ExpertChoice,
    /// Whether shared experts get one.
    pub shared_experts: bool,
}

/// What a recipe says of an adapter. Of a fresh one a plan says everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Said {
    /// `adapter.rank`
    pub rank: bool,
    /// `adapter.alpha`
    pub alpha: bool,
    /// `adapter.targets`
    pub targets: bool,
    /// `adapter.rslora`
    pub rslora: bool,
    /// `adapter.experts`
    pub experts: bool,
    /// `adapter.shared_experts`
    pub shared_experts: bool,
}

impl Said {
    /// Everything.
    pub const ALL: Self =
        Self { rank: true, alpha: true, targets: true, rslora: true, experts: true, shared_experts: true };
}

/// The data of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct DataPlan {
    /// Files to train on.
    pub train: Vec<Source>,
    /// What the model is evaluated on.
    pub eval: Evaluation,
    /// Tokens of the longest document.
    pub max_length: usize,
    /// Whether a batch is filled with as many documents as fit.
    pub pack: bool,
    /// Which tokens are learned.
    pub train_on: TrainOn,
    /// Holds the variables that chat templates get in addition to the conversation.
    pub template: TemplateVariables,
    /// Says how control tokens in the data are encoded; `None`: as the model's record says, else as tokens of their own.
    pub special_tokens: Option<SpecialTokens>,
}

/// What a model is evaluated on while it is trained.
#[derive(Debug, Clone, PartialEq)]
pub enum Evaluation {
    /// Files of their own.
    Files(Vec<Source>),
    /// This share of the training documents, which is then not trained on.
    Share(f64),
}

/// How a run trains.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainPlan {
    /// How long.
    pub length: Length,
    /// Rows of a batch.
    pub batch_size: usize,
    /// Batches of a step.
    pub accumulate: usize,
    /// The highest learning rate.
    pub learning_rate: f64,
    /// Its course.
    pub schedule: Schedule,
    /// Share of the steps in which it rises.
    pub warmup: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Gradients are scaled down to this norm; 0: never.
    pub max_grad_norm: f64,
    /// Steps between evaluations, one before the first step and one at the end; 0: only at the end.
    pub eval_every: u64,
    /// Steps between checkpoints, one at the end; 0: only at the end.
    pub save_every: u64,
    /// Checkpoints that are kept, the newest.
    pub keep: usize,
    /// What is recomputed in the backward pass.
    pub checkpoint: RecomputeChoice,
    /// The memory that recomputation and pieces are chosen for.
    pub memory_budget: MemoryBudget,
}

/// How long a run trains.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Length {
    /// Optimizer steps.
    Steps(u64),
    /// Passes over the training data.
    Epochs(f64),
}

/// How much memory a run may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryBudget {
    /// What the machine has free when the run begins.
    Free,
    /// This much.
    Limit(Bytes),
}

impl Plan {
    /// Fills in the defaults. `name` is the recipe's file name without its ending; the run directory is called after it.
    #[must_use]
    pub fn of(recipe: &Recipe, name: &str) -> Self {
        let seed = recipe.seed.unwrap_or(42);
        Self {
            seed,
            output: recipe.output.clone().unwrap_or_else(|| PathBuf::from("runs").join(name)),
            model: ModelPlan {
                source: recipe.model.source.clone(),
                dtype: recipe.model.dtype.unwrap_or_default(),
            },
            trained: match &recipe.adapter {
                Some(adapter) => Trained::Adapter(Box::new(AdapterPlan::of(adapter, seed))),
                None => Trained::Full,
            },
            data: DataPlan::of(&recipe.data),
            train: TrainPlan::of(&recipe.train),
            mixture: MixturePlan::of(recipe),
            distill: DistillPlan::of(&recipe.distill),
        }
    }

    /// Tokens of a batch of the evaluation: as in training, but no more than are of use.
    #[must_use]
    pub fn eval_tokens(&self) -> usize {
        const ENOUGH: usize = 1024;

        let longest = self.data.max_length;
        longest.saturating_mul(self.train.batch_size).min(longest.max(ENOUGH))
    }

    /// The recipe that says all of the plan: reading it gives the same plan.
    pub fn to_toml(&self) -> Result<String> {
        written(&Recipe::from(self))
    }
}

impl AdapterPlan {
    fn of(recipe: &AdapterRecipe, run_seed: u64) -> Self {
        let rank = recipe.rank.unwrap_or(16);
        let seed = recipe.seed.unwrap_or(run_seed);
        let experts = recipe.experts.clone().unwrap_or(ExpertChoice::All(true));
        let shared_experts = recipe.shared_experts.unwrap_or(true);
        let config = LoraConfig {
            rank,
            exclude: excluded(&experts, shared_experts).map_or_else(Exclude::default, Exclude::Pattern),
            alpha: Some(recipe.alpha.unwrap_or(rank.max(1) as f64)),
            dropout: recipe.dropout.unwrap_or(0.0),
            // The feed-forward layers, where most of a model's weights are.
            targets: recipe
                .targets
                .clone()
                .unwrap_or_else(|| Targets::names(["gate_proj", "up_proj", "down_proj"])),
            init: recipe.init.unwrap_or_default(),
            rslora: recipe.rslora.unwrap_or(false),
            seed,
            // Within the whole numbers of TOML, where the next seed of the last is the first.
            dropout_seed: recipe.dropout_seed.unwrap_or((seed + 1) & i64::MAX as u64),
            ..LoraConfig::default()
        };
        let said = match &recipe.from {
            None => Said::ALL,
            Some(_) => Said {
                rank: recipe.rank.is_some(),
                alpha: recipe.alpha.is_some(),
                targets: recipe.targets.is_some(),
                rslora: recipe.rslora.is_some(),
                experts: recipe.experts.is_some(),
                shared_experts: recipe.shared_experts.is_some(),
            },
        };
        Self { config, from: recipe.from.clone(), said, experts, shared_experts }
    }
}

impl DataPlan {
    fn of(recipe: &DataRecipe) -> Self {
        let sources = |sources: &[SourceRecipe]| sources.iter().map(SourceRecipe::source).collect();
        Self {
            train: sources(&recipe.train),
            eval: match &recipe.eval {
                Some(eval) => Evaluation::Files(sources(eval)),
                None => Evaluation::Share(recipe.eval_share.unwrap_or(0.05)),
            },
            max_length: recipe.max_length.unwrap_or(512),
            pack: recipe.pack.unwrap_or(true),
            train_on: recipe.train_on.unwrap_or_default(),
            template: recipe.template.clone().unwrap_or_default(),
            special_tokens: recipe.special_tokens,
        }
    }
}

impl SourceRecipe {
    pub(super) fn source(&self) -> Source {
        Source {
            path: self.path.clone(),
            weight: self.weight.unwrap_or(1.0),
            format: self.format.unwrap_or_default(),
        }
    }
}

impl TrainPlan {
    fn of(recipe: &TrainRecipe) -> Self {
        Self {
            length: match recipe.steps {
                Some(steps) => Length::Steps(steps),
                None => Length::Epochs(recipe.epochs.unwrap_or(3.0)),
            },
            batch_size: recipe.batch_size.unwrap_or(4),
            accumulate: recipe.accumulate.unwrap_or(1),
            learning_rate: recipe.learning_rate.unwrap_or(2e-4),
            schedule: recipe.schedule.unwrap_or_default(),
            warmup: recipe.warmup.unwrap_or(0.05),
            weight_decay: recipe.weight_decay.unwrap_or(0.0),
            max_grad_norm: recipe.max_grad_norm.unwrap_or(1.0),
            eval_every: recipe.eval_every.unwrap_or(50),
            save_every: recipe.save_every.unwrap_or(50),
            keep: recipe.keep.unwrap_or(3),
            checkpoint: recipe.checkpoint.unwrap_or_default(),
            memory_budget: recipe.memory_budget.map_or(MemoryBudget::Free, MemoryBudget::Limit),
        }
    }
}

impl From<&Plan> for Recipe {
    fn from(plan: &Plan) -> Self {
        let Plan { seed, output, model, trained, data, train, mixture, distill } = plan;
        let (routing, losses) = mixture.tables();
        let sources = |sources: &[Source]| sources.iter().map(SourceRecipe::from).collect();
        Self {
            task: Task::Finetune,
            seed: Some(*seed),
            output: Some(output.clone()),
            model: ModelRecipe { source: model.source.clone(), dtype: Some(model.dtype) },
            adapter: match trained {
                Trained::Adapter(adapter) => Some(AdapterRecipe::from(&**adapter)),
                Trained::Full => None,
            },
            data: DataRecipe {
                train: sources(&data.train),
                eval: match &data.eval {
                    Evaluation::Files(eval) => Some(sources(eval)),
                    Evaluation::Share(_) => None,
                },
                eval_share: match data.eval {
                    Evaluation::Files(_) => None,
                    Evaluation::Share(share) => Some(share),
                },
                max_length: Some(data.max_length),
                pack: Some(data.pack),
                train_on: Some(data.train_on),
                // Left out where nothing is said, so that the recipes of earlier runs are still theirs.
                template: (data.template != TemplateVariables::default()).then(|| data.template.clone()),
                special_tokens: data.special_tokens,
            },
            train: TrainRecipe {
                full: Some(*trained == Trained::Full),
                router: mixture.router,
                ..TrainRecipe::from(train)
            },
            routing,
            losses,
            distill: distill.as_ref().map(DistillPlan::table).unwrap_or_default(),
        }
    }
}

impl From<&AdapterPlan> for AdapterRecipe {
    fn from(plan: &AdapterPlan) -> Self {
        let LoraConfig { rank, dropout, targets, init, rslora, seed, dropout_seed, .. } = &plan.config;
        let said = plan.said;
        // A fresh adapter is on all experts unless its recipe says otherwise, and dense models have none.
        let writes = |said: bool, is_default: bool| said && !(plan.from.is_none() && is_default);
        Self {
            method: Some(Method::Lora),
            rank: said.rank.then_some(*rank),
            alpha: said.alpha.then(|| plan.config.alpha()),
            dropout: Some(*dropout),
            targets: said.targets.then(|| targets.clone()),
            init: Some(*init),
            rslora: said.rslora.then_some(*rslora),
            seed: Some(*seed),
            dropout_seed: Some(*dropout_seed),
            from: plan.from.clone(),
            experts: writes(said.experts, plan.experts == ExpertChoice::All(true))
                .then(|| plan.experts.clone()),
            shared_experts: writes(said.shared_experts, plan.shared_experts).then_some(plan.shared_experts),
        }
    }
}

impl From<&Source> for SourceRecipe {
    fn from(source: &Source) -> Self {
        Self { path: source.path.clone(), weight: Some(source.weight), format: Some(source.format) }
    }
}

impl From<&TrainPlan> for TrainRecipe {
    fn from(plan: &TrainPlan) -> Self {
        Self {
            full: None,
            steps: match plan.length {
                Length::Steps(steps) => Some(steps),
                Length::Epochs(_) => None,
            },
            epochs: match plan.length {
                Length::Steps(_) => None,
                Length::Epochs(epochs) => Some(epochs),
            },
            batch_size: Some(plan.batch_size),
            accumulate: Some(plan.accumulate),
            learning_rate: Some(plan.learning_rate),
            schedule: Some(plan.schedule),
            warmup: Some(plan.warmup),
            weight_decay: Some(plan.weight_decay),
            max_grad_norm: Some(plan.max_grad_norm),
            eval_every: Some(plan.eval_every),
            save_every: Some(plan.save_every),
            keep: Some(plan.keep),
            checkpoint: Some(plan.checkpoint),
            memory_budget: match plan.memory_budget {
                MemoryBudget::Free => None,
                MemoryBudget::Limit(bytes) => Some(bytes),
            },
            router: Default::default(),
        }
    }
}
