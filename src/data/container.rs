//! Files to JSON values with their lines: JSON Lines, one JSON list, or one JSON object that holds the list.
//!
//! Values are handed over one by one, so that no more than the file and what is made of it is in memory. What is no
//! JSON is named for what it is.

use std::path::Path;

use serde::de::IgnoredAny;
use serde_json::Value;

use super::foreign;
use super::value::would_be_missed;
use crate::error::{Context, Error, Json, Result};

/// The keys under which one JSON object may hold the list of records.
const LISTS: [&str; 6] = ["data", "records", "rows", "examples", "instances", "items"];

/// Keys that only records have.
const RECORD: [&str; 6] = ["messages", "conversations", "prompt", "instruction", "output", "text"];

/// Hands over every value of the file with its line. Returns the keys beside the list of records, with their lines.
pub(super) fn each(
    bytes: &[u8],
    path: &Path,
    take: &mut dyn FnMut(Json, usize) -> Result<()>,
) -> Result<Vec<(String, Value, usize)>> {
    let text = foreign::text(bytes, path)?;
    let start = text.len() - text.trim_start().len();
    match text.as_bytes().get(start) {
        Some(b'[') => {
            let end = list(text, start, path, take)?;
            nothing_after(text, end, path)?;
            Ok(Vec::new())
        }
        Some(b'{') => match held(text, start, path)? {
            Some(Held { at, beside }) => {
                list(text, at, path, take)?;
                Ok(beside)
            }
            None => lines(text, path, take).map(|()| Vec::new()),
        },
        _ => lines(text, path, take).map(|()| Vec::new()),
    }
}

fn lines(text: &str, path: &Path, take: &mut dyn FnMut(Json, usize) -> Result<()>) -> Result<()> {
    let mut first = true;
    for (line, number) in text.lines().zip(1..) {
        if line.trim().is_empty() {
            continue;
        }
        let value = serde_json::from_str(line).map_err(|error| {
            let named = if first { foreign::of_text(line, path) } else { None };
            named.unwrap_or_else(|| {
                let wrong = malformed(line, 0, &error);
                if error.is_eof() && number == 1 {
                    wrong.with_hint(
                        "each line holds one whole record; a file with one list of records begins with `[`",
                    )
                } else {
                    wrong
                }
            })
        });
        take(value.at_line(path, number)?, number)?;
        first = false;
    }
    Ok(())
}

/// Hands over the elements of the list that begins at `start`, and returns where it ends. The elements are read one by
/// one, since a list parsed whole does not know their lines.
fn list(
    text: &str,
    start: usize,
    path: &Path,
    take: &mut dyn FnMut(Json, usize) -> Result<()>,
) -> Result<usize> {
    let mut at = start + 1;
    let (mut counted, mut line, mut first) = (0, 1, true);
    loop {
        at = skip(text, at);
        if first && text[at..].starts_with(']') {
            return Ok(at + 1);
        }
        line += text[counted..at].bytes().filter(|&byte| byte == b'\n').count();
        counted = at;
        let mut stream = serde_json::Deserializer::from_str(&text[at..]).into_iter::<Json>();
        let value = match stream.next() {
            Some(Ok(value)) => value,
            Some(Err(error)) => {
                return Err(malformed(text, at, &error)).at_line(path, line + error.line().max(1) - 1);
            }
            None => return Err(Error::invalid("the list ends before its `]`")).at_line(path, line),
        };
        at = skip(text, at + stream.byte_offset());
        take(value, line)?;
        first = false;
        match text[at..].chars().next() {
            Some(',') => at += 1,
            Some(']') => return Ok(at + 1),
            Some(other) => {
                return Err(Error::invalid(format!("not valid JSON: found `{other}`, expected `,` or `]`")))
                    .at_line(path, line_of(text, at));
            }
            None => {
                return Err(Error::invalid("the list ends before its `]`")).at_line(path, line_of(text, at));
            }
        }
    }
}

/// Where the list of records begins in an object that is the whole file, and what else the object has.
struct Held {
    at: usize,
    beside: Vec<(String, Value, usize)>,
}

