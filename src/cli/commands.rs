//! What each command does: reads its request, calls the library, writes the answer.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use super::builtin::{self, Builtin};
use super::convert;
use super::interrupt::{self, BeginsWithTraining};
use super::models;
use super::overrides::{lay_over, lay_string};
use super::reference;
use super::routing;
use super::terminal::{Terminal, indented};
use super::{Check, Eval, Finetune, Measure, RecipeArguments, Recipes, RecipesAction, Upcycle};
use crate::error::{Context, Error, Result, is_there, nearest, read_regular};
use crate::recipe::{self, Document, LARGEST_RECIPE, UpcyclePlan, Work};
use crate::run::{self, Segment, figures};
use crate::upcycle::{Event, REPORT_TEXT};

pub(super) fn finetune(arguments: &Finetune, terminal: &mut Terminal) -> Result<()> {
    let plan = match work(&arguments.recipe, arguments.output.as_deref(), terminal)? {
        Work::Finetune(plan) => plan,
        Work::Upcycle(_) => return Err(other_task(&arguments.recipe, "upcycle")),
    };
    let promise = "saving a checkpoint after this step; press Ctrl-C again to stop at once";
    let interrupted = interrupt::listen(terminal, promise)?;
    let mut reporter = BeginsWithTraining(terminal.reporter());
    run::finetune(&plan, arguments.resume, interrupted, &mut reporter)?;
    Ok(())
}

pub(super) fn check(arguments: &Check, terminal: &mut Terminal) -> Result<()> {
    let plan = match work(&arguments.recipe, None, terminal)? {
        Work::Finetune(plan) => plan,
        Work::Upcycle(plan) => return check_upcycle(&plan, arguments.json, terminal),
    };
    let report = run::check(&plan)?;
    if arguments.json {
        return terminal.write_json(&report);
    }
    for line in &report.lines {
        terminal.write(format_args!("{}\n", indented(line, 4)))?;
    }
    terminal.write(format_args!("{}", report.memory.table()))?;
    terminal.write(format_args!("first document, its learned tokens in [[ ]]:\n"))?;
    for Segment { text, learned } in &report.sample {
        match learned {
            true => terminal.write(format_args!("[[{text}]]"))?,
            false => terminal.write(format_args!("{text}"))?,
        }
    }
    terminal.write(format_args!("\n"))?;
    for warning in &report.warnings {
        terminal.warn(warning);
    }
    Ok(())
}

fn check_upcycle(plan: &UpcyclePlan, json: bool, terminal: &mut Terminal) -> Result<()> {
    let report = run::check_upcycle(plan)?;
    if json {
        return terminal.write_json(&report);
    }
    for line in &report.lines {
        terminal.write(format_args!("{}\n", indented(line, 4)))?;
    }
    report.warnings.iter().for_each(|warning| terminal.warn(warning));
    Ok(())
}

pub(super) fn upcycle(arguments: &Upcycle, terminal: &mut Terminal) -> Result<()> {
    let plan = match work(&arguments.recipe, arguments.output.as_deref(), terminal)? {
        Work::Upcycle(plan) => plan,
        Work::Finetune(_) => return Err(other_task(&arguments.recipe, "finetune")),
    };
    let counter = terminal.counter("converting");
    let promise = "removing what was written; press Ctrl-C again to stop at once";
    let interrupted = interrupt::listen(terminal, promise)?;
    interrupt::begin();
    let mut say = |event: Event| {
        if terminal.tells_json() {
            terminal.tell(&event)?;
        } else {
            match event {
                Event::Note { text } => terminal.say(format_args!("{text}")),
                Event::Layer { done, layers } => counter.at(done as u64, layers as u64),
                Event::End { path, seconds } => {
                    let (path, took) = (path.display(), figures::duration(seconds));
                    terminal.say(format_args!("wrote {path} in {took}"));
                    terminal.say(format_args!("the whole account is in {path}/{REPORT_TEXT}"));
                }
            }
        }
        match interrupted.load(Ordering::SeqCst) {
            false => Ok(()),
            true => {
                let message = "interrupted; nothing was written".to_string();
                Err(Error::Interrupted { message, hint: None })
            }
        }
    };
    run::upcycle(&plan, &mut say, &mut |warning| terminal.warn(warning))?;
    Ok(())
}

