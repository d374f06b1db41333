//! Data files: JSON Lines, one JSON list, or one JSON object with the list under `data`, of records of one format.
//!
//! ```text
//! {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}    messages
//! {"instruction": "…", "input": "…", "output": "…"}                                         alpaca
//! {"prompt": "…", "completion": "…"}                                                        prompt-completion
//! {"text": "…"}                                                                             text
//! ```
//!
//! `messages` may also be called `conversations`, with `from` and `value` in it; a prompt and a completion may both be
//! lists of messages. Beside messages and in alpaca records, `system`, `tools` and `chat_template_kwargs` are read, and
//! `history` in alpaca records. Text under other keys is counted, so that nothing is lost in silence.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::conversation::Conversation;
pub use super::record::Format;
use super::value::would_be_missed;
use super::{container, record};
use crate::error::{Context, Error, Json, Result, nearest_path, read_regular};

/// A data file of the recipe.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Source {
    /// A `.jsonl` or `.json` file; for training also a folder of them, or a pattern such as `data/*.jsonl`.
    pub path: PathBuf,
    /// How often each of its documents is seen per epoch: 2 is twice, 0.5 a seeded half.
    pub weight: f64,
    /// What its records look like; `Auto` reads the first.
    pub format: Format,
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

/// Holds the records of a data file.
#[derive(Debug, Clone, PartialEq)]
pub struct Records {
    /// In the order of the file.
    pub records: Vec<Record>,
    /// Their format, as given or as told from the first.
    pub format: Format,
    /// Keys of records with text that nothing reads.
    pub unused: Vec<Key>,
    /// Keys that stand more than once in an object of a record.
    pub repeated: Vec<Key>,
}

/// A key of records, and how many of them have it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Key {
    /// The key.
    pub key: String,
    /// So many records have the key.
    pub records: usize,
    /// The line of the first of them.
    pub line: usize,
}

impl Key {
    /// Counts `key` once more, for a record in this line.
    pub(super) fn count(keys: &mut BTreeMap<String, Self>, key: &str, line: usize) {
        match keys.get_mut(key) {
            Some(known) => known.records += 1,
            None => {
                keys.insert(key.to_string(), Self { key: key.to_string(), records: 1, line });
            }
        }
    }

    /// The keys in the order of their first lines.
    pub(super) fn ordered(keys: BTreeMap<String, Self>) -> Vec<Self> {
        let mut keys: Vec<Self> = keys.into_values().collect();
        keys.sort_by_key(|key| key.line);
        keys
    }
}

/// Reads all records of a file. Without a format, the first record tells it.
pub fn read(path: &Path, format: Format) -> Result<Records> {
    let bytes = bytes_of(path)?;
    let (mut unused, mut repeated) = (BTreeMap::new(), BTreeMap::new());
    let mut read = Records { records: Vec::new(), format, unused: Vec::new(), repeated: Vec::new() };
    let beside = container::each(&bytes, path, &mut |Json { value, repeated: keys }, line| {
        keys.iter().for_each(|key| Key::count(&mut repeated, key, line));
        if read.format == Format::Auto {
            read.format = record::detect(&value).at_line(path, line)?;
        }
        let (conversation, lost) = record::read(value, read.format).at_line(path, line)?;
        lost.iter().for_each(|key| Key::count(&mut unused, key, line));
        read.records.push(Record { conversation, line });
        Ok(())
    })?;
    for (key, value, line) in beside {
        if would_be_missed(&key, &value) {
            Key::count(&mut unused, &key, line);
        }
    }
    read.unused = Key::ordered(unused);
    read.repeated = Key::ordered(repeated);
    if read.records.is_empty() {
        let hint = format!("write one per line, with {}", record::expected(Format::Auto));
        return Err(Error::invalid("no records").with_hint(hint)).at(path);
    }
    Ok(read)
}

