//! The run directory: looked at before anything is read, taken for one process, and cleaned of what a killed one left.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, TryLockError};
use std::path::{Component, Path, PathBuf};

use toml::{Table, Value};

use crate::adapter::hf::shell_word;
use crate::data::Source;
use crate::error::{Context, Error, Result, is_there, nearest, read_regular_text};
use crate::recipe::{
    Date, Document, Evaluation, LARGEST_RECIPE, Plan, Recipe, TemplateVariables, Trained, written,
};
use crate::train::{self, BEST};
use crate::weights::output::{OpenPath, output_folder, refuse_below_file, refuse_unwritable};
use crate::weights::{remove_stale, write_atomic};

/// The resolved recipe.
const RECIPE: &str = "recipe.toml";

/// No more runs than these are named beside a folder that holds none.
const NAMED_RUNS: usize = 3;

/// This hint tells how to make room where a run directory holds files that the run did not make.
const MOVE: &str = "move it to another folder, or choose another run directory with `--output`";

/// What the result is called until its files are in the run directory.
pub(super) const RESULT: &str = "result";

/// What shows that a folder holds a run.
const MARKS: [&str; 2] = [RECIPE, "metrics.jsonl"];

/// A run directory that no other process writes to.
pub(super) struct RunDirectory {
    path: PathBuf,
    /// Folders that were not there before, the outermost first.
    made: Vec<PathBuf>,
    lock: Option<File>,
    place: Option<OpenPath>,
}

impl RunDirectory {
    /// Says whether a run of `plan` may be written to its directory; looks at names, links and permissions only.
    pub(super) fn check(plan: &Plan, resume: bool) -> Result<()> {
        let output = &run_folder(&plan.output)?;
        if output.exists() && !output.is_dir() {
            return Err(Error::request("is a file, where the run directory would be")
                .with_hint("choose another folder with `--output`"))
            .at(output);
        }
        refuse_below_file(output)?;
        if !MARKS.iter().any(|name| output.join(name).exists()) {
            refuse_strangers(output)?;
            refuse_sources(plan, output)?;
        } else if !resume {
            return Err(Error::request("holds a run already")
                .with_hint("go on with `--resume`, or choose another folder with `--output`"))
            .at(output);
        } else {
            check_recipe(plan)?;
            train::refuse_foreign(output)?;
            // The recipe is what shows that the best evaluation is of this run: it is written before.
            if output.join(BEST).exists() && !output.join(RECIPE).exists() {
                return Err(Error::request(format!(
                    "holds `{BEST}` and no `{RECIPE}` of a run that made it"
                ))
                .with_hint(MOVE))
                .at(output);
            }
            let best = output.join(BEST);
            if is_there(&best) && !best.is_dir() {
                return Err(Error::request("is no folder, and the run keeps its best evaluation there")
                    .with_hint(MOVE))
                .at(best);
            }
        }
        refuse_unwritable(output).at(output)
    }

    /// Refuses what a run of `plan` would be refused for. Where its directory holds a run already, a sentence says whether
    /// the new one could go on with it: whoever looks at a changed recipe has not chosen another directory yet.
    pub(super) fn foresee(plan: &Plan) -> Result<Option<String>> {
        let output = run_folder(&plan.output)?;
        if !MARKS.iter().any(|name| output.join(name).exists()) {
            return Self::check(plan, false).map(|()| None);
        }
        match Self::check(&Self::as_begun(plan), true) {
            Ok(()) => Ok(Some(format!(
                "`{}` holds a run of this recipe already: `peft finetune` goes on with it with `--resume`, or writes to \
                 another folder with `--output`",
                plan.output.display()
            ))),
            Err(error) if error.exit_code() == 2 => {
                Ok(Some(format!("`peft finetune` needs another folder with `--output`: {error}")))
            }
            Err(error) => Err(error),
        }
    }

