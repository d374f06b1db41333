//! A record of a known format to its conversation, and what of the record nothing reads.

use serde_json::{Map, Value, json};

use super::conversation::{Conversation, Message, Role};
use super::message::{OFF, ON, messages};
use super::value::{filled, keys, kind, string, would_be_missed};
use crate::error::{Error, Result};

/// Variables that templates get from elsewhere, so that a record cannot set them.
const RESERVED: [&str; 6] = [
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "mark_generation",
];

/// The key of a record under which it sets variables of the chat template.
pub(super) const VARIABLES: &str = "chat_template_kwargs";

/// The form that the records of a data file have.
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

/// Which format a record has, told from its keys.
pub(super) fn detect(record: &Value) -> Result<Format> {
    let Value::Object(record) = record else {
        return Err(Error::invalid(format!("the record is {}, expected an object", kind(record))));
    };
    detected(record).ok_or_else(|| {
        let found = keys(record);
        Error::invalid(format!("the record has {found}, expected {}", expected(Format::Auto)))
    })
}

fn detected(record: &Map<String, Value>) -> Option<Format> {
    let has = |key: &str| record.get(key).is_some_and(|value| !value.is_null());
    if has("messages") || has("conversations") {
        Some(Format::Messages)
    } else if has("prompt") && has("completion") {
        Some(Format::PromptCompletion)
    } else if has("instruction") && has("output") {
        Some(Format::Alpaca)
    } else if has("text") {
        Some(Format::Text)
    } else {
        None
    }
}

/// The keys that a record of this format has.
pub(super) fn expected(format: Format) -> &'static str {
    match format {
        Format::Auto => "`messages`, or `prompt` and `completion`, or `instruction` and `output`, or `text`",
        Format::Messages => "`messages` (format messages)",
        Format::Alpaca => "`instruction` and `output`, and perhaps `input` (format alpaca)",
        Format::PromptCompletion => "`prompt` and `completion` (format prompt-completion)",
        Format::Text => "`text` (format text)",
    }
}

/// Reads a record of a known format (not [`Format::Auto`]). Keys that are null count as absent. What comes with the
/// conversation are the keys of text that nothing has read.
pub(super) fn read(record: Value, format: Format) -> Result<(Conversation, Vec<String>)> {
    let Value::Object(mut record) = record else {
        return Err(Error::invalid(format!("the record is {}, expected an object", kind(&record))));
    };
    let has = |key: &str| record.get(key).is_some_and(|value| !value.is_null());
    let list = if has("conversations") { "conversations" } else { "messages" };
    let required: &[&str] = match format {
        Format::Auto => unreachable!("the format is told from the first record before any is read"),
        Format::Messages => &[list],
        Format::Alpaca => &["instruction", "output"],
        Format::PromptCompletion => &["prompt", "completion"],
        Format::Text => &["text"],
    };
    if !required.iter().all(|key| has(key)) {
        return Err(other_format(&record, format));
    }
    record.retain(|_, value| !value.is_null());
    let mut take = |key: &str| record.shift_remove(key).unwrap_or_default();

    let conversation = match format {
        Format::Text => Conversation::Text(filled("text", take("text"))?),
        Format::PromptCompletion => match (take("prompt"), take("completion")) {
            (Value::Array(_), Value::Array(completion)) if completion.is_empty() => {
                return Err(Error::invalid("`completion` is empty"));
            }
            (Value::Array(prompt), Value::Array(completion)) => {
                let learn_from = prompt.len();
                let said = messages(prompt.into_iter().chain(completion).collect())?;
                if let Some(i) = said[..learn_from].iter().position(|message| message.learn == Some(true)) {
                    return Err(Error::invalid(format!(
                        "message {} of `prompt` is marked as one to learn, and a prompt is not learned",
                        i + 1
                    ))
                    .with_hint("take the mark away, or write all messages into `messages`"));
                }
                chat(said, "prompt", learn_from, &mut record)?
            }
            (prompt, completion) => Conversation::PromptCompletion {
                prompt: string("prompt", prompt)?,
                completion: filled("completion", completion)?,
            },
        },
        Format::Alpaca => {
            let mut said = history(take("history"))?;
            let mut request = filled("instruction", take("instruction"))?;
            let input = take("input");
            let input = if input.is_null() { String::new() } else { string("input", input)? };
            if !input.is_empty() {
                request.push_str("\n\n");
                request.push_str(&input);
            }
            said.push(Message::new(Role::User, request));
            said.push(Message::new(Role::Assistant, filled("output", take("output"))?));
            chat(said, "instruction", 0, &mut record)?
        }
        Format::Messages | Format::Auto => match take(list) {
            Value::Array(said) if said.is_empty() => {
                return Err(Error::invalid(format!("`{list}` is empty")));
            }
            Value::Array(said) => chat(messages(said)?, list, 0, &mut record)?,
            other => {
                let found = kind(&other);
                return Err(Error::invalid(format!("`{list}` is {found}, expected a list of messages")));
            }
        },
    };
    let is_lost = |key: &str, value: &Value| {
        would_be_missed(key, value) || is_mark(key, value) || sets_variables(key, value)
    };
    let unused = record.into_iter().filter(|(key, value)| is_lost(key, value)).map(|(key, _)| key).collect();
    Ok((conversation, unused))
}

