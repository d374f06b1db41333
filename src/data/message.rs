//! One message of a record: its role, its content, whether it is learned, and what else goes to the template.
//!
//! OpenAI's `role` and `content` and ShareGPT's `from` and `value` are read, with the roles that both are written with.

use serde_json::{Map, Value, json};

use super::conversation::{Message, Role};
use super::value::{keys, kind, string};
use crate::error::{Error, Result};

/// The meaning that a role's name has in a record.
#[derive(Clone, Copy, PartialEq)]
enum Named {
    Role(Role),
    /// An assistant message whose content is a tool call in JSON, as LLaMA-Factory writes it.
    Call,
}

/// The names that each role goes by; the first is the standard one.
const ROLES: [(Named, &[&str]); 6] = [
    (Named::Role(Role::System), &["system"]),
    (Named::Role(Role::Developer), &["developer"]),
    (Named::Role(Role::User), &["user", "human", "prompter"]),
    (Named::Role(Role::Assistant), &["assistant", "gpt", "chatgpt", "bot", "chatbot", "model", "ai"]),
    (
        Named::Role(Role::Tool),
        &[
            "tool",
            "observation",
            "function",
            "ipython",
            "tool_response",
            "tool_result",
            "function_response",
            "function_result",
        ],
    ),
    (Named::Call, &["function_call", "tool_call"]),
];

/// Keys that switch learning of a message on: of OpenAI and Mistral, of axolotl, of XTuner and ms-swift.
pub(super) const ON: [&str; 4] = ["weight", "train", "training", "loss"];

/// A key that switches learning of a message off, as torchtune names it.
pub(super) const OFF: &str = "masked";

/// Reads a list of messages.
pub(super) fn messages(list: Vec<Value>) -> Result<Vec<Message>> {
    let count = list.len();
    let mut messages = Vec::with_capacity(count);
    for (i, value) in list.into_iter().enumerate() {
        messages.push(message(value).map_err(|error| match error {
            Error::Invalid { message, hint } => {
                Error::Invalid { message: format!("message {} of {count}: {message}", i + 1), hint }
            }
            other => other,
        })?);
    }
    Ok(messages)
}

fn message(value: Value) -> Result<Message> {
    let Value::Object(mut fields) = value else {
        return Err(Error::invalid(format!("found {}, expected an object", kind(&value))));
    };
    fields.retain(|_, value| !value.is_null());
    let role_key = if fields.contains_key("role") { "role" } else { "from" };
    let Some(role) = fields.shift_remove(role_key) else {
        return Err(Error::invalid(format!("found {}, expected `role` and `content`", keys(&fields))));
    };
    let name = string(role_key, role)?;
    let named = parse(&name)?;
    let role = match named {
        Named::Role(role) => role,
        Named::Call => Role::Assistant,
    };
    let learn = learn(&mut fields, role)?;
    let content_key = ["content", "value"].into_iter().find(|key| fields.contains_key(*key));
    let said = content_key.and_then(|key| fields.shift_remove(key));

    if named == Named::Call {
        let said = said.ok_or_else(|| missing(&name, &fields))?;
        if fields.contains_key("tool_calls") {
            return Err(Error::invalid(format!(
                "the `{name}` message has `tool_calls` too, and both are calls"
            ))
            .with_hint("write all calls of a turn into `tool_calls` of one `assistant` message"));
        }
        fields.insert("tool_calls".into(), calls(&name, said)?);
        return Ok(Message { role, content: None, learn, fields });
    }
    old_call(&mut fields)?;
    let calls = has_calls(&mut fields)?;
    let content = match said {
        None => None,
        Some(Value::Array(parts)) => Some(parts.into_iter().map(part).collect::<Result<String>>()?),
        Some(other) => Some(string(content_key.unwrap_or("content"), other)?),
    };
    if role != Role::Tool && !calls {
        match &content {
            None => return Err(missing(&name, &fields)),
            Some(said) if said.trim().is_empty() => {
                return Err(Error::invalid(format!("the content of the `{name}` message is empty")));
            }
            Some(_) => {}
        }
    }
    Ok(Message { role, content, learn, fields })
}

fn parse(name: &str) -> Result<Named> {
    let lower = name.to_ascii_lowercase();
    let found = ROLES.iter().find(|(_, names)| names.contains(&lower.as_str()));
    found.map(|(named, _)| *named).ok_or_else(|| {
        let others: Vec<String> =
            ROLES.iter().flat_map(|(_, names)| names.iter()).map(|name| format!("`{name}`")).collect();
        Error::invalid(format!(
            "unknown role `{name}`, expected `system`, `developer`, `user`, `assistant` or `tool`"
        ))
        .with_hint(format!("these names are read: {}", others.join(", ")))
    })
}