    /// Where there is no run to go on with: a sentence which says so and names runs beside it, those nearest in spelling
    /// first.
    pub(super) fn nothing_to_resume(output: &Path) -> Option<String> {
        if MARKS.iter().any(|name| output.join(name).exists()) {
            return None;
        }
        let beside = output.parent().filter(|parent| !parent.as_os_str().is_empty());
        let entries = fs::read_dir(beside.unwrap_or(Path::new("."))).into_iter().flatten();
        let is_run = |name: &String| {
            let folder = output.with_file_name(name);
            MARKS.iter().all(|mark| folder.join(mark).exists())
        };
        let mut runs: Vec<String> =
            entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).filter(is_run).collect();
        runs.sort();
        let name = output.file_name().unwrap_or_default().to_string_lossy();
        let mut named = nearest(&name, runs.iter().map(String::as_str), NAMED_RUNS);
        let others = runs.iter().map(String::as_str).filter(|run| !named.contains(run));
        let others: Vec<&str> = others.take(NAMED_RUNS - named.len()).collect();
        named.extend(others);
        let named: Vec<String> =
            named.iter().map(|run| format!("`{}`", output.with_file_name(run).display())).collect();
        let begins =
            format!("there is no run in `{}` to go on with: a new one begins there", output.display());
        Some(match named.is_empty() {
            true => begins,
            false => format!("{begins}; `--output` goes on with another, such as {}", named.join(", ")),
        })
    }

    /// Makes the directory where there is none and takes it; removes what a killed run was writing.
    pub(super) fn take(output: &Path, resume: bool) -> Result<Self> {
        let path = run_folder(output)?;
        let missing =
            path.ancestors().take_while(|folder| !folder.as_os_str().is_empty() && !folder.exists());
        let mut made: Vec<PathBuf> = missing.map(Path::to_path_buf).collect();
        made.reverse();
        // From here on, dropping it removes what was made.
        let mut directory = Self { path: path.clone(), made, lock: None, place: None };
        fs::create_dir_all(&path).at(&path)?;
        directory.lock = lock(&path)?;
        directory.place = Some(OpenPath::of(&path));
        if resume {
            let is_ours = |name: &str| name == RECIPE || name == RESULT || train::is_of_run(name);
            remove_stale(&path, is_ours)?;
        }
        Ok(directory)
    }

    /// Refuses to write the result when the directory was removed or renamed while the run went on.
    pub(super) fn refuse_moved(&self) -> Result<()> {
        self.place.iter().try_for_each(OpenPath::refuse_moved)
    }

    /// The plan with what the run that it goes on with settled: the date, where the recipe names none, and the share that
    /// is held out, which earlier versions took of few documents too.
    pub(super) fn as_begun(plan: &Plan) -> Plan {
        let mut plan = plan.clone();
        if !plan.output.join(RECIPE).is_file() {
            return plan;
        }
        let recorded = recorded(&plan).map(|recipe| recipe.data);
        if plan.data.template.date.is_none() {
            let template = recorded.as_ref().and_then(|data| data.template.as_ref());
            // Runs that name none had this one.
            plan.data.template.date = template.map_or(Some(Date::FIXED), |template| template.date);
        }
        if plan.data.eval == Evaluation::ShareOfMany
            && let Some(share) = recorded.and_then(|data| data.eval_share)
        {
            plan.data.eval = Evaluation::Share(share);
        }
        plan
    }

    /// Leaves the resolved recipe in it, with the date that the template is told if it asks for one.
    pub(super) fn write_recipe(&self, plan: &Plan, told: Option<Date>) -> Result<()> {
        let mut recipe = Recipe::from(plan);
        let TemplateVariables { date, others } = &plan.data.template;
        if told.is_some() {
            recipe.data.template = Some(TemplateVariables { date: told, others: others.clone() });
        } else if *date == Some(Date::FIXED) && others.is_empty() {
            recipe.data.template = None;
        }
        write_atomic(self.path.join(RECIPE), written(&recipe)?.as_bytes())
    }
}

impl Drop for RunDirectory {
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
    let document = Document::parse(&path, &read_regular_text(&path, LARGEST_RECIPE).ok()?).ok()?;
    Recipe::read(&document).ok()
}

/// The folder that a run is written to. One that holds a run already may be the current one, for going on with it there.
fn run_folder(asked: &Path) -> Result<PathBuf> {
    if asked.components().eq([Component::CurDir]) && train::is_run(asked) {
        return Ok(asked.to_path_buf());
    }
    output_folder(asked)
}

/// Refuses a folder that holds what the run would write over or remove, which nobody but its owner may.
fn refuse_strangers(output: &Path) -> Result<()> {
    let mut others = Vec::new();
    if output.is_dir() {
        for entry in fs::read_dir(output).at(output)? {
            others.extend(entry.at(output)?.file_name().into_string().ok());
        }
    }
    others.retain(|name| train::is_result(name) || train::is_of_run(name));
    // A folder is known by its configuration, so that it is named first.
    others.sort_by_key(|name| (!name.ends_with("config.json"), name.clone()));
    let Some(name) = others.first() else { return Ok(()) };
    let verb = if output.join(name).is_dir() { "remove it" } else { "write over it" };
    Err(Error::request(format!("holds `{name}` and no run, and the run would {verb}"))
        .with_hint("choose another folder with `--output`"))
    .at(output)
}

