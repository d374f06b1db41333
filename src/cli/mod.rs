//! The `peft` command line: its commands and their help. The only room that knows clap, indicatif and stdout.
//!
//! stdout carries what was asked for, stderr everything else.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::error::Result;
use crate::ops::Kernels;
use crate::weights::report_downloads;

mod builtin;
mod chat;
mod commands;
mod convert;
mod downloads;
mod faults;
mod generate;
mod inspect;
mod interrupt;
mod merge;
mod models;
mod new_file;
mod overrides;
mod reference;
mod report;
mod routing;
mod shell;
mod terminal;

use chat::Chat;
pub use faults::out_of_memory;
use generate::Generate;
use shell::{Completions, Man};
use terminal::{Colour, Log, Terminal};

/// Fine-tunes pretrained language models with small adapters, and folds the adapters back.
#[derive(Debug, Parser)]
#[command(
    name = "peft",
    version,
    max_term_width = 100,
    subcommand_required = true,
    arg_required_else_help = true
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
    /// How progress is told on stderr
    #[arg(long, global = true, value_name = "FORM", default_value = "auto", help_heading = "Global options")]
    log: Log,
    /// Whether messages are coloured
    #[arg(long, global = true, value_name = "WHEN", default_value = "auto", help_heading = "Global options")]
    color: Colour,
    /// How many threads compute [default: `RAYON_NUM_THREADS`, else one for each processor]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=faults::MOST_THREADS as u64), help_heading = "Global options")]
    threads: Option<u64>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train an adapter, or all weights, as a recipe says
    ///
    /// Writes a run directory that Hugging Face PEFT loads as an adapter. Ctrl-C and SIGTERM save a checkpoint
    /// first; `--resume` goes on from the newest one.
    Finetune(Finetune),
    /// Say everything about a recipe that can be known before training
    ///
    /// Reads configurations, tokenizer and data, but no weight values.
    Check(Check),
    /// Fold adapters into a model's weights
    Merge(Merge),
    /// Turn a dense model into a mixture of experts, as a recipe says
    ///
    /// Writes a folder that transformers loads, with an account of what the conversion cost beside static pruning: on text
    /// held out of `calibration.data`, on each file of `calibration.eval`, and on a built-in text of several kinds. With
    /// `method = "expand"` new experts are added to a mixture.
    Upcycle(Upcycle),
    /// Continue a prompt
    Generate(Generate),
    /// Talk to a model
    Chat(Chat),
    /// Measure a model on a data file
    Eval(Eval),
    /// Describe a model, an adapter, a data file or a run
    Inspect(Inspect),
    /// Show recipes and what they can say, or convert the configuration of another tool
    Recipes(Recipes),
    /// Print a script that completes commands and flags in a shell
    Completions(Completions),
    /// Write a manual page for each command
    Man(Man),
}

#[derive(Debug, Args)]
struct RecipeArguments {
    /// A recipe file, or the name of a built-in recipe
    recipe: String,
    /// Lay a value over the recipe: `--set train.learning_rate=1e-4`
    ///
    /// The value is TOML; a bare word is taken as a string.
    #[arg(long, value_name = "KEY=VALUE")]
    set: Vec<String>,
}

#[derive(Debug, Args)]
struct Finetune {
    #[command(flatten)]
    recipe: RecipeArguments,
    /// The run directory, instead of the recipe's `output`
    #[arg(long, value_name = "DIR")]
    output: Option<String>,
    /// Go on from the newest checkpoint in the run directory
    #[arg(long)]
    resume: bool,
}

