//! The run directory: looked at before anything is read, taken for one process, and cleaned of what a killed one left.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::Recipe;
use super::artifact::RESULT;
use super::document::{Document, written};
use super::plan::Plan;
use super::template::{Date, TemplateVariables};
use crate::error::{Context, Error, Result};
use crate::train;
use crate::weights::{refuse_below_file, remove_stale, write_atomic};

/// The resolved recipe.
const RECIPE: &str = "recipe.toml";

/// What shows that a folder holds a run.
const MARKS: [&str; 2] = [RECIPE, "metrics.jsonl"];

/// What a run writes over, and other folders are known by.
const RESULTS: [&str; 7] = [
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
];

/// A run directory that no other process writes to.
pub(super) struct RunDirectory<'a> {
    path: &'a Path,
    /// Folders that were not there before, the outermost first.
    made: Vec<PathBuf>,
    _lock: Option<File>,
}

impl<'a> RunDirectory<'a> {
    /// Says whether a run of `plan` may be written to its directory; looks at names only.
    pub(super) fn check(plan: &Plan, resume: bool) -> Result<()> {
        let output = &plan.output;
        if output.as_os_str().is_empty() {
            return Err(Error::request("`output` is empty").with_hint("name a folder, such as `runs/first`"));
        }
        if output.is_file() {
            return Err(Error::request("is a file, where the run directory would be")
                .with_hint("choose another folder with `--output`"))
            .at(output);
        }
        refuse_below_file(output)?;
        let holds = |name: &&&str| output.join(name).exists();
        if MARKS.iter().any(|name| holds(&name)) {
            if !resume {
                return Err(Error::request("holds a run already")
                    .with_hint("go on with `--resume`, or choose another folder with `--output`"))
                .at(output);
            }
            return check_recipe(plan);
        }
        match RESULTS.iter().find(holds) {
            None => Ok(()),
            Some(name) => {
                Err(Error::request(format!("holds `{name}` and no run, and the run would write over it"))
                    .with_hint("choose another folder with `--output`"))
                .at(output)
            }
        }
    }

    /// Makes the directory where there is none and takes it; removes what a killed run was writing.
    pub(super) fn take(path: &'a Path, resume: bool) -> Result<Self> {
        let missing =
            path.ancestors().take_while(|folder| !folder.as_os_str().is_empty() && !folder.exists());
        let mut made: Vec<PathBuf> = missing.map(Path::to_path_buf).collect();
        made.reverse();
        // From here on, dropping it removes what was made.
        let mut directory = Self { path, made, _lock: None };
        fs::create_dir_all(path).at(path)?;
        directory._lock = lock(path)?;
        if resume {
            let is_ours = |name: &str| name == RECIPE || name == RESULT || train::is_of_run(name);
            remove_stale(path, is_ours)?;
        }
        Ok(directory)
    }

    /// The plan with the date of the run that it goes on with; runs that name none had this one.
    pub(super) fn dated(plan: &Plan) -> Plan {
        let mut plan = plan.clone();
        if plan.data.template.date == Date::today() && plan.output.join(RECIPE).is_file() {
            let recorded = recorded(&plan).and_then(|recipe| recipe.data.template);
            plan.data.template.date = recorded.map_or(Date::FIXED, |template| template.date);
        }
        plan
    }

    /// Leaves the resolved recipe in it, with the date where the template asks for it.
    pub(super) fn write_recipe(&self, plan: &Plan, asks_for_date: bool) -> Result<()> {
        let mut recipe = Recipe::from(plan);
        let TemplateVariables { date, others } = &plan.data.template;
        if asks_for_date {
            recipe.data.template = Some(plan.data.template.clone());
        } else if *date == Date::FIXED && others.is_empty() {
            recipe.data.template = None;
        }
        write_atomic(self.path.join(RECIPE), written(&recipe)?.as_bytes())
    }
}

impl Drop for RunDirectory<'_> {
    /// A run that failed before it wrote anything leaves no empty folders. Others cannot be removed in this way.
    fn drop(&mut self) {
        for folder in self.made.iter().rev() {
            if fs::remove_dir(folder).is_err() {
                return;
            }
        }
    }
}

/// Two processes in one run directory would take each other's checkpoints for their own. The system lets go of the lock
/// when its process ends, however that happens; where there are no locks on folders, nothing is locked.
fn lock(path: &Path) -> Result<Option<File>> {
    let Ok(folder) = File::open(path) else { return Ok(None) };
    match folder.try_lock() {
        Ok(()) => Ok(Some(folder)),
        Err(TryLockError::Error(_)) => Ok(None),
        Err(TryLockError::WouldBlock) => Err(Error::request("another process is training here")
            .with_hint("wait until it has ended, or choose another folder with `--output`"))
        .at(path),
    }
}

/// The recipe that the run of a plan was started with, where it can be read.
fn recorded(plan: &Plan) -> Option<Recipe> {
    let path = plan.output.join(RECIPE);
    let document = Document::parse(&path, &fs::read_to_string(&path).ok()?).ok()?;
    Recipe::read(&document).ok()
}

/// Says which keys were others when the run was started.
fn check_recipe(plan: &Plan) -> Result<()> {
    let path = plan.output.join(RECIPE);
    let Ok(text) = fs::read_to_string(&path) else { return Ok(()) };
    // Read as a recipe of today, a key that was not there then has its default. A date that was not there says nothing.
    let then = match recorded(plan) {
        None => text,
        Some(recipe) => {
            let mut then = Plan::of(&recipe, "");
            if recipe.data.template.is_none() && plan.data.template.date == Date::FIXED {
                then.data.template.date = Date::FIXED;
            }
            then.to_toml()?
        }
    };
    let (Ok(then), Ok(now)) = (then.parse::<Table>(), plan.to_toml()?.parse::<Table>()) else {
        return Err(Error::invalid("not a recipe of this version"))
            .at(path)
            .map_err(|error| error.with_hint("start anew with another `--output`"));
    };
    let (then, now) = (flat(then), flat(now));
    let keys: BTreeSet<&String> = then.keys().chain(now.keys()).collect();
    let said = |value: Option<&String>| value.map_or("left out".to_string(), |value| format!("`{value}`"));
    let differing: Vec<String> = keys
        .into_iter()
        .filter(|key| *key != "output" && then.get(*key) != now.get(*key))
        .map(|key| format!("`{key}` was {} and is {} now", said(then.get(key)), said(now.get(key))))
        .collect();
    if differing.is_empty() {
        return Ok(());
    }
    Err(Error::request(format!("the run was started with another recipe: {}", differing.join("; ")))
        .with_hint("resume with the recipe it was started with, or start anew with another `--output`"))
    .at(&plan.output)
}

/// Values by their whole keys: `train.steps`.
fn flat(table: Table) -> BTreeMap<String, String> {
    let mut values = BTreeMap::new();
    for (key, value) in table {
        match value {
            Value::Table(inner) => {
                values.extend(flat(inner).into_iter().map(|(rest, value)| (format!("{key}.{rest}"), value)));
            }
            value => drop(values.insert(key, value.to_string())),
        }
    }
    values
}
