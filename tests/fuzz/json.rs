//! Mutations of JSON that keep it JSON, mostly, so that they reach the code behind the parser.

use serde_json::{Map, Value, json};

use super::Files;
use super::chance::{Chance, mutate_bytes};

/// Stands before text that is to be written into the JSON as it is.
const RAW: &str = "\u{1}raw:";

/// Changes one thing of the JSON file `name`; of one that is no JSON any more, bytes.
pub(super) fn mutate_file(files: &mut Files, name: &str, chance: &mut Chance) {
    let Some(bytes) = files.get_mut(name) else { return };
    match serde_json::from_slice::<Value>(bytes) {
        Ok(mut value) if !chance.one_in(8) => {
            mutate(&mut value, chance);
            *bytes = write(&value);
        }
        _ => mutate_bytes(bytes, chance),
    }
}

/// Sets keys of the JSON file `name`, given as pointers such as `/model/type`; missing parents stay missing.
pub(super) fn with(files: &Files, name: &str, changes: &[(&str, Value)]) -> Files {
    let mut files = files.clone();
    let mut value: Value = serde_json::from_slice(&files[name]).unwrap();
    for (pointer, new) in changes {
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        value.pointer_mut(parent).unwrap()[key] = new.clone();
    }
    files.insert(name.to_string(), write(&value));
    files
}

/// The text of a value, raw parts as they are.
pub(super) fn write(value: &Value) -> Vec<u8> {
    let mut text = value.to_string();
    while let Some(start) = text.find("\"\\u0001raw:") {
        let mut strings = serde_json::Deserializer::from_str(&text[start..]).into_iter::<String>();
        let string = strings.next().unwrap().unwrap();
        let end = start + strings.byte_offset();
        text.replace_range(start..end, string.trim_start_matches(RAW));
    }
    text.into_bytes()
}

fn raw(text: &str) -> Value {
    Value::String(format!("{RAW}{text}"))
}

/// Changes one value, or which values a list or a table has.
pub(super) fn mutate(value: &mut Value, chance: &mut Chance) {
    let other = pick(value, chance).clone();
    let picked = pick(value, chance);
    if chance.one_in(4) {
        *picked = if chance.one_in(2) { other } else { any(chance) };
        return;
    }
    match picked {
        Value::Object(map) => change_map(map, other, chance),
        Value::Array(list) => change_list(list, other, chance),
        Value::Number(number) => {
            let now = number.as_u64().unwrap_or_default();
            *picked = match chance.below(3) {
                0 => json!(chance.integer(now)),
                _ => raw(chance.extreme()),
            };
        }
        Value::String(text) => change_string(text, chance),
        Value::Bool(truth) => *truth = !*truth,
        Value::Null => *picked = any(chance),
    }
}

/// A value somewhere in `value`, more often near the top: long lists would take all choices otherwise.
fn pick<'v>(value: &'v mut Value, chance: &mut Chance) -> &'v mut Value {
    let inner = match value {
        Value::Object(map) => map.len(),
        Value::Array(list) => list.len(),
        _ => 0,
    };
    if inner == 0 || chance.one_in(4) {
        return value;
    }
    let at = chance.below(inner);
    let child = match value {
        Value::Object(map) => map.values_mut().nth(at),
        Value::Array(list) => list.get_mut(at),
        _ => None,
    };
    pick(child.expect("there are as many"), chance)
}

fn any(chance: &mut Chance) -> Value {
    match chance.below(10) {
        0 => Value::Null,
        1 => json!(chance.one_in(2)),
        2 => json!([]),
        3 => json!({}),
        4 => json!(chance.phrase()),
        5 => raw(&nested(chance)),
        6 => json!("a".repeat(1 << chance.below(17))),
        _ => raw(chance.extreme()),
    }
}

fn nested(chance: &mut Chance) -> String {
    let deep = *chance.pick(&[3, 120, 200, 100_000]);
    let (open, close) = *chance.pick(&[("[", "]"), ("{\"a\":", "}")]);
    open.repeat(deep) + "1" + &close.repeat(deep)
}

fn change_map(map: &mut Map<String, Value>, other: Value, chance: &mut Chance) {
    let Some(key) = map.keys().nth(chance.below(map.len())).cloned() else {
        map.insert("a".to_string(), other);
        return;
    };
    match chance.below(4) {
        0 | 1 => drop(map.remove(&key)),
        2 => {
            let name = chance.phrase();
            let value = map.remove(&key).unwrap_or_default();
            map.insert(if chance.one_in(2) { name.to_string() } else { key + name }, value);
        }
        _ => drop(map.insert(key, other)),
    }
}

fn change_list(list: &mut Vec<Value>, other: Value, chance: &mut Chance) {
    let at = chance.below(list.len());
    match chance.below(6) {
        0 if !list.is_empty() => drop(list.remove(at)),
        1 if !list.is_empty() => list.insert(at, list[at].clone()),
        2 => list.clear(),
        3 => list.reverse(),
        4 => list.extend(list.clone()),
        _ => list.insert(at, other),
    }
}

fn change_string(text: &mut String, chance: &mut Chance) {
    let at = text.char_indices().nth(chance.below(text.chars().count())).map_or(0, |(at, _)| at);
    match chance.below(6) {
        0 => text.truncate(at),
        1 => text.insert_str(at, chance.phrase()),
        2 => *text = chance.phrase().to_string(),
        3 => *text = text.repeat(1 << chance.below(8)),
        4 => *text = chance.extreme().to_string(),
        _ => *text = text.chars().rev().collect(),
    }
}
