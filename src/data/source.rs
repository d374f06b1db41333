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

use super::conversation::{Conversation, expected, keys, kind};
use crate::error::{Context, Error, Result, nearest_path, read_regular};

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

/// The most bytes of a data file, which is read whole: 64 GiB.
const LARGEST: u64 = 1 << 36;

/// Reads all records of a file, and says which format they have.
pub fn read(path: &Path, format: Format) -> Result<(Vec<Record>, Format)> {
    let bytes = match read_regular(path, LARGEST) {
        Err(Error::Io(error)) if error.kind() == std::io::ErrorKind::NotFound => {
            let hint = match nearest_path(path, Path::is_file) {
                Some(near) => format!("did you mean `{}`?", near.display()),
                None => "relative paths are relative to the folder that the command runs in".to_string(),
            };
            return Err(Error::request("there is no such file").with_hint(hint)).at(path);
        }
        Err(_) if path.is_dir() => {
            return Err(Error::request("is a folder, expected a `.jsonl` or `.json` file")).at(path);
        }
        read => read.at(path)?,
    };
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
        let hint = format!("write one per line, with {}", expected(Format::Auto));
        return Err(Error::invalid("no records").with_hint(hint)).at(path);
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
        return Err(Error::invalid(format!("the record is {}, expected an object", kind(record))));
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
        Err(Error::invalid(format!("the record has {found}, expected {}", expected(Format::Auto))))
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Message, Role};

    fn file(bytes: impl AsRef<[u8]>) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        file
    }

    fn records(bytes: &str) -> (Vec<Record>, Format) {
        read(file(bytes).path(), Format::Auto).unwrap()
    }

    /// The message without the path.
    fn refusal(bytes: impl AsRef<[u8]>) -> String {
        let file = file(bytes);
        let error = read(file.path(), Format::Auto).unwrap_err().to_string();
        error.replace(&file.path().display().to_string(), "FILE")
    }

    fn only(bytes: &str) -> Conversation {
        let (mut records, _) = records(bytes);
        assert_eq!(records.len(), 1);
        records.remove(0).conversation
    }

    #[test]
    fn formats_are_told_from_the_first_record() {
        let user_and_assistant =
            Conversation::chat(vec![Message::new(Role::User, "q"), Message::new(Role::Assistant, "a")]);
        for (record, format) in [
            (
                r#"{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}"#,
                Format::Messages,
            ),
            (
                r#"{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}"#,
                Format::Messages,
            ),
            (
                r#"{"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, {"role": "assistant", "content": "a"}], "tools": []}"#,
                Format::Messages,
            ),
            (r#"{"instruction": "q", "input": "", "output": "a", "id": 3}"#, Format::Alpaca),
            (r#"{"instruction": "q", "input": null, "output": "a"}"#, Format::Alpaca),
        ] {
            let (read, told) = records(record);
            assert_eq!((&read[0].conversation, told), (&user_and_assistant, format));
        }
        let Conversation::Chat { messages, .. } =
            only(r#"{"instruction": "q", "input": "i", "output": "a"}"#)
        else {
            unreachable!()
        };
        assert_eq!(messages[0].content.as_deref(), Some("q\n\ni"));
        assert_eq!(only(r#"{"text": " t "}"#), Conversation::Text(" t ".into()));
        assert_eq!(
            only(r#"{"prompt": "", "completion": "c"}"#),
            Conversation::PromptCompletion { prompt: String::new(), completion: "c".into() }
        );
        let lists = r#"{"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}"#;
        let Conversation::Chat { learn_from: 1, messages, .. } = only(lists) else { unreachable!() };
        assert_eq!(messages.len(), 2);
    }

    #[test]
    fn what_templates_may_want_is_kept() {
        let record = r#"{"messages": [{"role": "assistant", "content": null, "tool_calls": [{"id": "1"}]},
            {"role": "tool", "content": "", "tool_call_id": "1"}], "tools": "[{\"name\": \"f\"}]"}"#;
        let Conversation::Chat { messages, tools, .. } = only(&record.replace('\n', " ")) else {
            unreachable!()
        };
        assert_eq!(messages[0].content, None);
        assert_eq!(messages[0].fields.keys().collect::<Vec<_>>(), ["content", "tool_calls"]);
        assert_eq!(messages[1].content.as_deref(), Some(""));
        assert_eq!(tools, Some(serde_json::json!([{"name": "f"}])));
    }

    #[test]
    fn marks_and_blank_lines_are_no_records() {
        let lines = |bytes| records(bytes).0.iter().map(|record| record.line).collect::<Vec<_>>();
        assert_eq!(lines("\u{feff}\n{\"text\": \"a\"}\r\n\r\n  \n{\"text\": \"b\"}"), [2, 5]);
        assert_eq!(lines("\u{feff} [\n{\"text\":\n\"a\"},\n\n{\"text\": \"b\"}\n]\n"), [2, 5]);
    }

    #[test]
    fn broken_files_are_refused_where_they_break() {
        for (bytes, expected) in [
            ("", "FILE: no records"),
            ("\n \n", "FILE: no records"),
            ("[]", "FILE: no records"),
            ("{\"text\": \"a\"}\n{\"text\": }", "FILE:2: not valid JSON at column 10: expected value"),
            ("{\n\"text\": \"a\"}", "FILE:1: not valid JSON at column 1: EOF while parsing an object"),
            ("[\n{\"text\": \"a\"},\n{\"text\"\n: }]", "FILE:4: not valid JSON at column 3: expected value"),
            ("[\n{\"text\": \"a\"}\n{}]", "FILE:3: not valid JSON: found `{`, expected `,` or `]`"),
            ("[{\"text\": \"a\"},\n", "FILE:2: the list ends before its `]`"),
            ("[{\"text\": \"a\"}\n", "FILE:2: the list ends before its `]`"),
            ("[{\"text\": \"a\"}]\n\nx", "FILE:3: found more after the list of records"),
            ("3", "FILE:1: the record is a number, expected an object"),
        ] {
            assert_eq!(refusal(bytes), expected, "{bytes:?}");
        }
        assert_eq!(refusal(b"{\"text\": \"a\"}\n{\"text\": \"\xff\"}"), "FILE:2: not valid UTF-8");
        let missing = read(Path::new("no/such.jsonl"), Format::Auto).unwrap_err();
        assert!(missing.to_string().starts_with("no/such.jsonl: "), "{missing}");
    }

    #[test]
    fn wrong_records_are_refused_by_name() {
        let message = |message: &str| format!(r#"{{"messages": [{message}]}}"#);
        for (record, expected) in [
            (
                "{}".into(),
                "the record has no keys, expected `messages`, or `prompt` and `completion`, or `instruction` and `output`, or `text`",
            ),
            (
                r#"{"prompt": "p", "x": 1}"#.into(),
                "the record has the keys `prompt`, `x`, expected `messages`, or `prompt` and `completion`, or `instruction` and `output`, or `text`",
            ),
            (r#"{"text": 3}"#.into(), "`text` is a number, expected a string"),
            (r#"{"text": " \n"}"#.into(), "`text` is empty"),
            (r#"{"prompt": "p", "completion": ""}"#.into(), "`completion` is empty"),
            (r#"{"prompt": [], "completion": []}"#.into(), "`completion` is empty"),
            (r#"{"messages": "m"}"#.into(), "`messages` is a string, expected a list of messages"),
            (message(""), "`messages` is empty"),
            (message("3"), "message 1 of 1: found a number, expected an object"),
            (
                message(r#"{"content": "c"}"#),
                "message 1 of 1: found the key `content`, expected `role` and `content`",
            ),
            (
                message(r#"{"role": "bot", "content": "c"}"#),
                "message 1 of 1: unknown role `bot`, expected `system`, `user`, `assistant` or `tool`",
            ),
            (message(r#"{"role": "user"}"#), "message 1 of 1: the content of the `user` message is empty"),
            (
                message(r#"{"role": "user", "content": {}}"#),
                "message 1 of 1: `content` is an object, expected a string",
            ),
            (
                message(r#"{"role": "user", "content": [{"type": "image", "url": "u"}]}"#),
                "message 1 of 1: found content of type `image`, expected only `text`",
            ),
        ] {
            assert_eq!(refusal(&record), format!("FILE:1: {expected}"), "{record}");
        }
    }

    #[test]
    fn a_file_has_one_format() {
        let mixed = "{\"text\": \"a\"}\n\n{\"prompt\": \"p\", \"completion\": \"c\"}";
        assert_eq!(
            refusal(mixed),
            "FILE:3: the record has the keys `prompt`, `completion`, expected `text` (format text)"
        );
        let error = read(file(mixed).path(), Format::PromptCompletion).unwrap_err();
        assert!(error.to_string().ends_with(
            ":1: the record has the key `text`, expected `prompt` and `completion` (format prompt-completion)"
        ));
        assert!(error.hint().unwrap().starts_with("all records of a file have the format of its first"));
    }
}