/// The bytes of a file of records.
pub(super) fn bytes_of(path: &Path) -> Result<Vec<u8>> {
    match read_regular(path, LARGEST) {
        Err(Error::Io(error)) if error.kind() == std::io::ErrorKind::NotFound => {
            let hint = match nearest_path(path, Path::is_file) {
                Some(near) => format!("did you mean `{}`?", near.display()),
                None => "relative paths are relative to the folder that the command runs in".to_string(),
            };
            Err(Error::request("there is no such file").with_hint(hint)).at(path)
        }
        Err(_) if path.is_dir() => {
            Err(Error::request("is a folder, expected a `.jsonl` or `.json` file")).at(path)
        }
        read => read.at(path),
    }
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
        let read = read(file(bytes).path(), Format::Auto).unwrap();
        (read.records, read.format)
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
        assert_eq!(messages[0].fields.keys().collect::<Vec<_>>(), ["tool_calls"]);
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
        assert_eq!(
            refusal(b"{\"text\": \"a\"}\n{\"text\": \"\xff\"}"),
            "FILE:2: not valid UTF-8: the byte 0xff at column 11"
        );
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
                message(r#"{"role": "critic", "content": "c"}"#),
                "message 1 of 1: unknown role `critic`, expected `system`, `developer`, `user`, `assistant` or `tool`",
            ),
            (message(r#"{"role": "user"}"#), "message 1 of 1: the `user` message has no `content`"),
            (
                message(r#"{"role": "user", "content": " "}"#),
                "message 1 of 1: the content of the `user` message is empty",
            ),
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
        assert_eq!(
            error.hint(),
            Some(
                "all records of a file have the format of its first, or the one that the recipe names; this one has the \
                 format text: put it into a file of its own"
            )
        );
    }

    #[test]
    fn a_list_may_be_held_by_an_object() {
        for (bytes, expected) in [
            ("{\"data\": [{\"text\": \"a\"}, {\"text\": \"b\"}]}", vec![1, 1]),
            (
                "{\"version\": 1,\n \"data\": [\n{\"text\": \"a\"},\n{\"text\": \"b\"}]\n, \"n\": 2}\n",
                vec![3, 4],
            ),
            ("{\"rows\": [{\"text\": \"a\"}]}", vec![1]),
            // A record in which the list is data of its own.
            ("{\"data\": [{\"x\": 1}], \"text\": \"a\"}", vec![1]),
        ] {
            let read = records(bytes).0;
            assert_eq!(read.iter().map(|record| record.line).collect::<Vec<_>>(), expected, "{bytes}");
        }
        let beside =
            read(file("{\"system\": \"s\", \"data\": [{\"text\": \"a\"}]}").path(), Format::Auto).unwrap();
        assert_eq!(beside.unused, [Key { key: "system".into(), records: 1, line: 1 }]);
        for (bytes, expected) in [
            (
                "{\"train\": [{\"text\": \"a\"}]}",
                "FILE: the file is one object with a list of records under `train`",
            ),
            (
                "{\"data\": [{\"text\": \"a\"}], \"test\": [{\"text\": \"b\"}]}",
                "FILE: the file is one object with several lists of records: `data`, `test`",
            ),
            (
                "{\"data\":\n[{\"text\": \"a\"},\n{\"text\": x}]}",
                "FILE:3: not valid JSON at column 10: expected value",
            ),
            ("{\"data\": [{\"text\": \"a\"}", "FILE:1: the list ends before its `]`"),
            (
                "{\"data\": []}",
                "FILE:1: the record has the key `data`, expected `messages`, or `prompt` and `completion`, or `instruction` and `output`, or `text`",
            ),
        ] {
            assert_eq!(refusal(bytes), expected, "{bytes}");
        }
    }

    #[test]
    fn what_python_writes_and_json_does_not_have_is_named() {
        for (bytes, expected) in [
            (
                r#"{"text": "é", "x": NaN}"#,
                "FILE:1: not valid JSON at column 20: found `NaN`, which Python writes and JSON does not have",
            ),
            (
                r#"{"text": "a", "x": -Infinity}"#,
                "FILE:1: not valid JSON at column 20: found `-Infinity`, which Python writes and JSON does not have",
            ),
            (
                "[\n{\"x\": 1}, {\"x\": Infinity}]",
                "FILE:2: the record has the key `x`, expected `messages`, or `prompt` and `completion`, or `instruction` and `output`, or `text`",
            ),
            (
                "[\n{\"text\": \"a\"}, {\"x\": Infinity}]",
                "FILE:2: not valid JSON at column 22: found `Infinity`, which Python writes and JSON does not have",
            ),
            (
                "{'text': 'a'}",
                "FILE:1: not valid JSON at column 2: found `'`, which Python writes and JSON does not have",
            ),
            (
                r#"{"text": None}"#,
                "FILE:1: not valid JSON at column 10: found `None`, which Python writes and JSON does not have",
            ),
        ] {
            assert_eq!(refusal(bytes), expected, "{bytes}");
        }
    }

    #[test]
    fn half_surrogates_are_named() {
        let with = |said: &str| format!(r#"{{"text": "{said}"}}"#);
        for (said, column, half) in [
            (r"a \ud83d", 13, r"\ud83d"),
            (r"\ud83dx", 11, r"\ud83d"),
            (r"\\ud83d \ude00", 19, r"\ude00"),
            (r"\ud83d\u0041", 11, r"\ud83d"),
            (r"\ud83d\ude00 \ud83d", 24, r"\ud83d"),
        ] {
            assert_eq!(
                refusal(with(said)),
                format!(
                    "FILE:1: not valid JSON at column {column}: `{half}` is half of a surrogate pair, which is no character"
                )
            );
        }
        assert_eq!(only(&with(r"\ud83d\ude00")), Conversation::Text("😀".into()));
    }

    #[test]
    fn unused_keys_are_counted_with_their_first_line() {
        let rows = "{\"text\": \"a\"}\n{\"text\": \"a\", \"note\": \"n\"}\n{\"text\": \"a\", \"note\": \"n\", \"id\": \"i\"}";
        let read = read(file(rows).path(), Format::Auto).unwrap();
        assert_eq!(read.unused, [Key { key: "note".into(), records: 2, line: 2 }]);
    }
}
