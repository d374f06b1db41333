//! What recipes can say, made from the keys themselves: a reference, a recipe that shows every key, a schema for editors.

use serde_json::{Map, Value, json};

use super::Task;
use super::bounds::Bound;
use super::keys::{Default, Key, Kind, Table};

/// The width of a line of a comment.
const WIDTH: usize = 78;

impl Task {
    /// Its tables, the keys above all tables first.
    #[must_use]
    pub fn tables(self) -> &'static [Table] {
        match self {
            Self::Finetune => super::FINETUNE,
            Self::Upcycle => super::UPCYCLE,
        }
    }

    /// The keys of its tables with their whole names, in the order of a recipe; tables themselves are left out.
    pub fn keys(self) -> impl Iterator<Item = (String, &'static Key)> {
        self.tables().iter().flat_map(|table| {
            let values = table.keys.iter().filter(|key| !key.is_table());
            values.map(|key| (table.path(key), key))
        })
    }
}

/// A recipe that shows every key of a task, each in a comment with its meaning. What must be given is not commented out.
#[must_use]
pub fn commented(task: Task) -> String {
    let mut text = String::new();
    for table in task.tables().iter().filter(|table| !table.is_of_list()) {
        if !table.name.is_empty() {
            text += &format!("\n[{}]\n", table.name);
        }
        for key in table.keys.iter().filter(|key| !key.is_table()) {
            let said = match key.default {
                Default::Required => format!("{} {}.", key.meaning(), sentence(&key.values())),
                _ => format!("{} {}; left out: {}.", key.meaning(), sentence(&key.values()), key.default()),
            };
            text += &textwrap(&said);
            let mark = if matches!(key.default, Default::Required) { "" } else { "# " };
            text += &format!("{mark}{} = {}\n", key.name, key.example());
        }
    }
    text
}

/// The words with a capital letter.
fn sentence(words: &str) -> String {
    let mut letters = words.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

/// Lines of a comment.
fn textwrap(text: &str) -> String {
    let mut lines = String::new();
    let mut line = String::from("#");
    for word in text.split_whitespace() {
        if line.len() + 1 + word.len() > WIDTH {
            lines += &format!("{line}\n");
            line = String::from("#");
        }
        line += &format!(" {word}");
    }
    lines + &line + "\n"
}

/// A JSON Schema of recipes, which editors complete and check keys with.
#[must_use]
pub fn schema() -> Value {
    json!({
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "a recipe of peft",
        "oneOf": [of_task(Task::Finetune, "finetune"), of_task(Task::Upcycle, "upcycle")],
    })
}

fn of_task(task: Task, name: &str) -> Value {
    let mut schema = task.tables().first().map_or(Value::Null, |top| of_keys(top.keys));
    schema["properties"]["task"]["enum"] = json!([name]);
    schema
}

fn of_keys(keys: &[Key]) -> Value {
    let properties: Map<String, Value> = keys.iter().map(|key| (key.name.to_string(), of_key(key))).collect();
    let required: Vec<&str> =
        keys.iter().filter(|key| matches!(key.default, Default::Required)).map(|key| key.name).collect();
    json!({ "type": "object", "additionalProperties": false, "properties": properties, "required": required })
}

fn of_key(key: &Key) -> Value {
    let mut schema = of_kind(&(key.kind)());
    schema["description"] = json!(format!("{} Left out: {}.", key.meaning(), key.default()));
    match key.bound {
        Bound::Whole(least, most) => {
            schema["minimum"] = json!(least);
            schema["maximum"] = json!(most);
        }
        Bound::Positive(most) => {
            schema["exclusiveMinimum"] = json!(0);
            schema["maximum"] = json!(most);
        }
        Bound::NotNegative(most) => {
            schema["minimum"] = json!(0);
            schema["maximum"] = json!(most);
        }
        Bound::Share => {
            schema["minimum"] = json!(0);
            schema["maximum"] = json!(1);
        }
        Bound::BelowOne => {
            schema["minimum"] = json!(0);
            schema["exclusiveMaximum"] = json!(1);
        }
        Bound::Part => {
            schema["exclusiveMinimum"] = json!(0);
            schema["exclusiveMaximum"] = json!(1);
        }
        Bound::None => {}
    }
    schema
}

fn of_kind(kind: &Kind) -> Value {
    match kind {
        Kind::Flag => json!({ "type": "boolean" }),
        Kind::Whole => json!({ "type": "integer" }),
        Kind::Number => json!({ "type": "number" }),
        Kind::Text => json!({ "type": "string" }),
        Kind::Names(names) => json!({ "enum": names }),
        Kind::List(inner) => json!({ "type": "array", "items": of_kind(inner) }),
        Kind::Table(keys) => of_keys(keys),
        Kind::OneOf(kinds) => json!({ "anyOf": kinds.iter().map(of_kind).collect::<Vec<_>>() }),
        Kind::Words(words) if words == "`false`" => json!({ "const": false }),
        Kind::Words(_) => json!({}),
    }
}
