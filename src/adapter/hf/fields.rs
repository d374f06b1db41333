//! The keys of a JSON object, taken one by one with their types, and numbers as PEFT writes them.

use serde_json::{Map, Value, json};

use super::super::patterns::Patterns;

/// The file's keys, taken one by one; what is wrong is gathered, so that all of it is said at once.
pub(super) struct Fields {
    pub(super) map: Map<String, Value>,
    pub(super) problems: Vec<String>,
}

pub(super) enum NamesOrText {
    Names(Vec<String>),
    Text(String),
}

impl Fields {
    pub(super) fn new(map: Map<String, Value>) -> Self {
        Self { map, problems: Vec::new() }
    }

    /// The value of a key that is there and not null.
    pub(super) fn take(&mut self, key: &str) -> Option<Value> {
        self.map.shift_remove(key).filter(|value| !value.is_null())
    }

    pub(super) fn wrong(&mut self, key: &str, value: &Value, expected: &str) {
        self.problems.push(format!("`{key}` is {value}, expected {expected}"));
    }

    pub(super) fn number(&mut self, key: &str) -> Option<f64> {
        let value = self.take(key)?;
        let number = value.as_f64();
        if number.is_none() {
            self.wrong(key, &value, "a number");
        }
        number
    }

    pub(super) fn flag(&mut self, key: &str) -> bool {
        match self.take(key) {
            None => false,
            Some(Value::Bool(flag)) => flag,
            Some(value) => {
                self.wrong(key, &value, "true or false");
                false
            }
        }
    }

    pub(super) fn text(&mut self, key: &str) -> Option<String> {
        match self.take(key)? {
            Value::String(text) => Some(text).filter(|text| !text.is_empty()),
            value => {
                self.wrong(key, &value, "a string");
                None
            }
        }
    }

    pub(super) fn names_or_text(&mut self, key: &str) -> Option<NamesOrText> {
        let value = self.take(key)?;
        if let Value::String(text) = value {
            return Some(NamesOrText::Text(text));
        }
        let names: Option<Vec<String>> = value
            .as_array()
            .and_then(|list| list.iter().map(|name| name.as_str().map(str::to_string)).collect());
        if names.is_none() {
            self.wrong(key, &value, "a list of names or a regular expression");
        }
        names.map(NamesOrText::Names)
    }

    pub(super) fn patterns<T>(
        &mut self,
        key: &str,
        expected: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Patterns<T> {
        let map = match self.take(key) {
            None => return Patterns::default(),
            Some(Value::Object(map)) => map,
            Some(value) => {
                self.wrong(key, &value, "an object");
                return Patterns::default();
            }
        };
        let mut pairs = Vec::new();
        for (pattern, value) in map {
            match read(&value) {
                Some(read) => pairs.push((pattern, read)),
                None => self.wrong(&format!("{key}.{pattern}"), &value, expected),
            }
        }
        Patterns(pairs)
    }
}

/// Whether the value stands for "off" whatever the key.
pub(super) fn is_neutral(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(flag) => !flag,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Number(_) => false,
    }
}

/// Writes whole numbers without a point, as PEFT writes an alpha.
pub(super) fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 1e15 { json!(value as i64) } else { json!(value) }
}
