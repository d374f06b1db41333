//! JSON whose objects may have a key twice. The last value counts, as in Python, and the key is told: somebody may miss the
//! value before it.

use std::collections::BTreeSet;
use std::fmt;

use serde::de::{Deserialize, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::map::Entry;
use serde_json::{Map, Number, Value};

/// A JSON value, and the keys that stand more than once in an object of it.
#[derive(Debug)]
pub(crate) struct Json {
    pub(crate) value: Value,
    pub(crate) repeated: BTreeSet<String>,
}

impl Json {
    /// Says which keys are repeated, where any are.
    pub(crate) fn warning(&self) -> Option<String> {
        const MOST: usize = 8;
        let named: Vec<String> = self.repeated.iter().take(MOST).map(|key| format!("`{key}`")).collect();
        let (named, verb) = match self.repeated.len() {
            0 => return None,
            1 => (named.join(", "), "stands"),
            many if many > MOST => (format!("{} and {} more keys", named.join(", "), many - MOST), "stand"),
            _ => (named.join(", "), "stand"),
        };
        Some(format!("{named} {verb} more than once in an object, and only the last value is used"))
    }
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut repeated = BTreeSet::new();
        let value = Reader(&mut repeated).deserialize(deserializer)?;
        Ok(Self { value, repeated })
    }
}

/// Reads a value as serde_json does, and notes the keys that are repeated.
struct Reader<'a>(&'a mut BTreeSet<String>);

impl<'de> DeserializeSeed<'de> for Reader<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Reader<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any valid JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_string()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = list.next_element_seed(Reader(self.0))? {
            values.push(value);
        }
        Ok(Value::Array(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<Value, A::Error> {
        let mut values = Map::new();
        while let Some(key) = object.next_key::<String>()? {
            let value = object.next_value_seed(Reader(self.0))?;
            match values.entry(key) {
                Entry::Vacant(place) => drop(place.insert(value)),
                Entry::Occupied(mut place) => {
                    self.0.insert(place.key().clone());
                    place.insert(value);
                }
            }
        }
        Ok(Value::Object(values))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_those_of_serde_json_and_repeated_keys_are_told() {
        for (text, repeated) in [
            (
                r#"{"a": [1, -2, 3.5, 1e400, 18446744073709551615], "b": {"c": null, "d": true}, "e": "\u00e9\n"}"#,
                vec![],
            ),
            (r#"{"b": 1, "a": 2, "b": 3}"#, vec!["b"]),
            (r#"[{"a": {"x": 1, "x": 2}}, {"a": 1, "a": 2, "a": 3}]"#, vec!["a", "x"]),
            (r#"{"a": 1, "\u0061": 2}"#, vec!["a"]),
            (r#"[{"a": 1}, {"a": 1}]"#, vec![]),
            ("{", vec![]),
            (r#"{"a": }"#, vec![]),
            ("[1, 2", vec![]),
            (r#"{"a": 1} 2"#, vec![]),
        ] {
            match (serde_json::from_str::<Json>(text), serde_json::from_str::<Value>(text)) {
                (Ok(read), Ok(value)) => {
                    assert_eq!(read.value.to_string(), value.to_string(), "{text}");
                    assert_eq!(Vec::from_iter(&read.repeated), repeated, "{text}");
                }
                (read, value) => {
                    assert_eq!(read.unwrap_err().to_string(), value.unwrap_err().to_string(), "{text}")
                }
            }
        }
        let warning = |text| serde_json::from_str::<Json>(text).unwrap().warning();
        let wanted = "`a` stands more than once in an object, and only the last value is used";
        assert_eq!(warning(r#"{"a": 1, "a": 2}"#).as_deref(), Some(wanted));
        assert_eq!(warning(r#"{"a": 1}"#), None);
        let deep = "[".repeat(200);
        let error = |text| serde_json::from_str::<Json>(text).unwrap_err().to_string();
        assert!(error(&deep).starts_with("recursion limit exceeded"));
    }
}
