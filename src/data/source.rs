//! Data files: JSON Lines, or one JSON list, of records of one format.
//!
//! ```text
//! {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}    messages
//! {"instruction": "…", "input": "…", "output": "…"}                                         alpaca
//! {"prompt": "…", "completion": "…"}                                                        prompt-completion
//! {"text": "…"}                                                                             text
//! ```
//!
//! Other keys are left alone. `messages` may also be called `conversations`, with `from` and `value` in it; a prompt
//! and a completion may both be lists of messages. Which of the two kinds of file it is shows in its first character.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::conversation::{Conversation, expected, keys};
use crate::error::{Context, Error, Result};

/// A data file of the recipe.
#[derive(Debug, Clone, PartialEq)]
pub struct Source {
    /// A `.jsonl` or `.json` file.
    pub path: PathBuf,
    /// How often each of its documents is seen per epoch: 2 is twice, 0.5 a seeded half.
    pub weight: f64,
    /// What its records look like; `Auto` reads the first.
    pub format: Format,
}

/// What the records of a data file look like.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// Told from the keys of the first record.
    #[default]
    Auto,
    /// `{"messages": [{"role": "user", "content": "…"}, …]}`
    Messages,
    /// `{"instruction": "…", "input": "…", "output": "…"}`
    Alpaca,
    /// `{"prompt": "…", "completion": "…"}`
    PromptCompletion,
    /// `{"text": "…"}`
    Text,
}

impl Format {
    /// Its name in a recipe.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Messages => "messages",
            Self::Alpaca => "alpaca",
            Self::PromptCompletion => "prompt-completion",
            Self::Text => "text",
        }
    }
}

/// A record, and where it began.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// What it says.
    pub conversation: Conversation,
    /// Its line in the file, counted from one.
    pub line: usize,
}

/// Reads all records of a file, and says which format they have.
pub fn read(path: &Path, format: Format) -> Result<(Vec<Record>, Format)> {
    let bytes = std::fs::read(path).at(path)?;
    let text = match std::str::from_utf8(&bytes) {
        Ok(text) => text.strip_prefix('\u{feff}').unwrap_or(text),
        Err(error) => {
            let line = 1 + bytes[..error.valid_up_to()].iter().filter(|&&byte| byte == b'\n').count();
            return Err(Error::invalid("not valid UTF-8")
                .with_hint("data files are UTF-8; is this a compressed or binary file?"))
            .at_line(path, line);
        }
    };
    let values = if text.trim_start().starts_with('[') { list(text, path)? } else { lines(text, path)? };
    let Some((first, line)) = values.first() else {
        return Err(Error::invalid("no records")).at(path);
    };
    let format = match format {
        Format::Auto => detect(first).at_line(path, *line)?,
        given => given,
    };
    let records = values
        .into_iter()
        .map(|(value, line)| {
            let conversation = Conversation::from_record(value, format).at_line(path, line)?;
            Ok(Record { conversation, line })
        })
        .collect::<Result<_>>()?;
    Ok((records, format))
}

/// Which format a record has, told from its keys.
fn detect(record: &Value) -> Result<Format> {
    let Value::Object(record) = record else {
        return Err(Error::invalid("the record is not an object"));
    };
    let has = |key: &str| record.contains_key(key);
    if has("messages") || has("conversations") {
        Ok(Format::Messages)
    } else if has("prompt") && has("completion") {
        Ok(Format::PromptCompletion)
    } else if has("instruction") && has("output") {
        Ok(Format::Alpaca)
    } else if has("text") {
        Ok(Format::Text)
    } else {
        let found = keys(record);
        Err(Error::invalid(format!("the record has the {found}, expected {}", expected(Format::Auto))))
    }
}

fn lines(text: &str, path: &Path) -> Result<Vec<(Value, usize)>> {
    text.lines()
        .zip(1..)
        .filter(|(line, _)| !line.trim().is_empty())
        .map(|(line, number)| {
            let value = serde_json::from_str(line).map_err(|error| {
                let wrong = malformed(&error);
                if error.is_eof() && number == 1 {
                    wrong.with_hint(
                        "each line holds one whole record; a file with one list of records begins with `[`",
                    )
                } else {
                    wrong
                }
            });
            Ok((value.at_line(path, number)?, number))
        })
        .collect()
}

/// The elements one by one, since a list parsed whole does not know their lines.
fn list(text: &str, path: &Path) -> Result<Vec<(Value, usize)>> {
    let line_of = |at: usize| 1 + text[..at].bytes().filter(|&byte| byte == b'\n').count();
    let skip = |at: usize| at + (text[at..].len() - text[at..].trim_start().len());
    let mut values = Vec::new();
    let mut at = skip(0) + 1;
    let (mut counted, mut line) = (0, 1);
    loop {
        at = skip(at);
        if values.is_empty() && text[at..].starts_with(']') {
            at += 1;
            break;
        }
        line += text[counted..at].bytes().filter(|&byte| byte == b'\n').count();
        counted = at;
        let mut stream = serde_json::Deserializer::from_str(&text[at..]).into_iter::<Value>();
        let value = match stream.next() {
            Some(Ok(value)) => value,
            Some(Err(error)) => return Err(malformed(&error)).at_line(path, line + error.line().max(1) - 1),
            None => return Err(Error::invalid("the list ends before its `]`")).at_line(path, line),
        };
        values.push((value, line));
        at = skip(at + stream.byte_offset());
        match text[at..].chars().next() {
            Some(',') => at += 1,
            Some(']') => {
                at += 1;
                break;
            }
            Some(other) => {
                return Err(Error::invalid(format!("not valid JSON: found `{other}`, expected `,` or `]`")))
                    .at_line(path, line_of(at));
            }
            None => return Err(Error::invalid("the list ends before its `]`")).at_line(path, line_of(at)),
        }
    }
    if !text[at..].trim().is_empty() {
        return Err(Error::invalid("found more after the list of records")).at_line(path, line_of(skip(at)));
    }
    Ok(values)
}

/// serde_json counts lines within what it was given, which is not the file.
fn malformed(error: &serde_json::Error) -> Error {
    let message = error.to_string();
    let message = message.split(" at line ").next().unwrap_or(&message);
    Error::invalid(format!("not valid JSON at column {}: {message}", error.column()))
}
