//! Prints completions for shells, writes manual pages, and names the right command for those of other programs.

use std::path::PathBuf;

use clap::builder::PossibleValuesParser;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Args, Command, CommandFactory};
use clap_complete::Shell;

use super::Arguments;
use super::terminal::Terminal;
use crate::error::{Context, Error, Result};

#[derive(Debug, Args)]
pub(super) struct Completions {
    /// The shell that reads the script
    shell: Shell,
}

#[derive(Debug, Args)]
pub(super) struct Man {
    /// The folder to write into; pages of an earlier version are replaced
    dir: PathBuf,
}

pub(super) fn completions(arguments: &Completions, terminal: &mut Terminal) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut command(), "peft", &mut script);
    terminal.write(format_args!("{}", String::from_utf8_lossy(&script)))
}

pub(super) fn man(arguments: &Man, terminal: &Terminal) -> Result<()> {
    let folder = &arguments.dir;
    let written = std::fs::create_dir_all(folder).and_then(|()| clap_mangen::generate_to(command(), folder));
    written.map_err(|error| Error::invalid(format!("manual pages cannot be written: {error}"))).at(folder)?;
    terminal.say(format_args!("wrote the manual pages to {}", folder.display()));
    Ok(())
}

/// The commands without the measures that help hides: scripts for bash would name them all the same.
fn command() -> Command {
    Arguments::command().mut_subcommand("eval", |eval| {
        eval.mut_arg("measure", |measure| {
            let mut shown = measure.get_possible_values();
            shown.retain(|value| !value.is_hide_set());
            measure.value_parser(PossibleValuesParser::new(shown))
        })
    })
}

/// Names the command that does what a command of another program does, in place of one whose name is merely alike.
pub(super) fn with_tip(mut error: clap::Error) -> clap::Error {
    let wrong = match (error.kind(), error.get(ContextKind::InvalidSubcommand)) {
        (ErrorKind::InvalidSubcommand, Some(ContextValue::String(wrong))) => wrong.as_str(),
        _ => return error,
    };
    let tip = match wrong {
        "train" | "run" => "'peft finetune' trains what a recipe says",
        "export" => "'peft merge' folds an adapter into a model's weights; nothing else is exported yet",
        _ => return error,
    };
    error.remove(ContextKind::SuggestedSubcommand);
    error.insert(ContextKind::Suggested, ContextValue::StyledStrs(vec![tip.into()]));
    error
}
