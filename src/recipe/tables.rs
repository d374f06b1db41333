//! The tables of a fine-tuning recipe, key by key.

use std::path::PathBuf;

use super::Task;
use super::bounds::{self, Bound};
use super::choice::{
    Bytes, DtypeChoice, Evaluation, ExpertChoice, Final, Length, MemoryBudget, Method, RecomputeChoice,
    RouterTraining, Warmup,
};
use super::declare::keys;
use super::document::{Node, Value};
use super::keys::{Kind, Table, Written};
use super::reading::{Faults, KeyValue, leaves};
use super::template::TemplateVariables;
use super::typed::{Fault, read_leaf};
use crate::adapter::{Init, Targets};
use crate::data::{Format, Source, SpecialTokens, TrainOn};
use crate::train::Schedule;

leaves!(
    Task,
    DtypeChoice,
    Final,
    Method,
    RecomputeChoice,
    Bytes,
    Init,
    TrainOn,
    Format,
    SpecialTokens,
    Schedule
);

impl KeyValue for Targets {
    fn read(node: &Node, faults: &mut Faults) -> Option<Self> {
        faults.kept(read_leaf(node), &node.origin)
    }

    fn kind() -> Kind {
        Kind::Words("a list of names, a regular expression, or \"all-linear\"".to_string())
    }
}

impl KeyValue for Warmup {
    fn read(node: &Node, faults: &mut Faults) -> Option<Self> {
        match node.value {
            Value::Integer(number @ 2..) if number as u64 <= bounds::STEPS => {
                Some(Self::Steps(number as u64))
            }
            Value::Integer(number @ 0..=1) => Some(Self::Share(number as f64)),
            // Negative zero is zero.
            Value::Float(number) if (0.0..=1.0).contains(&number) => Some(Self::Share(number + 0.0)),
            _ => {
                let expected = "a share of the steps from 0 to 1, or a whole number of steps from 2 on";
                faults.add(Fault::unfit(expected, node), &node.origin);
                None
            }
        }
    }

    fn kind() -> Kind {
        Kind::Words("a number from 0 to 1, or a whole number of steps from 2 on".to_string())
    }
}

/// `data.eval`: files, or `false`.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
#[serde(untagged)]
pub enum EvalFiles {
    /// No evaluation.
    Off(bool),
    /// Files of their own.
    Files(Vec<Source>),
}

impl KeyValue for EvalFiles {
    fn read(node: &Node, faults: &mut Faults) -> Option<Self> {
        match node.value {
            Value::Boolean(false) => Some(Self::Off(false)),
            Value::Boolean(true) => {
                faults.add(Fault::unfit("`false` or a list of files", node), &node.origin);
                None
            }
            _ => Vec::read(node, faults).map(Self::Files),
        }
    }

    fn kind() -> Kind {
        Kind::OneOf(vec![Kind::Words("`false`".to_string()), Vec::<Source>::kind()])
    }
}

impl KeyValue for TemplateVariables {
    fn read(node: &Node, faults: &mut Faults) -> Option<Self> {
        faults.kept(read_leaf(node), &node.origin)
    }

    fn kind() -> Kind {
        Kind::Words("a table such as { date = \"2024-07-26\", enable_thinking = false }".to_string())
    }
}

keys! {
    table "model" like "a table";

    /// `[model]`
    written pub struct ModelRecipe;

    /// The model to train.
    planned pub struct ModelPlan {
        /// What cards and PEFT's configuration call the model, where that is not its source.
        id: Option<String>,
    }

    /// A folder, a `.gguf` file or a Hub id.
    source: String, "\"HuggingFaceTB/SmolLM2-135M\"";
    /// What the adapter's card and PEFT's configuration call the model, so that others find it: an id of the Hub.
    id: String => "the name in `model.source`", "\"HuggingFaceTB/SmolLM2-135M\"";
    /// The number format of the frozen weights.
    dtype: DtypeChoice = DtypeChoice::default();
}

