//! A TOML document of which every value knows where it was written: a line of a file, or a flag.
//!
//! Flags are laid over the file before anything is typed, so that a value is checked in one way wherever it comes
//! from, and an error can still point to the place that the user has to change.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use toml::de::{DeTable, DeValue};

use crate::error::{Context, Error, Result};

/// The most bytes of a recipe: 16 MiB.
pub(crate) const LARGEST_RECIPE: u64 = 16 << 20;

/// Keys of earlier versions, and what they are called now.
const OLD_KEYS: [(&str, &str); 1] = [("train.checkpoint", "train.recompute")];

/// A recipe's text, with flags laid over it, before it is typed.
#[derive(Debug, Clone)]
pub struct Document {
    path: Arc<Path>,
    pub(super) root: Node,
}

/// A value and its place.
#[derive(Debug, Clone)]
pub(super) struct Node {
    pub(super) origin: Origin,
    pub(super) value: Value,
}

/// A TOML value.
#[derive(Debug, Clone)]
pub(super) enum Value {
    String(String),
    Integer(i64),
    Float(f64),
    Boolean(bool),
    /// TOML has dates; no recipe key does. Kept as text for the error message.
    Date(String),
    Array(Vec<Node>),
    Table(BTreeMap<String, Node>),
}

/// Where a value was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Origin {
    /// The document as a whole.
    Document,
    /// A line of the file, counted from one.
    Line(usize),
    /// A flag as the user typed it: `--set train.steps=10`.
    Flag(Arc<str>),
}

impl Document {
    /// Reads the text of a recipe; `path` is only what errors call it.
    pub fn parse(path: impl Into<PathBuf>, text: &str) -> Result<Self> {
        let path: Arc<Path> = path.into().into();
        let table = match DeTable::parse(text) {
            Ok(table) => table.into_inner(),
            Err(error) => {
                let (line, column) = place(text, error.span().map_or(0, |span| span.start));
                return Err(Error::request(format!(
                    "not valid TOML at column {column}: {}",
                    error.message()
                )))
                .at_line(&path, line);
            }
        };
        let root = Text::File(text)
            .table(Origin::Document, table)
            .map_err(|(origin, error)| locate(&path, &origin, error))?;
        Ok(Self { path, root })
    }

    /// Lays `value` over what the file says at `key` (`train.learning_rate`). `flag` is what errors point to.
    pub fn set(&mut self, key: &str, value: DeValue<'_>, flag: &str) -> Result<()> {
        let origin = Origin::Flag(flag.into());
        let new = Text::Flag(origin.clone())
            .node(origin.clone(), value)
            .map_err(|(origin, error)| self.error_from(&origin, error))?;
        let mut node = &mut self.root;
        for (depth, part) in key.split('.').enumerate() {
            let found = node.value.describe();
            let Value::Table(table) = &mut node.value else {
                let parent = key.split('.').take(depth).collect::<Vec<_>>().join(".");
                let message = format!("`{parent}` is {found}, so it has no key `{part}`");
                return Err(locate(&self.path, &origin, Error::request(message)));
            };
            node = table
                .entry(part.to_string())
                .or_insert_with(|| Node { origin: origin.clone(), value: Value::Table(BTreeMap::new()) });
        }
        *node = new;
        Ok(())
    }

    /// Gives keys of earlier versions their names of today, and says which.
    ///
    /// # Errors
    ///
    /// Fails if a key stands there under both names.
    pub fn rename_old_keys(&mut self) -> Result<Vec<(&'static str, &'static str)>> {
        let mut renamed = Vec::new();
        for (old, new) in OLD_KEYS {
            let Some(node) = self.taken(old) else { continue };
            let (tables, name) = new.rsplit_once('.').unwrap_or(("", new));
            let Some(Value::Table(table)) = self.node_mut(tables).map(|node| &mut node.value) else {
                continue;
            };
            if table.contains_key(name) {
                let error =
                    Error::request(format!("`{old}` is the earlier name of `{new}`, which is given too"));
                return Err(self.error_from(&node.origin, error.with_hint("leave one of them out")));
            }
            table.insert(name.to_string(), node);
            renamed.push((old, new));
        }
        Ok(renamed)
    }

    /// Takes what is said at `key` out; gives whether there was anything.
    pub fn remove(&mut self, key: &str) -> bool {
        self.taken(key).is_some()
    }

    fn taken(&mut self, key: &str) -> Option<Node> {
        let (tables, last) = key.rsplit_once('.').unwrap_or(("", key));
        match &mut self.node_mut(tables)?.value {
            Value::Table(table) => table.remove(last),
            _ => None,
        }
    }

    /// What is said at `key`; of the empty key the whole document.
    fn node_mut(&mut self, key: &str) -> Option<&mut Node> {
        let parts = key.split('.').filter(|part| !part.is_empty());
        let mut node = &mut self.root;
        for part in parts {
            let Value::Table(table) = &mut node.value else { return None };
            node = table.get_mut(part)?;
        }
        Some(node)
    }