fn missing(role: &str, fields: &Map<String, Value>) -> Error {
    let beside = if fields.is_empty() { String::new() } else { format!("; it has {}", keys(fields)) };
    Error::invalid(format!("the `{role}` message has no `content`{beside}"))
        .with_hint("what is said goes under `content` (or `value`, beside `from`), and may not be null")
}

/// Whether the message is switched on or off; the keys that say so are removed, for no template reads them.
fn learn(fields: &mut Map<String, Value>, role: Role) -> Result<Option<bool>> {
    if fields.contains_key("train_detail") {
        return Err(Error::invalid(
            "`train_detail` marks parts of a message, and only whole ones can be marked",
        )
        .with_hint("split the message in two, and mark each with `train`"));
    }
    let mut found: Option<(&str, bool)> = None;
    for key in ON.into_iter().chain([OFF]) {
        let Some(value) = fields.shift_remove(key) else { continue };
        let on = match (&value, value.as_f64()) {
            (Value::Bool(on), _) => *on,
            (_, Some(0.0)) => false,
            (_, Some(1.0)) => true,
            _ => {
                let expected = if key == "weight" { "0 or 1" } else { "true or false" };
                return Err(Error::invalid(format!("`{key}` is {value}, expected {expected}")).with_hint(
                    "a message is learned or it is not; how often documents are seen is the `weight` of their file",
                ));
            }
        } != (key == OFF);
        // A weight of 1 is the default of the formats that have the key, and they speak of assistant messages alone.
        if key == "weight" && on && role != Role::Assistant {
            continue;
        }
        match found {
            Some((other, before)) if before != on => {
                return Err(Error::invalid(format!("`{other}` and `{key}` say the opposite of each other")));
            }
            _ => found = Some((key, on)),
        }
    }
    Ok(found.map(|(_, on)| on))
}

/// The calls that a message of LLaMA-Factory's role `function_call` consists of, as templates read them.
fn calls(role: &str, said: Value) -> Result<Value> {
    let wrong = |found: &str| {
        Error::invalid(format!(
            "the content of the `{role}` message is {found}, expected JSON with `name` and `arguments`"
        ))
    };
    let said = match said {
        Value::String(text) => serde_json::from_str(&text).map_err(|_| wrong("no JSON"))?,
        other => other,
    };
    let list = match said {
        Value::Array(list) if !list.is_empty() => list,
        Value::Object(call) => vec![Value::Object(call)],
        other => return Err(wrong(kind(&other))),
    };
    let calls = list.into_iter().map(|call| match call {
        Value::Object(call) if call.contains_key("name") && call.contains_key("arguments") => {
            Ok(json!({"type": "function", "function": call}))
        }
        Value::Object(call) => Err(wrong(&format!("JSON with {}", keys(&call)))),
        other => Err(wrong(&format!("a list with {}", kind(&other)))),
    });
    Ok(Value::Array(calls.collect::<Result<_>>()?))
}

/// Reads OpenAI's older `function_call` of an assistant message as the one tool call that it is.
fn old_call(fields: &mut Map<String, Value>) -> Result<()> {
    if fields.contains_key("tool_calls") {
        return Ok(());
    }
    if let Some(call) = fields.shift_remove("function_call") {
        let Value::Object(call) = call else {
            return Err(Error::invalid(format!("`function_call` is {}, expected an object", kind(&call))));
        };
        fields.insert("tool_calls".into(), json!([{"type": "function", "function": call}]));
    }
    Ok(())
}