/// A record that lacks what its format has to have.
fn other_format(record: &Map<String, Value>, format: Format) -> Error {
    let found = keys(record);
    let rule = "all records of a file have the format of its first, or the one that the recipe names";
    let hint = match detected(record) {
        Some(own) if own != format => {
            format!("{rule}; this one has the format {}: put it into a file of its own", own.name())
        }
        _ => rule.to_string(),
    };
    Error::invalid(format!("the record has {found}, expected {}", expected(format))).with_hint(hint)
}

/// A conversation with what its record says beside the messages, which `list` holds.
fn chat(
    mut messages: Vec<Message>,
    list: &str,
    mut learn_from: usize,
    record: &mut Map<String, Value>,
) -> Result<Conversation> {
    let mut take = |key: &str| record.shift_remove(key).unwrap_or_default();
    if let Some(system) = system(take("system"))? {
        match messages.first() {
            Some(first) if matches!(first.role, Role::System | Role::Developer) => {
                if first.content.as_deref().is_none_or(|said| said.trim() != system.trim()) {
                    let role = first.role.name();
                    return Err(Error::invalid(format!(
                        "`system` differs from the `{role}` message that `{list}` begins with"
                    ))
                    .with_hint("keep one of the two"));
                }
            }
            _ => {
                messages.insert(0, Message::new(Role::System, system));
                learn_from += usize::from(learn_from > 0);
            }
        }
    }
    let tools = match (tools(take("tools"))?, take("functions")) {
        (Some(tools), functions) => {
            if !functions.is_null() {
                record.insert("functions".into(), functions);
            }
            Some(tools)
        }
        (None, functions) => listed("functions", functions)?.map(|list| {
            list.into_iter().map(|function| json!({"type": "function", "function": function})).collect()
        }),
    };
    let extra = variables(record.shift_remove(VARIABLES).unwrap_or_default())?;
    Ok(Conversation::Chat { messages, tools, extra, learn_from })
}

fn system(value: Value) -> Result<Option<String>> {
    let said = if value.is_null() { String::new() } else { string("system", value)? };
    Ok((!said.trim().is_empty()).then_some(said))
}

/// The turns before the instruction: a list of pairs of a question and its answer. Answers are learned, as
/// LLaMA-Factory learns them.
fn history(value: Value) -> Result<Vec<Message>> {
    let pairs = match value {
        Value::Null => return Ok(Vec::new()),
        Value::Array(pairs) => pairs,
        other => {
            let found = kind(&other);
            return Err(Error::invalid(format!(
                "`history` is {found}, expected a list of pairs of a question and its answer"
            )));
        }
    };
    let mut said = Vec::with_capacity(2 * pairs.len());
    for (i, pair) in pairs.into_iter().enumerate() {
        let found = match pair {
            Value::Array(mut pair) if pair.len() == 2 => {
                let (answer, question) = (pair.pop().unwrap_or_default(), pair.pop().unwrap_or_default());
                said.push(Message::new(Role::User, filled("history", question)?));
                said.push(Message::new(Role::Assistant, filled("history", answer)?));
                continue;
            }
            Value::Array(list) => format!("a list of {}", list.len()),
            other => kind(&other).to_string(),
        };
        return Err(Error::invalid(format!(
            "entry {} of `history` is {found}, expected a pair of a question and its answer",
            i + 1
        )));
    }
    Ok(said)
}

