//! A recipe that comes to be, key by key: each value is held against the reader of recipes before it is taken.

use toml::Value;

use crate::error::Error;
use crate::recipe::{Document, Recipe};

/// What of a configuration a recipe does not say, or what is to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remark {
    /// The line it is about; `None`: the configuration as a whole.
    pub line: Option<usize>,
    /// What a recipe does not say, and the reason.
    pub text: String,
}

/// A data file of a draft.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct DataFile {
    pub(super) path: String,
    /// The name of its format; `None`: the first record tells.
    pub(super) format: Option<&'static str>,
}

/// What has been said so far.
#[derive(Debug, Default)]
pub(super) struct Draft {
    settings: Vec<(&'static str, Value)>,
    pub(super) train: Vec<DataFile>,
    pub(super) eval: Vec<DataFile>,
    pub(super) remarks: Vec<Remark>,
    /// What has to be done before the recipe runs.
    to_do: Vec<String>,
}

impl Draft {
    /// Takes a value, or remarks why not; `from` is how the other tool says it, in `line`.
    pub(super) fn set(&mut self, key: &'static str, value: Value, from: &str, line: usize) {
        match self.get(key) {
            Some(known) if *known == value => return,
            Some(known) => {
                let text = format!("`{from}`: `{key}` is `{known}` already, by another key");
                return self.remark(line, text);
            }
            None => {}
        }
        match refusal(key, &value) {
            None => self.settings.push((key, value)),
            // Quoted numbers are numbers to other tools.
            Some(reason) => match value.as_str().and_then(number) {
                Some(number) => self.set(key, number, from, line),
                None => self.remark(line, format!("`{from}`: {reason}")),
            },
        }
    }

    /// Takes a value that is known to be right, also in the place of another.
    pub(super) fn put(&mut self, key: &'static str, value: impl Into<Value>) {
        self.settings.retain(|(known, _)| *known != key);
        self.settings.push((key, value.into()));
    }

    pub(super) fn get(&self, key: &str) -> Option<&Value> {
        self.settings.iter().find(|(known, _)| *known == key).map(|(_, value)| value)
    }

    pub(super) fn remove(&mut self, key: &str) {
        self.settings.retain(|(known, _)| *known != key);
    }

    /// Takes out what is said of an adapter, where all weights are trained.
    pub(super) fn drop_adapter(&mut self) {
        let of_adapter = |key: &str| key.starts_with("adapter.");
        let dropped: Vec<_> = self
            .settings
            .iter()
            .filter(|(key, _)| of_adapter(key))
            .map(|(key, _)| format!("`{key}`"))
            .collect();
        self.settings.retain(|(key, _)| !of_adapter(key));
        if !dropped.is_empty() {
            let dropped = dropped.join(", ");
            self.remark_of_all(format!(
                "all weights are trained, so nothing is said of an adapter: {dropped}"
            ));
        }
    }

    pub(super) fn remark(&mut self, line: usize, text: impl Into<String>) {
        self.remarks.push(Remark { line: Some(line), text: text.into() });
    }

    pub(super) fn remark_of_all(&mut self, text: impl Into<String>) {
        self.remarks.push(Remark { line: None, text: text.into() });
    }

    /// Remarks what the user has to do; the recipe says it too.
    pub(super) fn demand(&mut self, line: usize, text: impl Into<String>) {
        let text = text.into();
        // A comment of a recipe is one line, whatever the text quotes.
        self.to_do.push(format!("line {line}: {}", text.replace(char::is_control, " ")));
        self.remark(line, text);
    }

    /// The text of the recipe below `heading`, a comment.
    pub(super) fn recipe(&self, heading: &str) -> String {
        let mut text = format!("# {heading}\n");
        if !self.to_do.is_empty() {
            text += "#\n# To do before it runs:\n";
            self.to_do.iter().for_each(|what| text += &format!("# - {what}\n"));
        }
        text += "\ntask = \"finetune\"\n";
        let full = self.get("train.full").is_some();
        for table in ["", "model", "adapter", "data", "train", "losses", "distill"] {
            let of_table = self.settings.iter().filter_map(|(key, value)| match key.rsplit_once('.') {
                Some((of, key)) => (of == table).then_some((key, value)),
                None => table.is_empty().then_some((*key, value)),
            });
            let mut lines: String = of_table.map(|(key, value)| format!("{key} = {value}\n")).collect();
            if table == "data" {
                lines.insert_str(0, &(files("train", &self.train) + &files("eval", &self.eval)));
            }
            if table.is_empty() {
                text += &lines;
            } else if !lines.is_empty() || (table == "adapter" && !full) {
                text += &format!("\n[{table}]\n{lines}");
            }
        }
        text
    }
}

/// The number that a text says.
fn number(text: &str) -> Option<Value> {
    text.parse().map(Value::Integer).or_else(|_| text.parse().map(Value::Float)).ok()
}

/// The lines of a list of files; none where there are none.
fn files(key: &str, files: &[DataFile]) -> String {
    if files.is_empty() {
        return String::new();
    }
    let of = |DataFile { path, format }: &DataFile| {
        let format = format.map(|format| format!(", format = \"{format}\"")).unwrap_or_default();
        format!("    {{ path = {}{format} }},\n", Value::from(path.as_str()))
    };
    format!("{key} = [\n{}]\n", files.iter().map(of).collect::<String>())
}

/// Why a recipe does not take this value of a key; `None`: it does.
fn refusal(key: &str, value: &Value) -> Option<String> {
    let needed = [
        ("task", "\"finetune\""),
        ("model.source", "\"model\""),
        ("adapter.method", "\"lora\""),
        ("data.train", "[{ path = \"data.jsonl\" }]"),
    ];
    let mut text = format!("{key} = {value}\n");
    for (needed, value) in needed.into_iter().filter(|(needed, _)| *needed != key) {
        text += &format!("{needed} = {value}\n");
    }
    let read = Document::parse("", &text).and_then(|document| Recipe::read(&document));
    match read.err()? {
        Error::At { source, .. } | Error::AtLine { source, .. } => Some(source.to_string()),
        other => Some(other.to_string()),
    }
}
