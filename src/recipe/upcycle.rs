//! `task = "upcycle"`: what was written, and what will happen.

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
    #[serde(deserialize_with = "bounds::count::<_, 1, { bounds::EXPERTS }>")]
    experts: Option<usize>,
    #[serde(deserialize_with = "bounds::count::<_, 0, { bounds::EXPERTS }>")]
    shared: Option<usize>,
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
        match recipe.contradiction() {
            None => Ok(recipe),
            Some((key, error)) => Err(document.error_at(key, error)),
        }
    }

    fn contradiction(&self) -> Option<(&'static str, Error)> {
        let Settings { method, experts, shared, active, router, keep_dense, .. } =
            UpcyclePlan::of(self, "").settings;
        let UpcycleTable { sources, prompts, .. } = &self.upcycle;
        let error = |message: String, hint: &str| Error::request(message).with_hint(hint);
        if method == Method::Expand && self.upcycle.active.is_some() {
            let message = "`upcycle.active`: a mixture that gets experts more keeps its number".to_string();
            return Some((
                "upcycle.active",
                error(message, "leave it out; `num_experts_per_tok` of its `config.json` says it"),
            ));
        }
        if let Some(key) = self.idle_key(method) {
            let message = format!("`{key}` does nothing with `upcycle.method = \"{}\"`", name_of(method));
            return Some((key, error(message, "leave it out")));
        }
        if keep_dense.every == 0 {
            let message = "`upcycle.keep_dense.every` is 0".to_string();
            return Some(("upcycle.keep_dense", error(message, "1 converts every layer, 2 each second one")));
        }
        let cuts = method.cuts();
        if cuts && shared >= experts {
            let message = format!("`upcycle.shared` is {shared}, and there are {experts} slices in all");
            return Some(("upcycle.shared", error(message, "leave slices for the router to choose from")));
        }
        let routed = match (method, sources) {
            (Method::Mix, Some(sources)) => sources.len() + 1,
            _ if cuts => experts - shared,
            _ => experts,
        };
        if active > routed {
            let message = format!("`upcycle.active` is {active}, and a token can be routed to {routed}");
            return Some(("upcycle.active", error(message, "lower it, or raise `upcycle.experts`")));
        }
        if cuts && routed < 2 {
            let message = format!("`upcycle.experts` of {experts} leaves one slice to route to");
            return Some((
                "upcycle.experts",
                error(message, "two are the least that a router can choose from"),
            ));
        }
        if method == Method::Prune && keep_dense != KeepDense::default() {
            let message = "`upcycle.keep_dense`: a pruned model has networks of one width".to_string();
            return Some(("upcycle.keep_dense", error(message, "leave it out")));
        }
        if (cuts || method == Method::Expand) && self.calibration.is_none() {
            let message = format!("`upcycle.method = \"{}\"` needs calibration text", name_of(method));
            return Some(("calibration", error(message, "name files in `calibration.data`")));
        }
        if let Some(CalibrationTable { data, eval, .. }) = &self.calibration {
            if data.is_empty() {
                let message = "`calibration.data` is empty: expected at least one file".to_string();
                return Some(("calibration.data", Error::request(message)));
            }
            let is_learned_from = |file: &&SourceRecipe| data.iter().any(|own| own.path == file.path);
            if let Some(file) = eval.iter().flatten().find(is_learned_from) {
                let path = file.path.display();
                let message = format!("`calibration.eval` has `{path}`, which `calibration.data` has too");
                let hint =
                    "what is learned from cannot be measured on; `held_out` keeps a part of each file out";
                return Some(("calibration.eval", error(message, hint)));
            }
            if eval.is_some() && !cuts {
                let message = format!("`calibration.eval` is for slices, found `{}`", name_of(method));
                let hint = "copies begin as the dense model; leave it out";
                return Some(("calibration.eval", error(message, hint)));
            }
        }
        let has_sources = sources.as_ref().is_some_and(|sources| !sources.is_empty());
        if (method == Method::Mix) != has_sources {
            let message = match has_sources {
                true => format!("`upcycle.sources` is for `method = \"mix\"`, found `{}`", name_of(method)),
                false => "`upcycle.method = \"mix\"` needs further checkpoints".to_string(),
            };
            let hint = if has_sources { "leave it out" } else { "name them in `upcycle.sources`" };
            return Some(("upcycle.sources", error(message, hint)));
        }
        let has_prompts = prompts.as_ref().is_some_and(|prompts| !prompts.is_empty());
        if (router == RouterKind::Prompts) != has_prompts {
            let message = match has_prompts {
                true => "`upcycle.prompts` is for `router = \"prompts\"`".to_string(),
                false => "`upcycle.router = \"prompts\"` needs prompts".to_string(),
            };
            return Some(("upcycle.prompts", error(message, "give a list of prompts for each expert")));
        }
        let is_blank =
            |list: &Vec<String>| list.is_empty() || list.iter().any(|prompt| prompt.trim().is_empty());
        if let Some(expert) = prompts.iter().flatten().position(is_blank) {
            let message =
                format!("`upcycle.prompts[{expert}]` has nothing to go by: it is empty, or a prompt of it");
            return Some((
                "upcycle.prompts",
                error(message, "give each expert prompts of the kind it is for"),
            ));
        }
        if cuts && has_prompts {
            let message = "`upcycle.router = \"prompts\"`: slices have no prompts of their own".to_string();
            return Some(("upcycle.router", error(message, "it is for copies; `ridge` is for slices")));
        }
        None
    }
}

impl UpcycleRecipe {
    /// A key that the method has no use for, and that asks for something.
    fn idle_key(&self, method: Method) -> Option<&'static str> {
        let UpcycleTable {
            shared, partition, router, refit, drop_ratio, groups, baselines, keep_dense, ..
        } = &self.upcycle;
        let (cuts, draws) = (method.cuts(), method.draws());
        [
            ("upcycle.shared", !cuts && shared.is_some_and(|shared| shared > 0)),
            ("upcycle.partition", method != Method::Split && partition.is_some()),
            ("upcycle.router", method == Method::Prune && router.is_some()),
            ("upcycle.refit", !cuts && refit.is_some_and(|refit| refit != Refit::None)),
            ("upcycle.baselines", method != Method::Split && baselines.is_some()),
            ("upcycle.drop_ratio", !draws && drop_ratio.is_some()),
            ("upcycle.groups", method != Method::VirtualGroups && groups.is_some_and(|groups| groups > 1)),
            ("upcycle.keep_dense", method == Method::Expand && keep_dense.is_some()),
        ]
        .into_iter()
        .find_map(|(key, idle)| idle.then_some(key))
    }
}

fn name_of(method: Method) -> String {
    serde_json::to_value(method).ok().and_then(|name| name.as_str().map(str::to_string)).unwrap_or_default()
}

impl UpcyclePlan {
    /// Fills in the defaults. `name` is the recipe's file name without its ending; the folder is called after it.
    #[must_use]
    pub fn of(recipe: &UpcycleRecipe, name: &str) -> Self {
        let table = &recipe.upcycle;
        let method = table.method.unwrap_or_default();
        let cuts = method.cuts();
        let defaults = match method {
            _ if cuts => (16, 4, 4),
            Method::Expand => (1, 0, 1),
            _ => (8, 0, 2),
        };
        let settings = Settings {
            method,
            experts: table.experts.unwrap_or(defaults.0),
            shared: table.shared.unwrap_or(defaults.1),
            active: table.active.unwrap_or(defaults.2),
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