fn tools(value: Value) -> Result<Option<Value>> {
    Ok(listed("tools", value)?.map(Value::Array))
}

/// A list that is not empty. Some data sets hold it as a string of JSON.
fn listed(key: &str, value: Value) -> Result<Option<Vec<Value>>> {
    let list = match value {
        Value::Null => return Ok(None),
        Value::Array(list) => list,
        Value::String(text) if text.trim().is_empty() => return Ok(None),
        Value::String(text) => match serde_json::from_str(&text) {
            Ok(Value::Array(list)) => list,
            _ => return Err(Error::invalid(format!("`{key}` is a string that holds no JSON list"))),
        },
        other => return Err(Error::invalid(format!("`{key}` is {}, expected a list", kind(&other)))),
    };
    Ok((!list.is_empty()).then_some(list))
}

/// Variables for the template, as TRL takes them from a row.
fn variables(value: Value) -> Result<Map<String, Value>> {
    let value = match value {
        Value::String(text) if text.trim().is_empty() => Value::Null,
        Value::String(text) => serde_json::from_str(&text).unwrap_or(Value::String(text)),
        other => other,
    };
    let mut variables = match value {
        Value::Null => return Ok(Map::new()),
        Value::Object(variables) => variables,
        other => {
            return Err(Error::invalid(format!("`{VARIABLES}` is {}, expected an object", kind(&other))));
        }
    };
    // Tables have every variable in every row.
    variables.retain(|_, value| !value.is_null());
    if let Some(name) = variables.keys().find(|name| RESERVED.contains(&name.as_str())) {
        return Err(Error::invalid(format!("`{VARIABLES}` sets `{name}`, which is no variable of its own"))
            .with_hint("give messages and tools under keys of the record, and the template with the model"));
    }
    Ok(variables)
}

/// Whether this says of the whole record that it is learned less than others.
fn is_mark(key: &str, value: &Value) -> bool {
    let is_on = *value == Value::Bool(true) || value.as_f64() == Some(1.0);
    (ON.contains(&key) && !is_on) || (key == OFF && is_on)
}

