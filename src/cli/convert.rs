//! `peft recipes convert`: reads a configuration of another tool, and writes the recipe that it comes to.

use std::io::ErrorKind;
use std::path::Path;

use super::new_file::write_new;
use super::terminal::Terminal;
use crate::adapter::hf::shell_word;
use crate::error::{Context, Error, Result, nearest_path, read_regular};
use crate::recipe::other_tools::{Remark, Tool, convert};
use crate::recipe::{Document, LARGEST_RECIPE};

/// Converts `path`, and writes the recipe to stdout or into `output`, which must not exist yet.
pub(super) fn run(path: &Path, output: Option<&Path>, terminal: &mut Terminal) -> Result<()> {
    let text = text(path)?;
    let converted = convert(path, &text, &|nearby| self::text(nearby).ok())?;
    let shown = path.display();
    terminal.say(format_args!("`{shown}` is a configuration of {}", converted.tool.name()));
    match output {
        None => terminal.write(format_args!("{}", converted.recipe))?,
        Some(output) => {
            let taken = Error::request("exists already").with_hint("choose another `--output`, or remove it");
            write_new(output, &converted.recipe, taken)?;
        }
    }
    for Remark { line, text } in &converted.remarks {
        match line {
            Some(line) => terminal.warn(&format!("{shown}:{line}: {text}")),
            None => terminal.warn(&format!("{shown}: {text}")),
        }
    }
    if !converted.off.is_empty() {
        let off: Vec<String> = converted.off.iter().map(|key| format!("`{key}`")).collect();
        terminal.say(format_args!("off or empty, so a recipe leaves them out: {}", off.join(", ")));
    }
    if let Some(output) = output {
        let (output, word) = (output.display(), shell_word(&output.to_string_lossy()));
        terminal.say(format_args!("wrote {output}; `peft check {word}` says what it will do"));
    }
    Ok(())
}

/// Refuses a recipe that is YAML or JSON, by its ending or because it is a configuration of another tool.
pub(super) fn refuse_other_tool(path: &Path, text: &str) -> Result<()> {
    let ending = path.extension().map(|ending| ending.to_string_lossy().to_lowercase());
    let is_other = ending.is_some_and(|ending| ["yaml", "yml", "json"].contains(&ending.as_str()));
    let tool = match is_other || Document::parse(path, text).is_err() {
        true => Tool::of_text(text),
        false => None,
    };
    let found = match tool {
        Some(tool) => format!("a configuration of {}", tool.name()),
        None if is_other => "by its ending YAML or JSON".to_string(),
        None => return Ok(()),
    };
    let word = |path: &Path| shell_word(&path.to_string_lossy());
    let (from, to) = (word(path), word(&path.with_extension("toml")));
    let hint = format!(
        "`peft recipes convert {from} --output {to}` makes a recipe of a configuration of axolotl, LLaMA-Factory or mlx-lm"
    );
    Err(Error::request(format!("{found}, expected a recipe in TOML")).with_hint(hint)).at(path)
}

fn text(path: &Path) -> Result<String> {
    let bytes = match read_regular(path, LARGEST_RECIPE) {
        Err(Error::Io(error)) if error.kind() == ErrorKind::NotFound => {
            let error = Error::request("there is no such file");
            return Err(match nearest_path(path, Path::is_file) {
                Some(near) => error.with_hint(format!("did you mean `{}`?", near.display())),
                None => error,
            })
            .at(path);
        }
        read => read.at(path)?,
    };
    String::from_utf8(bytes).map_err(|_| Error::request("not valid UTF-8, expected YAML")).at(path)
}
