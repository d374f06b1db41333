//! `peft inspect`: what a model, an adapter, a data file or a run is, from its files. Reads no weight values.

use std::fmt::{self, Display};
use std::io::Read;
use std::path::Path;

use serde::Serialize;

use super::Inspect;
use super::terminal::{Terminal, indented};
use crate::adapter::hf;
use crate::data::kind_of_file;
use crate::error::{Context, Error, Result, is_there, open_regular};

mod adapter;
mod data;
mod model;
mod run;

/// So many bytes of a file tell its kind.
const HEAD: u64 = 64 << 10;

/// Endings of files that hold Python pickles.
const PICKLES: [&str; 5] = ["bin", "pt", "pth", "ckpt", "pkl"];

const PICKLE: &str = "pickles can run code and are not read: load the model with transformers and save it, which writes safetensors";

/// What was found at a path.
#[derive(Debug, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
enum Found {
    Run(run::Run),
    Adapter(adapter::Adapter),
    Model(model::Model),
    Data(data::Data),
}

pub(super) fn inspect(arguments: &Inspect, terminal: &mut Terminal) -> Result<()> {
    let found = Found::at(&arguments.path)?;
    if arguments.csv {
        let Found::Run(_) = found else {
            return Err(Error::request(format!(
                "`--csv` prints the metrics of a run, and `{}` is none",
                arguments.path
            ))
            .with_hint("leave `--csv` out, or name the folder of a run"));
        };
        return terminal.write(format_args!("{}", run::csv(Path::new(&arguments.path))?));
    }
    if arguments.json {
        return terminal.write_json(&found);
    }
    terminal.write(format_args!("{found}"))
}

impl Found {
    /// Tells what `source` is by the files in it. What is not there may be a Hub id: the weights room knows.
    fn at(source: &str) -> Result<Self> {
        let path = Path::new(source);
        let is_data = path.extension().is_some_and(|ending| ending == "jsonl" || ending == "json");
        if !path.is_dir() && is_data {
            return data::Data::read(path).map(Self::Data);
        }
        if path.extension().is_some_and(|ending| ending == "toml") && path.is_file() {
            let source = path.display();
            return Err(Error::request(format!(
                "`{source}` is a recipe, expected a model, an adapter, a data file or a run"
            ))
            .with_hint(format!(
                "`peft check {source}` says what it will do; what it made is described by `peft inspect` of its output"
            )));
        }
        if path.join(run::METRICS_FILE).is_file() {
            return run::Run::read(path).map(Self::Run);
        }
        if path.join(hf::CONFIG_FILE).is_file() {
            return adapter::Adapter::read(path).map(Self::Adapter);
        }
        if path.is_dir() && !path.join("config.json").is_file() {
            return Err(unknown_folder(path));
        }
        if is_there(path) && !path.is_dir() {
            refuse_other_file(path)?;
        }
        model::Model::read(source).map(Self::Model)
    }
}

/// Refuses a file that is no model, by the kind that it seems to be of. What has the ending of a model is left to its reader.
fn refuse_other_file(path: &Path) -> Result<()> {
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default().to_ascii_lowercase();
    let mut head = Vec::new();
    open_regular(path).at(path)?.take(HEAD).read_to_end(&mut head).at(path)?;
    if ["gguf", "safetensors"].contains(&ending.as_str()) || head.starts_with(b"GGUF") {
        return Ok(());
    }
    let is_json = head.trim_ascii_start().starts_with(b"{") || head.trim_ascii_start().starts_with(b"[");
    let (is, hint) = if head.is_empty() {
        ("is empty".to_string(), None)
    } else if PICKLES.contains(&ending.as_str()) {
        ("seems to hold weights as PyTorch pickles them".to_string(), Some(PICKLE))
    } else if let Some((kind, hint)) = kind_of_file(&head, path) {
        (format!("seems to be {kind}"), Some(hint))
    } else if is_json {
        ("seems to be JSON".to_string(), Some("data files end in `.jsonl` or `.json`: give it such a name"))
    } else {
        ("is of a kind that is not known".to_string(), None)
    };
    let error = Error::request(format!(
        "`{}` {is}, expected the folder of a model, an adapter or a run, a `.gguf` file, or data in `.jsonl` or `.json`",
        path.display()
    ));
    Err(match hint {
        Some(hint) => error.with_hint(hint),
        None => error,
    })
}

fn unknown_folder(path: &Path) -> Error {
    let wanted = ["config.json", hf::CONFIG_FILE, run::METRICS_FILE].join("`, `");
    Error::request(format!("`{}` holds no model, no adapter and no run", path.display()))
        .with_hint(format!("expected one of `{wanted}` there"))
}

impl Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Run(run) => run.fmt(f),
            Self::Adapter(adapter) => adapter.fmt(f),
            Self::Model(model) => model.fmt(f),
            Self::Data(data) => data.fmt(f),
        }
    }
}

/// A line of the answer: what it is about, and what is so. A value of several lines stays in its column.
fn row(f: &mut fmt::Formatter<'_>, name: &str, value: impl Display) -> fmt::Result {
    writeln!(f, "{name:<14} {}", indented(&value.to_string(), 15))
}