/// Looks into an object that begins at `start`; none if the file has further lines or the object is a record.
fn held(text: &str, start: usize, path: &Path) -> Result<Option<Held>> {
    let mut lists: Vec<(String, usize)> = Vec::new();
    let mut beside = Vec::new();
    let mut at = skip(text, start + 1);
    let (mut counted, mut line) = (0, 1);
    loop {
        let Some((key, end)) = parse::<String>(text, at) else { return Ok(None) };
        at = skip(text, end);
        if RECORD.contains(&key.as_str()) || !text[at..].starts_with(':') {
            return Ok(None);
        }
        at = skip(text, at + 1);
        let of_records = text[at..].starts_with('[') && text[skip(text, at + 1)..].starts_with('{');
        let value = at;
        match parse::<IgnoredAny>(text, at) {
            Some((_, end)) if of_records => {
                lists.push((key, value));
                at = skip(text, end);
            }
            Some((_, end)) => {
                line += text[counted..at].bytes().filter(|&byte| byte == b'\n').count();
                counted = at;
                let said = parse::<Value>(text, at).map_or(Value::Null, |(said, _)| said);
                beside.push((key, said, line));
                at = skip(text, end);
            }
            // Reading the list again finds the error and its line.
            None if of_records && LISTS.contains(&key.as_str()) => {
                return Ok(Some(Held { at: value, beside: Vec::new() }));
            }
            None => return Ok(None),
        }
        match text[at..].chars().next() {
            Some(',') => at = skip(text, at + 1),
            Some('}') => break,
            _ => return Ok(None),
        }
    }
    if !text[at + 1..].trim().is_empty() {
        return Ok(None);
    }
    // An object in one line with text of its own is a record rather, whatever its lists are called.
    let is_record =
        !text[start..at].contains('\n') && beside.iter().any(|(key, said, _)| would_be_missed(key, said));
    let names: Vec<String> = lists.iter().map(|(name, _)| format!("`{name}`")).collect();
    match lists.as_slice() {
        [] => Ok(None),
        [(name, at)] if LISTS.contains(&name.as_str()) => Ok(Some(Held { at: *at, beside })),
        _ if is_record => Ok(None),
        [_] => {
            Err(Error::invalid(format!("the file is one object with a list of records under {}", names[0]))
                .with_hint(format!(
                    "write the list alone, or call it one of {}",
                    LISTS.map(|name| format!("`{name}`")).join(", ")
                )))
            .at(path)
        }
        _ => Err(Error::invalid(format!(
            "the file is one object with several lists of records: {}",
            names.join(", ")
        ))
        .with_hint("write each list into a file of its own"))
        .at(path),
    }
}

/// The value that begins at `at`, and where it ends.
fn parse<T: serde::de::DeserializeOwned>(text: &str, at: usize) -> Option<(T, usize)> {
    let mut stream = serde_json::Deserializer::from_str(&text[at..]).into_iter::<T>();
    let value = stream.next()?.ok()?;
    Some((value, at + stream.byte_offset()))
}

fn nothing_after(text: &str, end: usize, path: &Path) -> Result<()> {
    match text[end..].trim().is_empty() {
        true => Ok(()),
        false => Err(Error::invalid("found more after the list of records"))
            .at_line(path, line_of(text, skip(text, end))),
    }
}

fn skip(text: &str, at: usize) -> usize {
    at + (text[at..].len() - text[at..].trim_start().len())
}

fn line_of(text: &str, at: usize) -> usize {
    1 + text[..at].bytes().filter(|&byte| byte == b'\n').count()
}

/// Explains what is wrong with the JSON that begins at `start`; serde_json counts lines and bytes from there.
fn malformed(text: &str, start: usize, error: &serde_json::Error) -> Error {
    let mut line = start;
    for _ in 1..error.line() {
        line += text[line..].find('\n').map_or(0, |end| end + 1);
    }
    let mut at = (line + error.column().saturating_sub(1)).min(text.len());
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    let column = |at: usize| text[..at].chars().rev().take_while(|&c| c != '\n').count() + 1;
    if let Some((at, half)) = half_surrogate(text, line, at) {
        let column = column(at);
        return Error::invalid(format!(
            "not valid JSON at column {column}: `{half}` is half of a surrogate pair, which is no character"
        ))
        .with_hint("the string was cut inside an emoji, or was no valid text before; remove the half");
    }
    // The minus of an infinity is taken for the beginning of a number.
    let begins = if text[..at].ends_with('-') { at - 1 } else { at };
    if let Some((word, hint)) = python(&text[begins..]) {
        let column = column(begins);
        return Error::invalid(format!(
            "not valid JSON at column {column}: found `{word}`, which Python writes and JSON does not have"
        ))
        .with_hint(hint);
    }
    let message = error.to_string();
    let message = message.split(" at line ").next().unwrap_or(&message);
    Error::invalid(format!("not valid JSON at column {}: {message}", column(at)))
}

/// A word of Python, where JSON has another or none, and what to do.
fn python(text: &str) -> Option<(&'static str, &'static str)> {
    const NUMBERS: &str =
        "write null, or leave the key out; `json.dumps(…, allow_nan=False)` finds such values";
    const WORDS: &str = "write records with `json.dumps`, not with `str` or `print`";
    [
        ("NaN", NUMBERS),
        ("Infinity", NUMBERS),
        ("-Infinity", NUMBERS),
        ("None", WORDS),
        ("True", WORDS),
        ("False", WORDS),
        ("'", WORDS),
    ]
    .into_iter()
    .find(|(word, _)| text.starts_with(word))
}

/// The first escape between the two places that is half of a surrogate pair without its other half, and where it is.
fn half_surrogate(text: &str, from: usize, to: usize) -> Option<(usize, &str)> {
    let unit = |at: usize| {
        let digits = text.get(at..at + 6)?.strip_prefix("\\u")?;
        u16::from_str_radix(digits, 16).ok()
    };
    let mut at = from;
    while at <= to {
        at += text.get(at..)?.find('\\')?;
        match (unit(at), unit(at + 6)) {
            (Some(0xd800..0xdc00), Some(0xdc00..0xe000)) => at += 12,
            (Some(0xd800..0xe000), _) => return Some((at, &text[at..at + 6])),
            // The backslash and what it escapes, which may be a backslash too.
            _ => at += 1 + text[at + 1..].chars().next().map_or(1, char::len_utf8),
        }
    }
    None
}
