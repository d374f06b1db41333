//! `task = "upcycle"`: what was written, and what will happen.

mod conflicts;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::bounds::{self, Bound};
use super::choice::Task;
use super::declare::keys;
use super::document::{Document, written};
use super::reading::leaves;
use super::tables::{ModelPlan, ModelRecipe};
use crate::data::Source;
use crate::error::Result;
use crate::model::family::MixtureFormat;
use crate::upcycle::{KeepDense, Method, Partition, Refit, RouterKind, Settings};

/// Slices of a network unless the recipe says otherwise.
const SLICES: usize = 16;
/// Copies of a network unless the recipe says otherwise.
const COPIES: usize = 8;
/// Copies that a token is sent to unless the recipe says otherwise.
const ACTIVE_COPIES: usize = 2;

keys! {
    table "" like "a table";

    /// An upcycling recipe as it was written: what is `None` was left out.
    written pub struct UpcycleRecipe;

    /// The tables of an upcycling recipe, where those that are left out are empty.
    planned struct UpcycleTables {
        /// The new folder.
        output: PathBuf,
        /// The calibration text; `None`: none.
        calibration: Option<CalibrationRecipe>,
    }

    /// What the recipe is for.
    task: Task, "\"upcycle\"";
    /// The seed of everything random.
    seed: u64 [Bound::at_least(0)] = 42;
    /// The folder that the mixture is written to.
    output: PathBuf => "`models/` and the name of the recipe's file", "\"models/first\"";
    /// The dense model that is converted.
    model: ModelRecipe, "{ source = \"HuggingFaceTB/SmolLM2-135M\" }";
    /// How the model is converted.
    upcycle: MethodRecipe = MethodRecipe::default(), "{ experts = 8 }";
    /// The text that routers and experts are fitted to and measured on.
    calibration: CalibrationRecipe => "none, where the method needs none", "{ data = [{ path = \"text.jsonl\" }] }";
}

keys! {
    table "upcycle" like "a table";

    /// `[upcycle]`
    #[derive(Default)]
    written pub struct MethodRecipe;

    /// The keys of a conversion that have a value of their own.
    planned struct MethodValues {}

    /// How the dense model becomes a mixture.
    method: Method = Method::default();
    /// Slices of each network, shared ones included; of copies how many; for `expand` how many are added.
    experts: usize [Bound::Whole(1, bounds::EXPERTS)] => "16 slices, 8 copies, 1 added expert", "8";
    /// Slices that every token goes through.
    shared: usize [Bound::Whole(0, bounds::EXPERTS)] => "a quarter of `experts`, rounded; of copies 0", "2";
    /// Slices or copies that a token is sent to besides.
    active: usize [Bound::Whole(1, bounds::EXPERTS)]
        => "a quarter of `experts`, rounded and at least 1; of copies 2", "2";
    /// How neurons are spread over slices.
    partition: Partition = Partition::default();
    /// How routers are made.
    router: RouterKind => "\"ridge\" for slices, \"random\" for copies", "\"hidden-kmeans\"";
    /// What down projections are fitted to.
    refit: Refit => "\"local\" for slices, \"none\" for copies", "\"stream\"";
    /// Which layers stay dense.
    keep_dense: KeepDense = KeepDense::default();
    /// Share of the neurons of each copy whose weights are drawn anew.
    drop_ratio: f64 [Bound::Share] => "0.5; 0 for `expand`", "0.3";
    /// Groups of virtual experts.
    groups: usize [Bound::Whole(1, bounds::EXPERTS)] => "4 for `virtual-groups`, else 1", "4";
    /// Further checkpoints whose networks become experts.
    sources: Vec<String> = Vec::new(), "[\"models/other\"]";
    /// Prompts of each expert, from which its router is made.
    prompts: Vec<Vec<String>> = Vec::new(), "[[\"Write a poem\"], [\"Solve\"]]";
    /// The family that the mixture is written as.
    format: FormatChoice = FormatChoice::default();
    /// Whether the mixture is read back and compared with the dense model.
    verify: bool = true;
    /// Whether the account also measures simpler ways to make a mixture of this size.
    baselines: bool = true;
}

/// The family that a mixture is written as.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FormatChoice {
    /// The first family that has a place for everything.
    #[default]
    Auto,
    /// GLM-4.5 MoE.
    Glm4Moe,
    /// Granite MoE with shared experts.
    #[serde(rename = "granitemoeshared")]
    GraniteMoeShared,
    /// Qwen2 MoE.
    Qwen2Moe,
    /// Mixtral.
    Mixtral,
    /// Qwen3 MoE.
    Qwen3Moe,
}

