//! `peft inspect`: what a model, an adapter, a data file or a run is, from its files. Reads no weight values.

use std::fmt::{self, Display};
use std::path::Path;

use serde::Serialize;

use super::Inspect;
use super::terminal::{Terminal, indented};
use crate::adapter::hf;
use crate::error::{Error, Result};

mod adapter;
mod data;
mod model;
mod run;

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
        model::Model::read(source).map(Self::Model)
    }
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
