//! `task = "upcycle"`: what was written, and what will happen.

mod conflicts;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::choice::Task;
use super::document::Document;
use super::plan::ModelPlan;
use super::{ModelRecipe, SourceRecipe, bounds};
use crate::data::Source;
use crate::error::{Error, Result};
use crate::model::family::MixtureFormat;
use crate::upcycle::{KeepDense, Method, Partition, Refit, RouterKind, Settings};

/// Slices of a network unless the recipe says otherwise.
const SLICES: usize = 16;
/// Copies of a network unless the recipe says otherwise.
const COPIES: usize = 8;
/// Copies that a token is sent to unless the recipe says otherwise.
const ACTIVE_COPIES: usize = 2;

/// An upcycling recipe as it was written: what is `None` was left out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
pub struct UpcycleRecipe {
    task: Task,
    #[serde(default, deserialize_with = "bounds::at_least::<_, 0>")]
    seed: Option<u64>,
    output: Option<PathBuf>,
    model: ModelRecipe,
    #[serde(default)]
    upcycle: UpcycleTable,
    calibration: Option<CalibrationTable>,
}

/// `[upcycle]`
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a table")]
struct UpcycleTable {
    method: Option<Method>,
    /// Slices of each network, shared ones included (16 unless told); of copies how many (8); for `expand` how many are
    /// added (1).
    #[serde(deserialize_with = "bounds::count::<_, 1, { bounds::EXPERTS }>")]
    experts: Option<usize>,
    /// Slices that every token goes through: a quarter of `experts`, rounded, unless told.
    #[serde(deserialize_with = "bounds::count::<_, 0, { bounds::EXPERTS }>")]
    shared: Option<usize>,
    /// Slices that a token is sent to besides: a quarter of `experts`, rounded and at least 1, unless told; of copies 2.
    #[serde(deserialize_with = "bounds::count::<_, 1, { bounds::EXPERTS }>")]
    active: Option<usize>,
    partition: Option<Partition>,
    router: Option<RouterKind>,
    refit: Option<Refit>,
    keep_dense: Option<KeepDense>,
    #[serde(deserialize_with = "bounds::share")]
    drop_ratio: Option<f64>,
    #[serde(deserialize_with = "bounds::count::<_, 1, { bounds::EXPERTS }>")]
    groups: Option<usize>,
    sources: Option<Vec<String>>,
    prompts: Option<Vec<Vec<String>>>,
    format: Option<FormatChoice>,
    verify: Option<bool>,
    baselines: Option<bool>,
}

/// `upcycle.format`
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum FormatChoice {
    #[default]
    Auto,
    Glm4Moe,
    #[serde(rename = "granitemoeshared")]
    GraniteMoeShared,
    Qwen2Moe,
    Mixtral,
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

/// `[calibration]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a table")]
struct CalibrationTable {
    data: Vec<SourceRecipe>,
    eval: Option<Vec<SourceRecipe>>,
    #[serde(default, deserialize_with = "bounds::count::<_, 64, { bounds::TOKENS }>")]
    tokens: Option<usize>,
    #[serde(default, deserialize_with = "bounds::count::<_, 32, { bounds::TOKENS }>")]
    held_out: Option<usize>,
}

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
    /// Types a document and checks that its keys agree with each other.
    pub fn read(document: &Document) -> Result<Self> {
        let recipe: Self = document.typed()?;
        match recipe.conflict() {
            None => Ok(recipe),
            Some((key, error)) => Err(document.error_at(key, error)),
        }
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
        let table = &recipe.upcycle;
        let method = table.method.unwrap_or_default();
        let cuts = method.cuts();
        let sources = table.sources.as_ref().map_or(0, Vec::len);
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
            partition: table.partition.unwrap_or_default(),
            router: table.router.unwrap_or(if cuts { RouterKind::Ridge } else { RouterKind::Random }),
            refit: table.refit.unwrap_or(if cuts { Refit::Local } else { Refit::None }),
            keep_dense: table.keep_dense.unwrap_or_default(),
            drop_ratio: table.drop_ratio.unwrap_or(if method == Method::Expand { 0.0 } else { 0.5 }),
            groups: table.groups.unwrap_or(if method == Method::VirtualGroups { 4 } else { 1 }),
            format: table.format.unwrap_or_default().format(),
            verify: table.verify.unwrap_or(true),
            baselines: table.baselines.unwrap_or(true),
            seed: recipe.seed.unwrap_or(42),
        };
        let calibration = recipe.calibration.as_ref();
        let sources = |recipes: &[SourceRecipe]| recipes.iter().map(SourceRecipe::source).collect();
        let eval = calibration.and_then(|c| c.eval.as_deref());
        Self {
            output: recipe.output.clone().unwrap_or_else(|| PathBuf::from("models").join(name)),
            model: ModelPlan {
                source: recipe.model.source.clone(),
                dtype: recipe.model.dtype.unwrap_or_default(),
            },
            settings,
            sources: table.sources.clone().unwrap_or_default(),
            prompts: table.prompts.clone().unwrap_or_default(),
            data: calibration.map_or(Vec::new(), |c| sources(&c.data)),
            eval: eval.map_or(Vec::new(), sources),
            tokens: calibration.and_then(|c| c.tokens).unwrap_or(65_536),
            held_out: calibration.and_then(|c| c.held_out).unwrap_or(8192),
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
            model: ModelRecipe { source: self.model.source.clone(), dtype: Some(self.model.dtype) },
            upcycle: UpcycleTable {
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
            },
            calibration: (!self.data.is_empty()).then(|| CalibrationTable {
                data: self.data.iter().map(SourceRecipe::from).collect(),
                eval: (!self.eval.is_empty()).then(|| self.eval.iter().map(SourceRecipe::from).collect()),
                tokens: Some(self.tokens),
                held_out: Some(self.held_out),
            }),
        };
        toml::to_string(&recipe)
            .map_err(|error| Error::invalid(format!("the plan cannot be written as TOML: {error}")))
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
