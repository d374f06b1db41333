//! YAML as the configurations of other tools have it: keys and plain values, each with its line.
//!
//! Words are read as PyYAML reads them, where `no` is a flag, but `1e-4` is the number that was meant.

use std::path::Path;

use saphyr_parser::{Event, Parser, ScalarStyle};

use crate::error::{Context, Error, Result, caught};

/// The most lists and tables inside each other.
const DEEPEST: usize = 32;

/// A value and the line where it begins.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Node {
    pub(super) line: usize,
    pub(super) value: Value,
}

/// A value.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Null,
    Flag(bool),
    Integer(i64),
    Float(f64),
    Text(String),
    List(Vec<Node>),
    Table(Vec<Entry>),
}

/// A key with its value.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Entry {
    /// The line of the key.
    pub(super) line: usize,
    pub(super) key: String,
    pub(super) value: Value,
}

/// A list or a table that is not complete.
enum Open {
    List(Vec<Node>),
    Table(Vec<Entry>, Option<(usize, String)>),
}

/// Reads the entries of a document, which has to be one table; `path` is only what errors call it.
pub(super) fn parse(path: &Path, text: &str) -> Result<Vec<Entry>> {
    let read = caught(|| read(text))
        .unwrap_or_else(|panic| Err((1, Error::request(format!("it cannot be read as YAML: {panic}")))));
    read.or_else(|(line, error)| Err(error).at_line(path, line))
}

fn read(text: &str) -> Result<Vec<Entry>, (usize, Error)> {
    let mut open: Vec<(usize, Open)> = Vec::new();
    let mut whole = None;
    for event in Parser::new_from_str(text) {
        let (event, span) = event.map_err(|error| {
            let at = error.marker();
            let message = format!("not valid YAML at column {}: {}", at.col() + 1, error.info());
            (at.line().max(1), Error::request(message))
        })?;
        let line = span.start.line().max(1);
        let refuse = |message: &str| Err((line, Error::request(message)));
        let node = match event {
            Event::DocumentStart(_) if whole.is_some() => {
                return refuse("a second YAML document begins here, expected one");
            }
            Event::Alias(_) => {
                return Err((
                    line,
                    Error::request("an alias (`*name`), which is not read")
                        .with_hint("write the value out that it stands for"),
                ));
            }
            Event::SequenceStart(..) | Event::MappingStart(..) if open.len() == DEEPEST => {
                return refuse("lists and tables are too deep inside each other");
            }
            Event::SequenceStart(..) => {
                open.push((line, Open::List(Vec::new())));
                continue;
            }
            Event::MappingStart(..) => {
                open.push((line, Open::Table(Vec::new(), None)));
                continue;
            }
            Event::Scalar(text, style, ..) => {
                if let Some((_, Open::Table(_, key @ None))) = open.last_mut() {
                    *key = Some((line, text.into_owned()));
                    continue;
                }
                let value = match style {
                    ScalarStyle::Plain => plain(&text),
                    _ => Value::Text(text.into_owned()),
                };
                Node { line, value }
            }
            Event::SequenceEnd | Event::MappingEnd => match open.pop() {
                Some((line, Open::List(nodes))) => Node { line, value: Value::List(nodes) },
                Some((line, Open::Table(entries, _))) => Node { line, value: Value::Table(entries) },
                None => continue,
            },
            _ => continue,
        };
        match open.last_mut() {
            None => whole = Some(node),
            Some((_, Open::List(nodes))) => nodes.push(node),
            Some((_, Open::Table(entries, key))) => match key.take() {
                Some((line, key)) => entries.push(Entry { line, key, value: node.value }),
                None => return refuse("a list or a table, where the name of a key was expected"),
            },
        }
    }
    match whole {
        Some(Node { value: Value::Table(entries), .. }) => Ok(entries),
        Some(Node { line, .. }) => Err((line, Error::request("expected keys with values: `key: value`"))),
        None => Err((1, Error::request("it is empty, expected keys with values"))),
    }
}

/// A value without quotes.
fn plain(text: &str) -> Value {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Value::Null,
        "true" | "True" | "TRUE" | "yes" | "Yes" | "YES" | "on" | "On" | "ON" => return Value::Flag(true),
        "false" | "False" | "FALSE" | "no" | "No" | "NO" | "off" | "Off" | "OFF" => {
            return Value::Flag(false);
        }
        _ => {}
    }
    if !text.starts_with(|c: char| c.is_ascii_digit() || "+-.".contains(c)) {
        return Value::Text(text.to_string());
    }
    // `1_000` is a number there.
    let digits = text.replace('_', "");
    if let Ok(number) = digits.parse() {
        return Value::Integer(number);
    }
    match digits.parse::<f64>() {
        Ok(number) if number.is_finite() => Value::Float(number),
        _ => Value::Text(text.to_string()),
    }
}