impl FormatChoice {
    fn format(self) -> Option<MixtureFormat> {
        match self {
            Self::Auto => None,
            Self::Glm4Moe => Some(MixtureFormat::Glm4Moe),
            Self::GraniteMoeShared => Some(MixtureFormat::GraniteMoeShared),
            Self::Qwen2Moe => Some(MixtureFormat::Qwen2Moe),
            Self::Mixtral => Some(MixtureFormat::Mixtral),
            Self::Qwen3Moe => Some(MixtureFormat::Qwen3Moe),
        }
    }
}

keys! {
    table "calibration" like "a table";

    /// `[calibration]`
    written pub struct CalibrationRecipe;

    /// The calibration text with its defaults.
    planned struct CalibrationValues {
        /// Further text to measure on.
        eval: Vec<Source>,
    }

    /// Files of text to fit to and to measure on.
    data: Vec<Source>, "[{ path = \"text.jsonl\" }]";
    /// Files of further text to measure on.
    eval: Vec<Source> => "none", "[{ path = \"code.jsonl\" }]";
    /// Tokens to fit to.
    tokens: usize [Bound::Whole(64, bounds::TOKENS)] = 65_536;
    /// Tokens that are kept out to measure on.
    held_out: usize [Bound::Whole(32, bounds::TOKENS)] = 8192;
}

leaves!(Method, Partition, RouterKind, Refit, KeepDense, FormatChoice);

/// A conversion before it opens anything. Nothing in it means "the default".
#[derive(Debug, Clone, PartialEq)]
pub struct UpcyclePlan {
    /// The new folder.
    pub output: PathBuf,
    /// The dense model.
    pub model: ModelPlan,
    /// How it is converted.
    pub settings: Settings,
    /// Further checkpoints.
    pub sources: Vec<String>,
    /// Prompts of each expert.
    pub prompts: Vec<Vec<String>>,
    /// Text to learn from and to measure on.
    pub data: Vec<Source>,
    /// Further text to measure on, each file by itself.
    pub eval: Vec<Source>,
    /// Tokens to learn from.
    pub tokens: usize,
    /// Tokens to measure on.
    pub held_out: usize,
}

impl UpcycleRecipe {
    /// The table `[upcycle]`, empty where it is left out.
    fn table(&self) -> MethodRecipe {
        self.upcycle.clone().unwrap_or_default()
    }

    /// Types a document and checks that its keys agree with each other.
    pub fn read(document: &Document) -> Result<Self> {
        let recipe: Self = document.read()?;
        let conflicts = recipe.conflicts();
        if conflicts.is_empty() { Ok(recipe) } else { Err(document.errors_at(conflicts)) }
    }
}

/// Shared and active slices. What is left out is a quarter of all, rounded, so that about half of the neurons are active;
/// it is lowered where no slice would be left that a token is not sent to.
fn quarters(experts: usize, shared: Option<usize>, active: Option<usize>) -> (usize, usize) {
    let quarter = ((experts + 2) / 4).max(1);
    let most_shared = experts.saturating_sub(active.unwrap_or(1) + 1);
    let shared = shared.unwrap_or(quarter.min(most_shared));
    let most_active = experts.saturating_sub(shared + 1).max(1);
    (shared, active.unwrap_or(quarter.min(most_active)))
}

/// The name that a choice has in recipes.
pub(crate) fn name_of(choice: impl Serialize) -> String {
    serde_json::to_value(choice).ok().and_then(|name| name.as_str().map(str::to_string)).unwrap_or_default()
}