keys! {
    table "adapter" like "a table";

    /// `[adapter]`
    #[derive(Default)]
    written pub struct AdapterRecipe;

    /// The keys of an adapter that have a value of their own.
    planned pub(super) struct AdapterValues {}

    /// The kind of adapter.
    method: Method = Method::default();
    /// Columns of the low-rank factors; 0: no adapter.
    rank: usize [Bound::Whole(0, bounds::RANK)] = 16;
    /// The numerator of the scale.
    alpha: f64 [Bound::Positive(1e6)] => "the rank", "32";
    /// Share of the inputs that is dropped in training.
    dropout: f64 [Bound::BelowOne] = 0.0;
    /// The layers that get an adapter: names, a regular expression, or "all-linear".
    targets: Targets = Targets::names(["gate_proj", "up_proj", "down_proj"]);
    /// How the factors begin.
    init: Init = Init::default();
    /// Whether the scale is alpha / sqrt(rank) instead of alpha / rank.
    rslora: bool = false;
    /// Seed of the factors.
    seed: u64 [Bound::at_least(0)] => "the `seed` of the recipe", "7";
    /// Seed of the dropout masks.
    dropout_seed: u64 [Bound::at_least(0)] => "one more than `adapter.seed`", "8";
    /// The adapter to go on training, as a folder.
    from: PathBuf => "a fresh adapter", "\"runs/first\"";
    /// Which experts of a mixture get one: all, none, or those with these numbers.
    experts: ExpertChoice = ExpertChoice::All(true);
    /// Whether shared experts get one.
    shared_experts: bool = true;
}

keys! {
    table "data" like "a table";

    /// `[data]`
    written pub struct DataRecipe;

    /// The data of a run.
    planned pub struct DataPlan {
        /// What the model is evaluated on.
        eval: Evaluation,
        /// Holds the variables that chat templates get in addition to the conversation.
        template: TemplateVariables,
        /// Says how control tokens in the data are encoded; `None`: as the model's record says, else as tokens of their own.
        special_tokens: Option<SpecialTokens>,
    }

    /// Files to train on: a list of tables or paths, or one path.
    train: Vec<Source>, "[{ path = \"train.jsonl\" }]";
    /// Files to evaluate on; `false`: no evaluation.
    eval: EvalFiles => "a share of `data.train`", "[{ path = \"eval.jsonl\" }]";
    /// Share of the documents of `train` that is held out when `eval` is left out.
    eval_share: f64 [Bound::Part] => "0.05, but nothing of fewer than 50 documents", "0.1";
    /// Tokens of the longest document.
    max_length: usize [Bound::Whole(2, bounds::TOKENS)] = 512;
    /// Whether a batch is filled with as many documents as fit.
    pack: bool = true;
    /// Which tokens are learned.
    train_on: TrainOn = TrainOn::default();
    /// Variables that chat templates get in addition to the conversation: the date, and any other.
    template: TemplateVariables => "no variables, and the date of today", "{ enable_thinking = false }";
    /// Whether control tokens such as `<|im_end|>` in the data are the model's own tokens or text.
    special_tokens: SpecialTokens => "as the model's record says, else \"tokens\"", "\"text\"";
}

keys! {
    table "data.train" like "a path in a string, or a table such as { path = \"data.jsonl\" }";

    /// A file of `[data]`.
    written struct SourceKeys;

    /// A file of `[data]` with its defaults.
    planned struct SourceValues {}

    /// A `.jsonl` or `.json` file, a folder of them, or a pattern such as `data/*.jsonl`.
    path: PathBuf, "\"train.jsonl\"";
    /// How often each document is seen in an epoch.
    weight: f64 [Bound::Positive(1000.0)] = 1.0;
    /// What its records look like.
    format: Format = Format::default();
}

/// The keys of a file of `[data]`.
pub(super) const SOURCE: Table = SourceKeys::TABLE;

impl KeyValue for Source {
    fn read(node: &Node, faults: &mut Faults) -> Option<Self> {
        let SourceValues { path, weight, format } = match &node.value {
            Value::String(path) => SourceValues::of_path(path),
            _ => SourceValues::of_keys(&SourceKeys::read(node, faults)?),
        };
        Some(Self { path, weight, format })
    }

    fn kind() -> Kind {
        Kind::OneOf(vec![Kind::Text, SourceKeys::kind()])
    }

    fn stands_alone(value: &Value) -> bool {
        matches!(value, Value::String(_))
    }

    const LIST: &str = "a list of files, or a path in a string";
}

impl SourceValues {
    fn of_path(path: &str) -> Self {
        Self::of_keys(&SourceKeys { path: path.into(), weight: None, format: None })
    }
}