impl Value {
    /// Whether the value says nothing.
    pub(super) fn is_empty(&self) -> bool {
        match self {
            Self::Null => true,
            Self::Text(text) => text.is_empty(),
            Self::List(nodes) => nodes.is_empty(),
            Self::Table(entries) => entries.is_empty(),
            Self::Flag(_) | Self::Integer(_) | Self::Float(_) => false,
        }
    }

    /// The text of a single value, as messages show it and as names are compared; of lists and tables only what they are.
    pub(super) fn text(&self) -> String {
        match self {
            Self::Null => "null".to_string(),
            Self::Flag(flag) => flag.to_string(),
            Self::Integer(number) => number.to_string(),
            Self::Float(number) => number.to_string(),
            Self::Text(text) => text.clone(),
            Self::List(_) => "[..]".to_string(),
            Self::Table(_) => "{..}".to_string(),
        }
    }

    pub(super) fn number(&self) -> Option<f64> {
        match self {
            Self::Integer(number) => Some(*number as f64),
            Self::Float(number) => Some(*number),
            Self::Text(text) => text.parse().ok(),
            _ => None,
        }
    }

    pub(super) fn flag(&self) -> Option<bool> {
        match self {
            Self::Flag(flag) => Some(*flag),
            _ => None,
        }
    }

    /// The single values of a list, or of a text with commas, or the only value.
    pub(super) fn words(&self) -> Vec<String> {
        match self {
            Self::List(nodes) => nodes.iter().map(|node| node.value.text()).collect(),
            other => other.text().split(',').map(|word| word.trim().to_string()).collect(),
        }
    }
}

/// The value of a key.
pub(super) fn find<'a>(entries: &'a [Entry], key: &str) -> Option<&'a Entry> {
    entries.iter().rev().find(|entry| entry.key == key && !entry.value.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(text: &str) -> String {
        parse(Path::new("a.yml"), text).unwrap_err().to_string()
    }

    #[test]
    fn values_are_what_was_meant_and_have_their_lines() {
        let text = "# c\na: 1e-4\nb: no\nc:\n  - x\n  - '1'\nd: {e: 1_000}\nf:\ng: 1.2.3\non: 2\n";
        let entries = parse(Path::new("a.yml"), text).unwrap();
        let found: Vec<_> = entries.iter().map(|e| (e.line, e.key.as_str(), &e.value)).collect();
        let text = |line, text: &str| Node { line, value: Value::Text(text.into()) };
        let list = Value::List(vec![text(5, "x"), text(6, "1")]);
        let inner = vec![Entry { line: 7, key: "e".into(), value: Value::Integer(1000) }];
        assert_eq!(
            found,
            [
                (2, "a", &Value::Float(1e-4)),
                (3, "b", &Value::Flag(false)),
                (4, "c", &list),
                (7, "d", &Value::Table(inner)),
                (8, "f", &Value::Null),
                (9, "g", &Value::Text("1.2.3".into())),
                (10, "on", &Value::Integer(2)),
            ]
        );
    }

    #[test]
    fn what_is_no_table_of_keys_is_refused_with_its_line() {
        assert_eq!(refusal(""), "a.yml:1: it is empty, expected keys with values");
        assert_eq!(refusal("\n- a\n- b\n"), "a.yml:2: expected keys with values: `key: value`");
        assert_eq!(refusal("a: &x 1\nb: *x\n"), "a.yml:2: an alias (`*name`), which is not read");
        assert_eq!(refusal("a: 1\n---\nb: 1\n"), "a.yml:2: a second YAML document begins here, expected one");
        assert_eq!(
            refusal("a: 1\n[b]: 1\n"),
            "a.yml:2: a list or a table, where the name of a key was expected"
        );
        assert!(refusal("a: [1, 2\nb: 3\n").contains("not valid YAML at column"));
        let deep = format!("a: {}", "[".repeat(100));
        assert_eq!(refusal(&deep), "a.yml:1: lists and tables are too deep inside each other");
    }
}