/// Whether the message calls tools. Some data sets hold the list of calls as a string of JSON.
fn has_calls(fields: &mut Map<String, Value>) -> Result<bool> {
    let calls = match fields.get_mut("tool_calls") {
        None => return Ok(false),
        Some(calls) => calls,
    };
    if let Value::String(text) = calls {
        *calls = match serde_json::from_str(text) {
            Ok(Value::Array(list)) => Value::Array(list),
            _ if text.trim().is_empty() => Value::Array(Vec::new()),
            _ => return Err(Error::invalid("`tool_calls` is a string that holds no JSON list")),
        };
    }
    match calls {
        Value::Array(list) => Ok(!list.is_empty()),
        other => Err(Error::invalid(format!("`tool_calls` is {}, expected a list", kind(other)))),
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn read(message: Value) -> Message {
        messages(vec![message]).unwrap().remove(0)
    }

    fn refusal(message: Value) -> String {
        messages(vec![message]).unwrap_err().to_string()
    }

    #[test]
    fn roles_are_read_as_their_users_mean_them() {
        for (name, role) in [
            ("system", Role::System),
            ("developer", Role::Developer),
            ("human", Role::User),
            ("User", Role::User),
            ("gpt", Role::Assistant),
            ("chatgpt", Role::Assistant),
            ("bot", Role::Assistant),
            ("model", Role::Assistant),
            ("observation", Role::Tool),
            ("ipython", Role::Tool),
            ("function", Role::Tool),
        ] {
            let message = read(json!({"from": name, "value": "said"}));
            assert_eq!((message.role, message.content.as_deref()), (role, Some("said")), "{name}");
        }
        let error = messages(vec![json!({"role": "critic", "content": "c"})]).unwrap_err();
        assert!(error.hint().unwrap().contains("`observation`"), "{error}");
    }

    #[test]
    fn calls_are_read_in_every_form() {
        let call = json!({"name": "f", "arguments": {"x": 1}});
        let calls = json!([{"type": "function", "function": call}]);
        for said in [call.clone(), json!(call.to_string()), json!([call])] {
            let message = read(json!({"from": "function_call", "value": said}));
            assert_eq!((message.role, &message.content), (Role::Assistant, &None));
            assert_eq!(message.fields["tool_calls"], calls);
        }
        let old = read(json!({"role": "assistant", "content": null, "function_call": call}));
        assert_eq!(old.fields["tool_calls"], calls);
        let text = read(json!({"role": "assistant", "content": "", "tool_calls": calls.to_string()}));
        assert_eq!(text.fields["tool_calls"], calls);

        let wrong = |said: Value| refusal(json!({"from": "function_call", "value": said}));
        assert_eq!(
            wrong(json!("f(1)")),
            "message 1 of 1: the content of the `function_call` message is no JSON, expected JSON with `name` and `arguments`"
        );
        assert!(wrong(json!({"name": "f"})).contains("is JSON with the key `name`, expected"));
        assert!(wrong(json!([])).contains("is a list, expected"));
        assert_eq!(
            refusal(json!({"role": "assistant", "tool_calls": {}})),
            "message 1 of 1: `tool_calls` is an object, expected a list"
        );
        assert!(refusal(json!({"role": "assistant", "tool_calls": []})).contains("has no `content`"));
    }

    #[test]
    fn messages_are_switched_on_and_off() {
        let learn = |role: &str, mark: Value| {
            let mut message = json!({"role": role, "content": "said"});
            message.as_object_mut().unwrap().append(mark.clone().as_object_mut().unwrap());
            let message = read(message);
            assert!(message.fields.is_empty(), "no template reads {mark}");
            message.learn
        };
        for off in [
            json!({"weight": 0}),
            json!({"weight": 0.0}),
            json!({"train": false}),
            json!({"training": false}),
            json!({"loss": false}),
            json!({"masked": true}),
            json!({"weight": false, "train": 0}),
        ] {
            assert_eq!(learn("assistant", off), Some(false));
        }
        for on in [json!({"weight": 1}), json!({"train": true}), json!({"masked": false})] {
            assert_eq!(learn("assistant", on), Some(true));
        }
        assert_eq!(learn("assistant", json!({"weight": null})), None);
        assert_eq!(learn("user", json!({"weight": 1})), None);
        assert_eq!(learn("user", json!({"train": true})), Some(true));

        let wrong = |mark: Value| {
            let mut message = json!({"role": "assistant", "content": "said"});
            message.as_object_mut().unwrap().append(mark.clone().as_object_mut().unwrap());
            refusal(message)
        };
        assert_eq!(wrong(json!({"weight": 0.5})), "message 1 of 1: `weight` is 0.5, expected 0 or 1");
        assert_eq!(wrong(json!({"weight": 2})), "message 1 of 1: `weight` is 2, expected 0 or 1");
        assert_eq!(
            wrong(json!({"train": "no"})),
            "message 1 of 1: `train` is \"no\", expected true or false"
        );
        assert_eq!(
            wrong(json!({"weight": 1, "train": false})),
            "message 1 of 1: `weight` and `train` say the opposite of each other"
        );
        assert!(wrong(json!({"train_detail": []})).contains("`train_detail` marks parts"));
    }

    #[test]
    fn keys_that_are_null_are_no_keys() {
        let message = read(json!({"role": "assistant", "content": "said", "tool_calls": null, "name": null}));
        assert_eq!(message, Message::new(Role::Assistant, "said"));
        let call = json!({"role": "assistant", "content": null, "tool_calls": [{"id": "1"}], "name": "n"});
        assert_eq!(read(call).fields.keys().collect::<Vec<_>>(), ["tool_calls", "name"]);
        assert_eq!(
            refusal(json!({"role": "user", "content": null, "text": "q"})),
            "message 1 of 1: the `user` message has no `content`; it has the key `text`"
        );
    }
}
