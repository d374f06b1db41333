//! Prompts that a model is to answer: one of the command line, or a file of them, `{"prompt": ".."}` or
//! `{"messages": [..]}` in each record.

use std::path::Path;

use serde_json::{Map, Value};

use super::container;
use super::conversation::{Conversation, Message, Role};
use super::record::{self, Format, VARIABLES};
use super::source::bytes_of;
use super::text::Text;
use super::value::{filled, keys, kind};
use crate::error::{Context, Error, Json, Result};

/// The keys that an answer is written under.
const ANSWER: [&str; 3] = ["completion", "tokens", "finish_reason"];

/// A record that asks for an answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Asked {
    /// All of it, as it was read.
    pub record: Map<String, Value>,
    /// The model answers this text or conversation.
    pub prompt: Conversation,
    /// Where it stands in the file.
    pub line: usize,
}

/// Reads all prompts of a file.
pub fn read_prompts(path: &Path) -> Result<Vec<Asked>> {
    let mut all = Vec::new();
    container::each(&bytes_of(path)?, path, &mut |json, line| {
        all.push(asked(json, line).at_line(path, line)?);
        Ok(())
    })?;
    if all.is_empty() {
        let hint = "write one per line: `{\"prompt\": \"..\"}` or `{\"messages\": [..]}`";
        return Err(Error::invalid("no prompts").with_hint(hint)).at(path);
    }
    Ok(all)
}

fn asked(Json { value, repeated }: Json, line: usize) -> Result<Asked> {
    if let Some(key) = repeated.first() {
        return Err(Error::invalid(format!("the key `{key}` stands more than once, expected once")));
    }
    let Value::Object(record) = value else {
        return Err(Error::invalid(format!("the record is {}, expected an object", kind(&value))));
    };
    if let Some(key) = ANSWER.into_iter().find(|key| record.contains_key(*key)) {
        return Err(Error::invalid(format!(
            "the record has a key `{key}`, which the answer is written under"
        ))
        .with_hint("give the key another name, such as `expected`"));
    }
    let prompt = match (record.get("prompt"), record.get("messages")) {
        (Some(prompt), None) => Conversation::Text(filled("prompt", prompt.clone())?),
        (None, Some(_)) => conversation(&record)?,
        (Some(_), Some(_)) => {
            return Err(Error::invalid("the record has `prompt` and `messages`, expected one of them"));
        }
        (None, None) => {
            let found = keys(&record);
            return Err(Error::invalid(format!("the record has {found}, expected `prompt` or `messages`")));
        }
    };
    Ok(Asked { record, prompt, line })
}

/// The conversation of a record with `messages`, read as one to train on is.
fn conversation(record: &Map<String, Value>) -> Result<Conversation> {
    let read = ["messages", "system", "tools", "functions", VARIABLES];
    let part = record.iter().filter(|(key, _)| read.contains(&key.as_str()));
    let part: Map<String, Value> = part.map(|(key, value)| (key.clone(), value.clone())).collect();
    let conversation = record::read(Value::Object(part), Format::Messages)?.0;
    if let Conversation::Chat { messages, .. } = &conversation
        && let Some(Message { role: Role::Assistant, .. }) = messages.last()
    {
        return Err(Error::invalid("the last message is the assistant's, expected one that it answers")
            .with_hint("take the last message out"));
    }
    Ok(conversation)
}