keys! {
    table "train" like "a table";

    /// `[train]`
    #[derive(Default)]
    written pub struct TrainRecipe;

    /// How a run trains.
    planned pub struct TrainPlan {
        /// Says how long the run trains.
        length: Length,
        /// The memory that recomputation and pieces are chosen for.
        memory_budget: MemoryBudget,
    }

    /// Whether all weights are trained, without an adapter.
    full: bool => "false", "true";
    /// Optimizer steps.
    steps: u64 [Bound::Whole(1, bounds::STEPS)] => "as many as `train.epochs` takes", "500";
    /// Passes over the training data, instead of `steps`.
    epochs: f64 [Bound::Positive(1e4)] => "3 where `train.steps` is left out", "1.5";
    /// Rows of a batch.
    batch_size: usize [Bound::Whole(1, bounds::ROWS)] = 4;
    /// Batches of a step.
    accumulate: usize [Bound::Whole(1, bounds::ROWS)] = 1;
    /// The highest learning rate.
    learning_rate: f64 [Bound::Positive(10.0)] = 2e-4;
    /// The course of the learning rate after the warmup.
    schedule: Schedule = Schedule::default();
    /// Steps in which the learning rate rises: a share of all from 0 to 1, or their number from 2 on.
    warmup: Warmup = Warmup::Share(0.05);
    /// Decoupled weight decay.
    weight_decay: f64 [Bound::NotNegative(100.0)] = 0.0;
    /// Gradients are scaled down to this norm; 0: never.
    max_grad_norm: f64 [Bound::NotNegative(1e9)] = 1.0;
    /// Steps between evaluations, one before the first step and one at the end; 0: only at the end.
    eval_every: u64 [Bound::Whole(0, bounds::STEPS)] = 50;
    /// Steps between checkpoints, one at the end; 0: only at the end.
    save_every: u64 [Bound::Whole(0, bounds::STEPS)] = 50;
    /// Checkpoints that are kept, the newest.
    keep: usize [Bound::Whole(1, bounds::CHECKPOINTS)] = 3;
    /// Which weights the run leaves as its result: those of the best evaluation, or of the last step.
    r#final: Final = Final::default();
    /// Which activations are computed again in the backward pass instead of being kept.
    recompute: RecomputeChoice = RecomputeChoice::default();
    /// The memory that recomputation and pieces are chosen for.
    memory_budget: Bytes => "what the machine has free when the run begins", "\"8GiB\"";
    /// What of the routers of a mixture of experts is trained.
    router: RouterTraining => "\"frozen\"", "\"full\"";
}

impl DataPlan {
    pub(super) fn of(recipe: &DataRecipe) -> Self {
        let eval = match (&recipe.eval, recipe.eval_share) {
            (Some(EvalFiles::Files(files)), _) => Evaluation::Files(files.clone()),
            (Some(EvalFiles::Off(_)), _) => Evaluation::Off,
            (None, Some(share)) => Evaluation::Share(share),
            (None, None) => Evaluation::ShareOfMany,
        };
        Self::of_keys(recipe, eval, recipe.template.clone().unwrap_or_default(), recipe.special_tokens)
    }

    /// The table that says it.
    pub(super) fn table(&self) -> DataRecipe {
        let (eval, eval_share) = match &self.eval {
            Evaluation::Files(files) => (Some(EvalFiles::Files(files.clone())), None),
            Evaluation::Off => (Some(EvalFiles::Off(false)), None),
            Evaluation::Share(share) => (None, Some(*share)),
            Evaluation::ShareOfMany => (None, None),
        };
        // Left out where nothing is said, so that the recipes of earlier runs are still theirs.
        let template = (self.template != TemplateVariables::default()).then(|| self.template.clone());
        DataRecipe { eval, eval_share, template, special_tokens: self.special_tokens, ..self.written() }
    }
}

impl TrainPlan {
    pub(super) fn of(recipe: &TrainRecipe) -> Self {
        let length = match recipe.steps {
            Some(steps) => Length::Steps(steps),
            None => Length::Epochs(recipe.epochs.unwrap_or(3.0)),
        };
        let memory_budget = recipe.memory_budget.map_or(MemoryBudget::Free, MemoryBudget::Limit);
        Self::of_keys(recipe, length, memory_budget)
    }

    /// The table that says it, but for what is trained.
    pub(super) fn table(&self) -> TrainRecipe {
        let (steps, epochs) = match self.length {
            Length::Steps(steps) => (Some(steps), None),
            Length::Epochs(epochs) => (None, Some(epochs)),
        };
        let memory_budget = match self.memory_budget {
            MemoryBudget::Free => None,
            MemoryBudget::Limit(bytes) => Some(bytes),
        };
        TrainRecipe { steps, epochs, memory_budget, ..self.written() }
    }
}

impl ModelPlan {
    pub(super) fn of(recipe: &ModelRecipe) -> Self {
        Self::of_keys(recipe, recipe.id.clone())
    }

    /// The table that says it.
    pub(super) fn table(&self) -> ModelRecipe {
        ModelRecipe { id: self.id.clone(), ..self.written() }
    }
}

impl AdapterValues {
    pub(super) fn of(recipe: &AdapterRecipe) -> Self {
        Self::of_keys(recipe)
    }
}