    /// Says of `error` that it is about `key`: the line or the flag that the key, or the table it is missing in, has.
    pub(super) fn error_at(&self, key: &str, error: Error) -> Error {
        let mut node = &self.root;
        for part in key.split('.') {
            match &node.value {
                Value::Table(table) if table.contains_key(part) => node = &table[part],
                _ => break,
            }
        }
        self.error_from(&node.origin, error)
    }

    /// One error of errors about keys, in the order of the file.
    pub(super) fn errors_at(&self, errors: Vec<(&str, Error)>) -> Error {
        let mut errors: Vec<Error> =
            errors.into_iter().map(|(key, error)| self.error_at(key, error)).collect();
        errors.sort_by_key(|error| match error {
            Error::AtLine { line, .. } => *line,
            Error::At { .. } => 0,
            _ => usize::MAX,
        });
        Error::several(errors)
    }

    /// Says of `error` that it comes from `origin`.
    pub(super) fn error_from(&self, origin: &Origin, error: Error) -> Error {
        locate(&self.path, origin, error)
    }
}

impl Value {
    /// What the value is, in words for an error message.
    pub(super) fn describe(&self) -> String {
        match self {
            Self::String(text) => format!("the string \"{text}\""),
            Self::Integer(number) => format!("`{number}`"),
            Self::Float(number) => format!("`{number:?}`"),
            Self::Boolean(flag) => format!("`{flag}`"),
            Self::Date(text) => format!("the date {text}"),
            Self::Array(_) => "a list".to_string(),
            Self::Table(_) => "a table".to_string(),
        }
    }
}

fn locate(path: &Path, origin: &Origin, error: Error) -> Error {
    match origin {
        Origin::Document => Error::At { path: path.to_path_buf(), source: Box::new(error) },
        Origin::Line(line) => {
            Error::AtLine { path: path.to_path_buf(), line: *line, source: Box::new(error) }
        }
        Origin::Flag(flag) => {
            let hint = error.hint().map(str::to_string);
            Error::Request { message: format!("`{flag}`: {error}"), hint }
        }
    }
}

/// The text that values are read from.
enum Text<'a> {
    File(&'a str),
    Flag(Origin),
}

impl Text<'_> {
    fn origin(&self, offset: usize) -> Origin {
        match self {
            Self::File(text) => Origin::Line(place(text, offset).0),
            Self::Flag(flag) => flag.clone(),
        }
    }

    /// The value that stands at `origin`; what is wrong with it, and where, otherwise.
    fn node(&self, origin: Origin, value: DeValue<'_>) -> Result<Node, (Origin, Error)> {
        let value = match value {
            DeValue::String(text) => Value::String(text.into_owned()),
            DeValue::Boolean(flag) => Value::Boolean(flag),
            DeValue::Datetime(date) => Value::Date(date.to_string()),
            DeValue::Table(table) => return self.table(origin, table),
            DeValue::Integer(number) => match i64::from_str_radix(number.as_str(), number.radix()) {
                Ok(number) => Value::Integer(number),
                Err(_) => {
                    let message = format!("`{number}` is too large: whole numbers end at {}", i64::MAX);
                    return Err((origin, Error::request(message)));
                }
            },
            DeValue::Float(number) => match number.as_str().parse() {
                Ok(number) => Value::Float(number),
                Err(_) => return Err((origin, Error::request(format!("`{number}` is not a number")))),
            },
            DeValue::Array(values) => Value::Array(
                values
                    .into_iter()
                    .map(|value| self.node(self.origin(value.span().start), value.into_inner()))
                    .collect::<Result<_, _>>()?,
            ),
        };
        Ok(Node { origin, value })
    }

    fn table(&self, origin: Origin, table: DeTable<'_>) -> Result<Node, (Origin, Error)> {
        let mut nodes = BTreeMap::new();
        for (key, value) in table {
            let node = self.node(self.origin(key.span().start), value.into_inner())?;
            nodes.insert(key.into_inner().into_owned(), node);
        }
        Ok(Node { origin, value: Value::Table(nodes) })
    }
}

/// A recipe as TOML.
pub(crate) fn written(recipe: &impl serde::Serialize) -> Result<String> {
    toml::to_string(recipe)
        .map_err(|error| Error::invalid(format!("the plan cannot be written as TOML: {error}")))
}

/// Line and column of a byte offset, both counted from one.
fn place(text: &str, offset: usize) -> (usize, usize) {
    let before = &text.as_bytes()[..offset.min(text.len())];
    let line = before.iter().filter(|&&byte| byte == b'\n').count() + 1;
    let start = before.iter().rposition(|&byte| byte == b'\n').map_or(0, |newline| newline + 1);
    let column = String::from_utf8_lossy(&before[start..]).chars().count() + 1;
    (line, column)
}