/// Refuses the folder of a file that the run reads.
fn refuse_sources(plan: &Plan, output: &Path) -> Result<()> {
    let Ok(output) = fs::canonicalize(output) else { return Ok(()) };
    let eval: &[Source] = match &plan.data.eval {
        Evaluation::Files(files) => files,
        Evaluation::Share(_) | Evaluation::ShareOfMany | Evaluation::Off => &[],
    };
    let model = Some(Path::new(&plan.model.source));
    let from = match &plan.trained {
        Trained::Adapter(adapter) => adapter.earlier(),
        Trained::Full => None,
    };
    let teacher = plan.distill.as_ref().map(|distill| Path::new(&distill.teacher));
    // What cannot be found is refused where the data is read.
    let data: Vec<Source> =
        plan.data.train.iter().chain(eval).flat_map(|source| source.files().unwrap_or_default()).collect();
    let data = data.iter().map(|source| source.path.as_path());
    let read = [("the model", model), ("the adapter", from), ("the teacher", teacher)];
    let read = read.into_iter().filter_map(|(what, path)| Some((what, path?)));
    for (what, path) in read.chain(data.map(|path| ("the data", path))) {
        let Ok(found) = fs::canonicalize(path) else { continue };
        let folder = if found.is_dir() { Some(found.as_path()) } else { found.parent() };
        if folder == Some(&output) {
            return Err(Error::request(format!(
                "the output `{}` is the folder of {what} `{}`",
                plan.output.display(),
                path.display()
            ))
            .with_hint("name a folder of its own, such as `runs/first`"));
        }
    }
    Ok(())
}

/// Says which keys were others when the run was started.
fn check_recipe(plan: &Plan) -> Result<()> {
    let path = plan.output.join(RECIPE);
    if !path.is_file() && !is_there(&path) {
        return Ok(());
    }
    let text = read_regular_text(&path, LARGEST_RECIPE).at(&path)?;
    // Read as a recipe of today, a key that was not there then has its default. A date that was not there says nothing.
    let then = match recorded(plan) {
        None => text,
        Some(recipe) => {
            let mut then = Plan::of(&recipe, "");
            if recipe.data.template.is_none() && plan.data.template.date == Some(Date::FIXED) {
                then.data.template.date = Some(Date::FIXED);
            }
            then.to_toml()?
        }
    };
    let Ok(then) = then.parse::<Table>() else {
        return Err(Error::invalid("not a recipe of this version"))
            .at(path)
            .map_err(|error| error.with_hint("start anew with another `--output`"));
    };
    let (then, now) = (flat(then), settings_of(plan)?);
    let keys: BTreeSet<&String> = then.keys().chain(now.keys()).collect();
    let said = |value: Option<&String>| value.map_or("left out".to_string(), |value| format!("`{value}`"));
    let differing: Vec<&String> =
        keys.into_iter().filter(|key| *key != "output" && then.get(*key) != now.get(*key)).collect();
    if differing.is_empty() {
        return Ok(());
    }
    let sentence =
        |key: &&String| format!("`{key}` was {} and is {} now", said(then.get(*key)), said(now.get(*key)));
    let sentences: Vec<String> = differing.iter().map(sentence).collect();
    let is_longer = differing.iter().all(|key| ["train.steps", "train.epochs"].contains(&key.as_str()));
    let hint = is_longer.then(|| way_on(plan)).flatten().unwrap_or_else(|| {
        "resume with the recipe it was started with, or start anew with another `--output`".to_string()
    });
    Err(Error::request(format!("the run was started with another recipe: {}", sentences.join("; ")))
        .with_hint(hint))
    .at(&plan.output)
}

/// How to train the result of a run that has ended further: more steps are another run, which goes on from it.
fn way_on(plan: &Plan) -> Option<String> {
    let (result, key) = match plan.trained {
        Trained::Full => ("config.json", "model.source"),
        Trained::Adapter(_) => ("adapter_config.json", "adapter.from"),
    };
    plan.output.join(result).is_file().then(|| {
        format!(
            "the run has ended; to train its result further, start another run with `--set {}` and another `--output`",
            setting(key, &plan.output.to_string_lossy())
        )
    })
}

/// What `--set` takes for this key and string, as a word of a shell: the string is quoted where TOML would read another value.
fn setting(key: &str, value: &str) -> String {
    let is_read_otherwise = value.trim() != value
        || value.starts_with(['[', '{', '"', '\''])
        || format!("value = {value}").parse::<Table>().is_ok();
    let value = if is_read_otherwise { Value::from(value).to_string() } else { value.to_string() };
    shell_word(&format!("{key}={value}"))
}

/// Everything that a plan says, as TOML by the whole names of its keys.
pub(super) fn settings_of(plan: &Plan) -> Result<BTreeMap<String, String>> {
    let table = plan.to_toml()?.parse::<Table>();
    table.map(flat).map_err(|error| Error::invalid(format!("the plan cannot be read as TOML: {error}")))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_is_one_word_and_stays_a_string() {
        let of = |value| setting("adapter.from", value);
        assert_eq!(of("runs/first"), "adapter.from=runs/first");
        assert_eq!(of("my runs/it's $HOME"), r"'adapter.from=my runs/it'\''s $HOME'");
        assert_eq!(of("2024"), r#"'adapter.from="2024"'"#);
        assert_eq!(of("[a]"), r#"'adapter.from="[a]"'"#);
        assert_eq!(of(" a"), r#"'adapter.from=" a"'"#);
    }
}