impl Text {
    /// The tokens that ask the model for an answer, with a system message before it where one is given. Where `raw`, a text is
    /// continued as it is, without the chat template.
    pub fn tokens_to_answer(
        &self,
        prompt: &Conversation,
        system: Option<&str>,
        raw: bool,
    ) -> Result<Vec<u32>> {
        let system = system.map(|system| Message::new(Role::System, system));
        match prompt {
            Conversation::Text(text) if raw => self.encode_document(text),
            Conversation::Text(text) => {
                let messages: Vec<Message> =
                    system.into_iter().chain([Message::new(Role::User, text)]).collect();
                self.prompt_tokens(&messages)
            }
            Conversation::Chat { .. } if raw => Err(Error::request(
                "`messages` go through the chat template, which `--raw` leaves out; expected `prompt`",
            )),
            Conversation::Chat { messages, tools, extra, .. } => {
                let first = messages.first().map(|message| message.role);
                if system.is_some() && matches!(first, Some(Role::System | Role::Developer)) {
                    return Err(Error::request(
                        "the messages begin with a system message of their own, and `--system` gives another",
                    )
                    .with_hint("keep one of the two"));
                }
                let messages: Vec<Message> = system.into_iter().chain(messages.iter().cloned()).collect();
                self.prompt_tokens_with(&messages, tools.as_ref(), extra)
            }
            Conversation::PromptCompletion { .. } => {
                Err(Error::invalid("the record has a completion already, expected a prompt alone"))
            }
        }
    }

    /// Refuses a system message for which the chat template has no place: it raises an error, or renders a conversation as it
    /// would without the message.
    pub fn check_system(&self, system: &str) -> Result<()> {
        let rendered = |messages: &[Message]| self.rendered(messages, None, &Map::new(), true);
        let question = Message::new(Role::User, "a");
        let with = |said: String| rendered(&[Message::new(Role::System, said), question.clone()]);
        let alone = rendered(std::slice::from_ref(&question));
        match (with(system.to_string()), alone) {
            (Err(error), Ok(_)) => {
                Err(Error::request(format!("the chat template has no place for a system message: {error}")))
            }
            (Ok(found), _) if found == with(format!("{system} b"))? => Err(Error::request(
                "the chat template has no place for a system message: it leaves the message out",
            )),
            (found, _) => found.map(drop),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn read(lines: &str) -> Result<Vec<Asked>, String> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(lines.as_bytes()).unwrap();
        let path = file.path().display().to_string();
        read_prompts(file.path()).map_err(|error| error.to_string().replace(&path, "f"))
    }

    #[test]
    fn prompts_keep_their_records_and_lines() {
        let read = read(
            "{\"id\": [1], \"prompt\": \"a\"}\n\n{\"messages\": [{\"role\": \"user\", \"content\": \"b\"}]}\n",
        );
        let [first, second] = &read.unwrap()[..] else { panic!("two prompts") };
        assert_eq!(first.record["id"], serde_json::json!([1]));
        assert_eq!(first.prompt, Conversation::Text("a".into()));
        assert_eq!((first.line, second.line), (1, 3));
        assert_eq!(second.prompt, Conversation::chat(vec![Message::new(Role::User, "b")]));
    }

    #[test]
    fn records_that_ask_nothing_are_refused_with_their_line() {
        for (line, said) in [
            ("{\"prompt\": \" \"}", "f:2: `prompt` is empty"),
            ("{\"prompt\": 1}", "f:2: `prompt` is a number, expected a string"),
            ("{\"text\": \"a\"}", "f:2: the record has the key `text`, expected `prompt` or `messages`"),
            ("[1]", "f:2: the record is a list, expected an object"),
            (
                "{\"prompt\": \"a\", \"prompt\": \"b\"}",
                "f:2: the key `prompt` stands more than once, expected once",
            ),
            (
                "{\"prompt\": \"a\", \"messages\": []}",
                "f:2: the record has `prompt` and `messages`, expected one of them",
            ),
            (
                "{\"prompt\": \"a\", \"tokens\": 1}",
                "f:2: the record has a key `tokens`, which the answer is written under",
            ),
            (
                "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}]}",
                "f:2: the last message is the assistant's, expected one that it answers",
            ),
            ("{\"messages\": []}", "f:2: `messages` is empty"),
        ] {
            assert_eq!(read(&format!("{{\"prompt\": \"a\"}}\n{line}\n")).unwrap_err(), said);
        }
        assert_eq!(read("\n").unwrap_err(), "f: no prompts");
    }
}
