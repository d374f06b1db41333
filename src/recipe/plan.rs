//! What will happen: a [`Recipe`] with every default filled in.

use std::path::{Path, PathBuf};

use super::choice::{ExpertChoice, Method, Task};
use super::distill::DistillPlan;
use super::document::written;
use super::mixture::{MixturePlan, excluded};
use super::tables::{AdapterRecipe, AdapterValues, DataPlan, ModelPlan, TrainPlan, TrainRecipe};
use super::{Recipe, Tables};
use crate::adapter::{Exclude, LoraConfig};
use crate::error::Result;

/// A fine-tuning run before it opens anything. Nothing in it means "the default".
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// The seed of everything random.
    pub seed: u64,
    /// The run directory.
    pub output: PathBuf,
    /// The model that is trained.
    pub model: ModelPlan,
    /// Says whether an adapter is trained or all weights.
    pub trained: Trained,
    /// The data that the model is trained and evaluated on.
    pub data: DataPlan,
    /// Says how long and how fast the model is trained.
    pub train: TrainPlan,
    /// Says how experts are chosen, and what of routers is trained.
    pub mixture: MixturePlan,
    /// The teacher that the model learns from; `None`: there is none.
    pub distill: Option<DistillPlan>,
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
pub enum AdapterPlan {
    /// A new one.
    Fresh(FreshAdapter),
    /// One that is there, which training goes on with.
    Continue(ContinuedAdapter),
}

/// A new adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct FreshAdapter {
    /// Its rank, scale, targets and first values; alpha is always said.
    pub config: LoraConfig,
    /// Which experts of a mixture get one.
    pub experts: ExpertChoice,
    /// Whether shared experts get one.
    pub shared_experts: bool,
}

/// An adapter that training goes on with.
#[derive(Debug, Clone, PartialEq)]
pub struct ContinuedAdapter {
    /// Its folder.
    pub from: PathBuf,
    /// Share of the inputs that is dropped in training.
    pub dropout: f64,
    /// Seed of the dropout masks.
    pub dropout_seed: u64,
    /// The keys that the recipe says of it. Where it says rank, alpha, targets and the like, they have to be those of the
    /// adapter.
    pub expected: AdapterRecipe,
}

impl Plan {
    /// Fills in the defaults. `name` is the recipe's file name without its ending; the run directory is called after it.
    #[must_use]
    pub fn of(recipe: &Recipe, name: &str) -> Self {
        let tables = Tables::of(recipe, name);
        let Tables { seed, train, .. } = &tables;
        Self {
            seed: *seed,
            model: ModelPlan::of(&tables.model),
            trained: match &tables.adapter {
                Some(adapter) => Trained::Adapter(Box::new(AdapterPlan::of(adapter, *seed))),
                None => Trained::Full,
            },
            data: DataPlan::of(&tables.data),
            train: TrainPlan::of(train),
            mixture: MixturePlan::of(train, &tables.routing, &tables.losses),
            distill: DistillPlan::of(&tables.distill),
            output: tables.output,
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
        let values = AdapterValues::of(recipe);
        let seed = recipe.seed.unwrap_or(run_seed);
        // Within the whole numbers of TOML, where the next seed of the last is the first.
        let dropout_seed = recipe.dropout_seed.unwrap_or((seed + 1) & i64::MAX as u64);
        let AdapterValues { method, rank, dropout, targets, init, rslora, experts, shared_experts } = values;
        if let Some(from) = recipe.from.clone() {
            let expected = AdapterRecipe {
                method: Some(method),
                dropout: Some(dropout),
                init: Some(init),
                seed: Some(seed),
                dropout_seed: Some(dropout_seed),
                ..recipe.clone()
            };
            return Self::Continue(ContinuedAdapter { from, dropout, dropout_seed, expected });
        }
        let config = LoraConfig {
            rank,
            exclude: excluded(&experts, shared_experts).map_or_else(Exclude::default, Exclude::Pattern),
            alpha: Some(recipe.alpha.unwrap_or(rank.max(1) as f64)),
            dropout,
            targets,
            init,
            rslora,
            seed,
            dropout_seed,
            ..LoraConfig::default()
        };
        Self::Fresh(FreshAdapter { config, experts, shared_experts })
    }

    /// The adapter that training goes on with.
    #[must_use]
    pub fn earlier(&self) -> Option<&Path> {
        match self {
            Self::Fresh(_) => None,
            Self::Continue(adapter) => Some(&adapter.from),
        }
    }

    /// The table that says it.
    fn table(&self) -> AdapterRecipe {
        match self {
            Self::Fresh(adapter) => adapter.table(),
            Self::Continue(adapter) => adapter.expected.clone(),
        }
    }
}

impl FreshAdapter {
    fn table(&self) -> AdapterRecipe {
        let Self { config, experts, shared_experts } = self;
        AdapterRecipe {
            method: Some(Method::Lora),
            rank: Some(config.rank),
            alpha: Some(config.alpha()),
            dropout: Some(config.dropout),
            targets: Some(config.targets.clone()),
            init: Some(config.init),
            rslora: Some(config.rslora),
            seed: Some(config.seed),
            dropout_seed: Some(config.dropout_seed),
            from: None,
            // Left out where an adapter is on all experts, for dense models have none.
            experts: (*experts != ExpertChoice::All(true)).then(|| experts.clone()),
            shared_experts: (!shared_experts).then_some(false),
        }
    }
}

impl From<&Plan> for Recipe {
    fn from(plan: &Plan) -> Self {
        let Plan { seed, output, model, trained, data, train, mixture, distill } = plan;
        let (routing, losses) = mixture.tables();
        Self {
            task: Task::Finetune,
            seed: Some(*seed),
            output: Some(output.clone()),
            model: model.table(),
            adapter: match trained {
                Trained::Adapter(adapter) => Some(adapter.table()),
                Trained::Full => None,
            },
            data: data.table(),
            train: Some(TrainRecipe {
                full: Some(*trained == Trained::Full),
                router: mixture.router_key(),
                ..train.table()
            }),
            routing,
            losses,
            distill: distill.as_ref().map(DistillPlan::table),
        }
    }
}