/// Whether this sets variables of the chat template. In a record that goes through none, even a number or a boolean is lost.
fn sets_variables(key: &str, value: &Value) -> bool {
    key == VARIABLES && variables(value.clone()).map_or(true, |variables| !variables.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_as(format: Format, record: Value) -> (Conversation, Vec<String>) {
        read(record, format).unwrap()
    }

    /// Who says what, in order.
    fn said(format: Format, record: Value) -> Vec<(&'static str, String)> {
        let (Conversation::Chat { messages, .. }, unused) = read_as(format, record) else { unreachable!() };
        assert!(unused.is_empty(), "{unused:?}");
        messages.into_iter().map(|m| (m.role.name(), m.content.unwrap_or_default())).collect()
    }

    fn refusal(format: Format, record: Value) -> String {
        read(record, format).unwrap_err().to_string()
    }

    fn talk() -> Value {
        json!([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}])
    }

    #[test]
    fn system_beside_the_messages_is_the_first_of_them() {
        let expected =
            [("system", "s".to_string()), ("user", "q".to_string()), ("assistant", "a".to_string())];
        for record in [
            json!({"system": "s", "conversations": talk()}),
            json!({"system": "s", "messages": talk()}),
            json!({"system": "s", "messages": null, "conversations": talk(), "history": null}),
            json!({"system": "s", "conversations": [{"from": "system", "value": "s "}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}),
        ] {
            let said = said(Format::Messages, record.clone());
            assert_eq!(
                said.iter().map(|(role, _)| *role).collect::<Vec<_>>(),
                ["system", "user", "assistant"]
            );
            assert_eq!(said[0].1.trim(), "s", "{record}");
        }
        let alpaca = json!({"instruction": "q", "input": "", "output": "a", "system": "s"});
        assert_eq!(said(Format::Alpaca, alpaca), expected);
        for none in [json!(null), json!(""), json!(" ")] {
            assert_eq!(said(Format::Messages, json!({"system": none, "messages": talk()})).len(), 2);
        }
        let lists = json!({"system": "s", "prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]});
        let (Conversation::Chat { messages, learn_from: 2, .. }, _) =
            read_as(Format::PromptCompletion, lists)
        else {
            unreachable!()
        };
        assert_eq!(messages[0].role, Role::System);

        let two = json!({"system": "s", "messages": [{"role": "system", "content": "t"}, {"role": "user", "content": "q"}]});
        assert_eq!(
            refusal(Format::Messages, two),
            "`system` differs from the `system` message that `messages` begins with"
        );
        assert_eq!(
            refusal(Format::Messages, json!({"system": ["s"], "messages": talk()})),
            "`system` is a list, expected a string"
        );
    }

    #[test]
    fn history_comes_before_the_instruction() {
        let record = json!({"instruction": "q2", "output": "a2", "history": [["q0", "a0"], ["q1", "a1"]]});
        let said: Vec<String> = said(Format::Alpaca, record).into_iter().map(|(_, said)| said).collect();
        assert_eq!(said, ["q0", "a0", "q1", "a1", "q2", "a2"]);
        let with = |history: Value| json!({"instruction": "q", "output": "a", "history": history});
        assert_eq!(self::said(Format::Alpaca, with(json!([]))).len(), 2);
        assert_eq!(
            refusal(Format::Alpaca, with(json!("q a"))),
            "`history` is a string, expected a list of pairs of a question and its answer"
        );
        assert_eq!(
            refusal(Format::Alpaca, with(json!([["q", "a"], ["q"]]))),
            "entry 2 of `history` is a list of 1, expected a pair of a question and its answer"
        );
    }

    #[test]
    fn variables_and_functions_reach_the_template() {
        let record = json!({"messages": talk(), "functions": [{"name": "f"}],
            "chat_template_kwargs": {"enable_thinking": false, "date": null}});
        let (Conversation::Chat { tools, extra, .. }, unused) = read_as(Format::Messages, record) else {
            unreachable!()
        };
        assert_eq!(tools, Some(json!([{"type": "function", "function": {"name": "f"}}])));
        assert_eq!(Value::Object(extra), json!({"enable_thinking": false}));
        assert!(unused.is_empty());
        let with = |variables: Value| json!({"messages": talk(), "chat_template_kwargs": variables});
        let (Conversation::Chat { extra, .. }, _) = read_as(Format::Messages, with(json!("{\"x\": 1}")))
        else {
            unreachable!()
        };
        assert_eq!(extra["x"], 1);
        assert_eq!(
            refusal(Format::Messages, with(json!({"tools": []}))),
            "`chat_template_kwargs` sets `tools`, which is no variable of its own"
        );
        assert_eq!(
            refusal(Format::Messages, with(json!("x"))),
            "`chat_template_kwargs` is a string, expected an object"
        );
    }

    #[test]
    fn text_that_nothing_reads_is_named() {
        let unused = |format, record| read_as(format, record).1;
        let record =
            json!({"instruction": "q", "output": "a", "context": "c", "id": "7", "score": 2, "n": null});
        assert_eq!(unused(Format::Alpaca, record), ["context"]);
        let plain = json!({"prompt": "p", "completion": "c", "system": "s", "history": [["q", "a"]]});
        assert_eq!(unused(Format::PromptCompletion, plain), ["system", "history"]);
        let both = json!({"text": "t", "chat_template_kwargs": {"x": "y"}, "weight": 0});
        assert_eq!(unused(Format::Text, both), ["chat_template_kwargs", "weight"]);
        assert!(unused(Format::Text, json!({"text": "t", "weight": 1, "train": true})).is_empty());
        let switch = |value: Value| json!({"prompt": "p", "completion": "c", "chat_template_kwargs": value});
        for lost in [json!({"enable_thinking": false}), json!("{\"depth\": 2}"), json!(3)] {
            assert_eq!(unused(Format::PromptCompletion, switch(lost)), ["chat_template_kwargs"]);
        }
        for empty in [json!({}), json!({"enable_thinking": null}), json!(" ")] {
            assert!(unused(Format::PromptCompletion, switch(empty)).is_empty());
        }
        let two = json!({"messages": talk(), "conversations": talk()});
        assert_eq!(unused(Format::Messages, two), ["messages"]);
        let tools = json!({"messages": talk(), "tools": [{"name": "f"}], "functions": [{"name": "g"}]});
        assert_eq!(unused(Format::Messages, tools), ["functions"]);
    }
}