fn other_task(arguments: &RecipeArguments, task: &str) -> Error {
    let recipe = &arguments.recipe;
    Error::request(format!("`{recipe}` has `task = \"{task}\"`"))
        .with_hint(format!("`peft {task} {recipe}` runs it"))
}

pub(super) fn eval(arguments: &Eval, terminal: &mut Terminal) -> Result<()> {
    if arguments.svg.is_some() && arguments.measure != Measure::Routing {
        return Err(
            Error::request("`--svg` is a picture of routing").with_hint("`peft eval routing` draws it")
        );
    }
    match arguments.measure {
        Measure::Perplexity => models::perplexity(arguments, terminal),
        Measure::Choices => Err(Error::request("`peft eval choices` is not built in this version")),
        Measure::Routing => routing::eval(arguments, terminal),
    }
}

pub(super) fn recipes(arguments: &Recipes, terminal: &mut Terminal) -> Result<()> {
    match &arguments.action {
        None | Some(RecipesAction::List) => {
            let width = Builtin::all().map(|recipe| recipe.name.len()).max().unwrap_or(0);
            for recipe in Builtin::all() {
                terminal.write(format_args!("{:width$}  {}\n", recipe.name, recipe.about()))?;
            }
            Ok(())
        }
        Some(RecipesAction::Show { name }) => match reference::every_key(name) {
            Some(text) => terminal.write(format_args!("{text}")),
            None => terminal.write(format_args!("{}", Builtin::named(name)?.text)),
        },
        Some(RecipesAction::Keys { key }) => reference::keys(key.as_deref(), terminal),
        Some(RecipesAction::Schema) => terminal.write_json(&recipe::schema()),
        Some(RecipesAction::Convert { file, output }) => convert::run(file, output.as_deref(), terminal),
    }
}

/// The plan of a recipe with the flags laid over it.
fn work(arguments: &RecipeArguments, output: Option<&str>, terminal: &Terminal) -> Result<Work> {
    let (path, text) = recipe_text(&arguments.recipe)?;
    let name = path.file_stem().map_or_else(|| "run".into(), |stem| stem.to_string_lossy().into_owned());
    convert::refuse_other_tool(&path, &text)?;
    let mut document = Document::parse(path, &text)?;
    for set in &arguments.set {
        if let Some(replaced) = lay_over(&mut document, set)? {
            terminal.say(format_args!("`--set {set}` takes the place of `{replaced}`"));
        }
    }
    if let Some(output) = output {
        lay_string(&mut document, "output", output, "--output")?;
    }
    for (old, new) in document.rename_old_keys()? {
        terminal.say(format_args!("`{old}` is called `{new}` now"));
    }
    let work = Work::of(&document, &name)?;
    builtin::refuse_absent(&work)?;
    Ok(work)
}

/// The text of a recipe file or a built-in recipe, and what errors call it.
fn recipe_text(recipe: &str) -> Result<(PathBuf, String)> {
    let path = Path::new(recipe);
    if path.is_dir() {
        let error = Error::request("a folder, where a recipe file was expected");
        let inside = path.join("recipe.toml");
        return Err(match inside.is_file() {
            true => error.with_hint(format!("its recipe is `{}`", inside.display())),
            false => error,
        })
        .at(path);
    }
    if is_there(path) {
        let text = String::from_utf8(read_regular(path, LARGEST_RECIPE).at(path)?)
            .map_err(|_| Error::request("not valid UTF-8, expected a recipe in TOML"))
            .at(path)?;
        return Ok((path.to_path_buf(), text));
    }
    if let Some(builtin) = Builtin::find(recipe) {
        return Ok((PathBuf::from(format!("{recipe}.toml")), builtin.text.to_string()));
    }
    let error = Error::request(format!("there is no file and no built-in recipe `{recipe}`"));
    let stem = recipe.strip_prefix("recipes/").unwrap_or(recipe);
    let stem = stem.strip_suffix(".toml").unwrap_or(stem);
    Err(match nearest(stem, Builtin::all().map(|recipe| recipe.name), 1).first() {
        Some(near) => error.with_hint(format!("did you mean the built-in recipe `{near}`?")),
        None => error.with_hint("`peft recipes` lists the built-in recipes"),
    })
}
