//! JSON values of records: their kinds in words, strings that have to be there, and text that may be lost.

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// Keys whose text tells where a record is from, which nobody wants to learn.
const METADATA: [&str; 16] = [
    "id",
    "uuid",
    "guid",
    "idx",
    "index",
    "hash",
    "source",
    "url",
    "license",
    "language",
    "lang",
    "timestamp",
    "date",
    "created_at",
    "updated_at",
    "split",
];

/// Names the kind of a value for messages.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// The keys that an object has, as a message names them: the first ones of many.
pub(super) fn keys(object: &Map<String, Value>) -> String {
    const MOST: usize = 12;
    let named = |(key, value): (&String, &Value)| match value {
        Value::Null => format!("`{key}` (null)"),
        _ => format!("`{key}`"),
    };
    let names = object.iter().take(MOST).map(named).collect::<Vec<_>>().join(", ");
    match object.len() {
        many if many > MOST => format!("the keys {names} and {} more", many - MOST),
        0 => "no keys".to_string(),
        1 => format!("the key {names}"),
        _ => format!("the keys {names}"),
    }
}

/// A string that is not blank.
pub(super) fn filled(key: &str, value: Value) -> Result<String> {
    let text = string(key, value)?;
    if text.trim().is_empty() {
        return Err(Error::invalid(format!("`{key}` is empty")));
    }
    Ok(text)
}

/// A string.
pub(super) fn string(key: &str, value: Value) -> Result<String> {
    match value {
        Value::String(text) => Ok(text),
        other => Err(Error::invalid(format!("`{key}` is {}, expected a string", kind(&other)))),
    }
}

/// Whether somebody may miss what is under this key when it is not used.
pub(super) fn would_be_missed(key: &str, value: &Value) -> bool {
    let key = key.to_ascii_lowercase();
    !METADATA.contains(&key.as_str()) && !key.ends_with("_id") && !key.ends_with("_url") && has_text(value)
}

fn has_text(value: &Value) -> bool {
    match value {
        Value::String(text) => !text.trim().is_empty(),
        Value::Array(list) => list.iter().any(has_text),
        Value::Object(map) => map.values().any(has_text),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn text_is_missed_and_metadata_is_not() {
        for (key, value) in [("context", json!("c")), ("docs", json!([1, {"x": "y"}]))] {
            assert!(would_be_missed(key, &value), "{key}");
        }
        for (key, value) in [
            ("id", json!("x7")),
            ("ID", json!("x7")),
            ("thread_id", json!("x7")),
            ("image_url", json!("http://x")),
            ("score", json!(0.5)),
            ("good", json!(true)),
            ("notes", json!(" ")),
            ("parts", json!([{}, [], ""])),
        ] {
            assert!(!would_be_missed(key, &value), "{key}");
        }
    }

    #[test]
    fn keys_are_named_with_what_is_null() {
        let Value::Object(object) = json!({"a": 1, "b": null}) else { unreachable!() };
        assert_eq!(keys(&object), "the keys `a`, `b` (null)");
        let many: Map<String, Value> = (10..25).map(|n| (n.to_string(), json!(n))).collect();
        assert!(keys(&many).ends_with("`20`, `21` and 3 more"), "{}", keys(&many));
    }
}