#[derive(Debug, Args)]
struct Check {
    #[command(flatten)]
    recipe: RecipeArguments,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct Upcycle {
    #[command(flatten)]
    recipe: RecipeArguments,
    /// The folder of the new model, instead of the recipe's `output`
    #[arg(long, value_name = "DIR")]
    output: Option<String>,
}

#[derive(Debug, Args)]
struct ModelArguments {
    /// A folder, a `.gguf` file or a Hub id (`org/name[@revision]`)
    #[arg(long)]
    model: String,
    /// The folder of an adapter
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// The number format of the weights
    #[arg(long, default_value = "auto")]
    dtype: Dtype,
}

#[derive(Debug, Args)]
struct Merge {
    /// A folder, a `.gguf` file or a Hub id (`org/name[@revision]`)
    #[arg(long)]
    model: String,
    /// The folder of an adapter; given again, the sum of all is folded in
    #[arg(long, value_name = "DIR", required = true)]
    adapter: Vec<PathBuf>,
    /// The folder to write; must not exist yet
    #[arg(long, value_name = "DIR")]
    output: PathBuf,
    /// The number format of the written weights [default: each tensor keeps its own]
    #[arg(long)]
    dtype: Option<WrittenDtype>,
    /// Print the loss of base, adapter and merged model on the records of this file
    #[arg(long, value_name = "FILE")]
    data: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct Eval {
    /// What to measure
    measure: Measure,
    #[command(flatten)]
    model: ModelArguments,
    /// A `.jsonl` or `.json` file
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Cut each record to this many tokens
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(2..))]
    max_length: Option<u64>,
    /// Draw the load of every expert into this file (routing only)
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct Inspect {
    /// A model, an adapter, a data file or a run
    path: String,
    /// Print the metrics of a run as CSV
    #[arg(long, conflicts_with = "json")]
    csv: bool,
    /// Print one JSON document
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct Recipes {
    #[command(subcommand)]
    action: Option<RecipesAction>,
}

#[derive(Debug, Subcommand)]
enum RecipesAction {
    /// List the recipes built into this program
    List,
    /// Print a recipe
    Show {
        /// The name of a built-in recipe; `all` or `all-upcycle` for one with every key
        name: String,
    },
    /// List the keys of recipes, or describe one
    Keys {
        /// A key such as `train.learning_rate`, or a table such as `train`
        key: Option<String>,
    },
    /// Print a JSON Schema of recipes, which editors check and complete keys with
    Schema,
    /// Turn a configuration of axolotl, LLaMA-Factory or mlx-lm into a recipe
    ///
    /// The tool is told by the keys. The recipe goes to stdout; what it does not say is listed on stderr, with its line
    /// and the reason.
    Convert {
        /// A YAML or JSON file
        file: PathBuf,
        /// The file to write; must not exist yet [default: stdout]
        #[arg(long, value_name = "RECIPE.toml")]
        output: Option<PathBuf>,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Measure {
    /// Mean loss per predicted token, and its exponential
    Perplexity,
    /// Share of multiple-choice questions answered rightly
    #[value(hide = true)]
    Choices,
    /// How a mixture of experts spreads its tokens
    Routing,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Dtype {
    /// bf16 where the files have that or quantized values, else f32
    Auto,
    /// 32-bit floats
    F32,
    /// bfloat16
    Bf16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum WrittenDtype {
    /// 32-bit floats
    F32,
    /// bfloat16
    Bf16,
    /// 16-bit floats
    F16,
}

/// Runs the command that `arguments`, the program's name first, ask for.
#[must_use]
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments = match Arguments::try_parse_from(arguments) {
        Ok(arguments) => arguments,
        // Help and version are "errors" of clap's too; it knows which stream and status each has.
        Err(error) => shell::with_tip(error).exit(),
    };
    let mut terminal = Terminal::new(arguments.log, arguments.color);
    // As early as the form of messages is known. Commands that write files say later how they stop.
    interrupt::end_at_once(&terminal);
    report_downloads(downloads::downloads(arguments.log));
    let begin = faults::begin(arguments.log, arguments.threads).and_then(|()| Kernels::forced());
    match begin.and_then(|_| dispatch(arguments.command, &mut terminal)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if terminal.stdout_is_closed() => {
            drop(error);
            ExitCode::SUCCESS
        }
        Err(error) => {
            terminal.complain(&error);
            ExitCode::from(error.exit_code())
        }
    }
}

fn dispatch(command: Command, terminal: &mut Terminal) -> Result<()> {
    match command {
        Command::Finetune(arguments) => commands::finetune(&arguments, terminal),
        Command::Check(arguments) => commands::check(&arguments, terminal),
        Command::Merge(arguments) => merge::merge(&arguments, terminal),
        Command::Upcycle(arguments) => commands::upcycle(&arguments, terminal),
        Command::Generate(arguments) => generate::generate(&arguments, terminal),
        Command::Chat(arguments) => chat::chat(&arguments, terminal),
        Command::Eval(arguments) => commands::eval(&arguments, terminal),
        Command::Inspect(arguments) => inspect::inspect(&arguments, terminal),
        Command::Recipes(arguments) => commands::recipes(&arguments, terminal),
        Command::Completions(arguments) => shell::completions(&arguments, terminal),
        Command::Man(arguments) => shell::man(&arguments, terminal),
    }
}