impl UpcyclePlan {
    /// Fills in the defaults. `name` is the recipe's file name without its ending; the folder is called after it.
    #[must_use]
    pub fn of(recipe: &UpcycleRecipe, name: &str) -> Self {
        let output = recipe.output.clone().unwrap_or_else(|| PathBuf::from("models").join(name));
        let tables = UpcycleTables::of_keys(recipe, output, recipe.calibration.clone());
        let table = &tables.upcycle;
        let values = MethodValues::of_keys(table);
        let method = values.method;
        let cuts = method.cuts();
        let sources = values.sources.len();
        let experts = table.experts.unwrap_or(match method {
            Method::Split | Method::Prune => SLICES,
            Method::Expand => 1,
            // The model itself is one of the checkpoints.
            Method::Mix if sources > 0 => sources + 1,
            Method::Copy | Method::Drop | Method::VirtualGroups | Method::Mix => COPIES,
        });
        let (shared, active) = match method {
            Method::Split | Method::Prune => quarters(experts, table.shared, table.active),
            Method::Expand => (table.shared.unwrap_or(0), table.active.unwrap_or(1)),
            _ => (table.shared.unwrap_or(0), table.active.unwrap_or(ACTIVE_COPIES.min(experts))),
        };
        let settings = Settings {
            method,
            experts,
            shared,
            active,
            partition: values.partition,
            router: table.router.unwrap_or(if cuts { RouterKind::Ridge } else { RouterKind::Random }),
            refit: table.refit.unwrap_or(if cuts { Refit::Local } else { Refit::None }),
            keep_dense: values.keep_dense,
            drop_ratio: table.drop_ratio.unwrap_or(if method == Method::Expand { 0.0 } else { 0.5 }),
            groups: table.groups.unwrap_or(if method == Method::VirtualGroups { 4 } else { 1 }),
            format: values.format.format(),
            verify: values.verify,
            baselines: values.baselines,
            seed: tables.seed,
        };
        let calibration = tables.calibration.unwrap_or_else(CalibrationRecipe::of_nothing);
        let further = calibration.eval.clone().unwrap_or_default();
        let CalibrationValues { data, eval, tokens, held_out } =
            CalibrationValues::of_keys(&calibration, further);
        Self {
            output: tables.output,
            model: ModelPlan::of(&tables.model),
            settings,
            sources: values.sources,
            prompts: values.prompts,
            data,
            eval,
            tokens,
            held_out,
        }
    }

    /// The recipe that says all of the plan: reading it gives the same plan.
    pub fn to_toml(&self) -> Result<String> {
        let Settings { method, experts, shared, active, partition, router, refit, .. } = self.settings;
        let Settings { keep_dense, drop_ratio, groups, format, verify, baselines, seed, .. } = self.settings;
        let cuts = method.cuts();
        let format = match format {
            None => FormatChoice::Auto,
            Some(MixtureFormat::Glm4Moe) => FormatChoice::Glm4Moe,
            Some(MixtureFormat::GraniteMoeShared) => FormatChoice::GraniteMoeShared,
            Some(MixtureFormat::Qwen2Moe) => FormatChoice::Qwen2Moe,
            Some(MixtureFormat::Mixtral) => FormatChoice::Mixtral,
            Some(MixtureFormat::Qwen3Moe) => FormatChoice::Qwen3Moe,
        };
        let recipe = UpcycleRecipe {
            task: Task::Upcycle,
            seed: Some(seed),
            output: Some(self.output.clone()),
            model: self.model.table(),
            upcycle: Some(MethodRecipe {
                method: Some(method),
                experts: Some(experts),
                shared: cuts.then_some(shared),
                active: (method != Method::Expand).then_some(active),
                partition: (method == Method::Split).then_some(partition),
                router: (method != Method::Prune).then_some(router),
                refit: cuts.then_some(refit),
                keep_dense: (method != Method::Expand).then_some(keep_dense),
                drop_ratio: method.draws().then_some(drop_ratio),
                groups: (method == Method::VirtualGroups).then_some(groups),
                sources: Some(self.sources.clone()),
                prompts: Some(self.prompts.clone()),
                format: Some(format),
                verify: Some(verify),
                baselines: (method == Method::Split).then_some(baselines),
            }),
            calibration: (!self.data.is_empty()).then(|| CalibrationRecipe {
                data: self.data.clone(),
                eval: (!self.eval.is_empty()).then(|| self.eval.clone()),
                tokens: Some(self.tokens),
                held_out: Some(self.held_out),
            }),
        };
        written(&recipe)
    }
}

impl CalibrationRecipe {
    /// The table that names no file, where the method needs none.
    fn of_nothing() -> Self {
        Self { data: Vec::new(), eval: None, tokens: None, held_out: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quarter_of_the_slices_is_shared_and_a_quarter_active() {
        let of = |experts| quarters(experts, None, None);
        let found: Vec<_> = [2, 3, 4, 5, 6, 7, 8, 12, 16, 64].into_iter().map(of).collect();
        let wanted = [(0, 1), (1, 1), (1, 1), (1, 1), (2, 2), (2, 2), (2, 2), (3, 3), (4, 4), (16, 16)];
        assert_eq!(found, wanted);
    }

    #[test]
    fn what_is_written_stays_and_the_other_number_leaves_room() {
        assert_eq!(quarters(16, Some(0), None), (0, 4));
        assert_eq!(quarters(16, None, Some(6)), (4, 6));
        assert_eq!(quarters(16, None, Some(12)), (3, 12));
        assert_eq!(quarters(16, Some(13), None), (13, 2));
        assert_eq!(quarters(16, Some(16), Some(16)), (16, 16));
    }
}
