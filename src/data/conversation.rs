//! What a record says: a conversation, a prompt with its completion, or a text.

use serde_json::{Map, Value};

use super::source::Format;
use crate::error::{Error, Result};

/// One document before it becomes tokens.
#[derive(Debug, Clone, PartialEq)]
pub enum Conversation {
    /// Messages that go through the model's chat template.
    Chat {
        /// In order.
        messages: Vec<Message>,
        /// Descriptions of tools, handed to the template as they are.
        tools: Option<Value>,
        /// Assistant messages before this one are context only.
        learn_from: usize,
    },
    /// Two strings that are joined as they are; the second is learned.
    PromptCompletion {
        /// What is given.
        prompt: String,
        /// What is learned, without the end token.
        completion: String,
    },
    /// A text that is learned whole.
    Text(String),
}

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    /// Who speaks.
    pub role: Role,
    /// What is said; none beside tool calls.
    pub content: Option<String>,
    /// What else the record says about it (`tool_calls`, `reasoning_content`, `name`, …), for the template. A `content`
    /// that is null stays here: templates tell it from one that is missing.
    pub fields: Map<String, Value>,
}

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Instructions that hold for the whole conversation.
    System,
    /// The one who asks.
    User,
    /// The model.
    Assistant,
    /// What a tool answered.
    Tool,
}

impl Role {
    /// The name that chat templates know.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
        }
    }

    fn parse(name: &str) -> Option<Self> {
        match name {
            "system" => Some(Self::System),
            "user" | "human" => Some(Self::User),
            "assistant" | "gpt" => Some(Self::Assistant),
            "tool" => Some(Self::Tool),
            _ => None,
        }
    }
}

impl Message {
    /// A plain message.
    pub fn new(role: Role, content: impl Into<String>) -> Self {
        Self { role, content: Some(content.into()), fields: Map::new() }
    }
}

impl Conversation {
    /// A conversation of which every assistant message is learned.
    #[must_use]
    pub fn chat(messages: Vec<Message>) -> Self {
        Self::Chat { messages, tools: None, learn_from: 0 }
    }

    /// Reads a record of a known format (not [`Format::Auto`]).
    pub(crate) fn from_record(record: Value, format: Format) -> Result<Self> {
        let Value::Object(mut record) = record else {
            return Err(Error::invalid(format!("the record is {}, expected an object", kind(&record))));
        };
        let list = if record.contains_key("conversations") { "conversations" } else { "messages" };
        let required: &[&str] = match format {
            Format::Auto => unreachable!("the format is told from the first record before any is read"),
            Format::Messages => &[list],
            Format::Alpaca => &["instruction", "output"],
            Format::PromptCompletion => &["prompt", "completion"],
            Format::Text => &["text"],
        };
        if required.iter().any(|key| record.get(*key).is_none_or(Value::is_null)) {
            let found = keys(&record);
            return Err(Error::invalid(format!("the record has {found}, expected {}", expected(format)))
                .with_hint(
                    "all records of a file have the format of its first, or the one that the recipe names",
                ));
        }
        let mut take = |key: &str| record.shift_remove(key).unwrap_or_default();

        match format {
            Format::Text => Ok(Self::Text(filled("text", take("text"))?)),
            Format::PromptCompletion => match (take("prompt"), take("completion")) {
                (Value::Array(_), Value::Array(completion)) if completion.is_empty() => {
                    Err(Error::invalid("`completion` is empty"))
                }
                (Value::Array(prompt), Value::Array(completion)) => {
                    let learn_from = prompt.len();
                    let messages = messages(prompt.into_iter().chain(completion).collect())?;
                    Ok(Self::Chat { messages, tools: tools(take("tools"))?, learn_from })
                }
                (prompt, completion) => Ok(Self::PromptCompletion {
                    prompt: string("prompt", prompt)?,
                    completion: filled("completion", completion)?,
                }),
            },
            Format::Alpaca => {
                let mut request = filled("instruction", take("instruction"))?;
                let input = take("input");
                let input = if input.is_null() { String::new() } else { string("input", input)? };
                if !input.is_empty() {
                    request.push_str("\n\n");
                    request.push_str(&input);
                }
                let answer = filled("output", take("output"))?;
                Ok(Self::chat(vec![Message::new(Role::User, request), Message::new(Role::Assistant, answer)]))
            }
            Format::Messages | Format::Auto => match take(list) {
                Value::Array(said) if said.is_empty() => Err(Error::invalid(format!("`{list}` is empty"))),
                Value::Array(said) => {
                    Ok(Self::Chat { messages: messages(said)?, tools: tools(take("tools"))?, learn_from: 0 })
                }
                other => {
                    let found = kind(&other);
                    Err(Error::invalid(format!("`{list}` is {found}, expected a list of messages")))
                }
            },
        }
    }
}

/// The keys that a record of this format has.
pub(crate) fn expected(format: Format) -> &'static str {
    match format {
        Format::Auto => "`messages`, or `prompt` and `completion`, or `instruction` and `output`, or `text`",
        Format::Messages => "`messages` (format messages)",
        Format::Alpaca => "`instruction` and `output`, and perhaps `input` (format alpaca)",
        Format::PromptCompletion => "`prompt` and `completion` (format prompt-completion)",
        Format::Text => "`text` (format text)",
    }
}

/// The keys that a record has, as a message names them.
pub(crate) fn keys(record: &Map<String, Value>) -> String {
    match record.len() {
        0 => "no keys".to_string(),
        1 => format!("the key {}", quoted(record)),
        _ => format!("the keys {}", quoted(record)),
    }
}

fn quoted(record: &Map<String, Value>) -> String {
    record.keys().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(", ")
}

fn messages(list: Vec<Value>) -> Result<Vec<Message>> {
    let count = list.len();
    list.into_iter()
        .enumerate()
        .map(|(i, value)| {
            message(value).map_err(|error| match error {
                Error::Invalid { message, hint } => {
                    Error::Invalid { message: format!("message {} of {count}: {message}", i + 1), hint }
                }
                other => other,
            })
        })
        .collect()
}

fn message(value: Value) -> Result<Message> {
    let Value::Object(mut fields) = value else {
        return Err(Error::invalid(format!("found {}, expected an object", kind(&value))));
    };
    let (role_key, content_key) =
        if fields.contains_key("role") { ("role", "content") } else { ("from", "value") };
    let Some(role) = fields.shift_remove(role_key) else {
        return Err(Error::invalid(format!("found {}, expected `role` and `content`", keys(&fields))));
    };
    let role = string(role_key, role)?;
    let role = Role::parse(&role).ok_or_else(|| {
        Error::invalid(format!("unknown role `{role}`, expected `system`, `user`, `assistant` or `tool`"))
    })?;
    let content = match fields.get(content_key) {
        None | Some(Value::Null) => None,
        Some(_) => match fields.shift_remove(content_key).unwrap_or_default() {
            Value::Array(parts) => Some(parts.into_iter().map(part).collect::<Result<String>>()?),
            other => Some(string(content_key, other)?),
        },
    };
    let empty = content.as_deref().is_none_or(|said| said.trim().is_empty());
    if empty && role != Role::Tool && !fields.contains_key("tool_calls") {
        return Err(Error::invalid(format!("the content of the `{}` message is empty", role.name())));
    }
    Ok(Message { role, content, fields })
}

fn part(value: Value) -> Result<String> {
    match value {
        Value::String(text) => Ok(text),
        Value::Object(mut part) => match (part.shift_remove("type"), part.shift_remove("text")) {
            (Some(Value::String(kind)), Some(Value::String(text))) if kind == "text" => Ok(text),
            (Some(Value::String(kind)), _) if kind != "text" => {
                Err(Error::invalid(format!("found content of type `{kind}`, expected only `text`")))
            }
            _ => Err(Error::invalid("a part of the content lacks `type` = `text` and `text`")),
        },
        other => {
            Err(Error::invalid(format!("a part of the content is {}, expected an object", kind(&other))))
        }
    }
}

/// Some data sets hold the list as a string of JSON.
fn tools(value: Value) -> Result<Option<Value>> {
    match value {
        Value::Null => Ok(None),
        Value::Array(list) => Ok((!list.is_empty()).then_some(Value::Array(list))),
        Value::String(text) if text.trim().is_empty() => Ok(None),
        Value::String(text) => match serde_json::from_str(&text) {
            Ok(Value::Array(list)) => Ok((!list.is_empty()).then_some(Value::Array(list))),
            _ => Err(Error::invalid("`tools` is a string that holds no JSON list")),
        },
        other => Err(Error::invalid(format!("`tools` is {}, expected a list", kind(&other)))),
    }
}

fn filled(key: &str, value: Value) -> Result<String> {
    let text = string(key, value)?;
    if text.trim().is_empty() {
        return Err(Error::invalid(format!("`{key}` is empty")));
    }
    Ok(text)
}

fn string(key: &str, value: Value) -> Result<String> {
    match value {
        Value::String(text) => Ok(text),
        other => Err(Error::invalid(format!("`{key}` is {}, expected a string", kind(&other)))),
    }
}

pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
