//! Types the values of a [`Document`](super::document::Document): serde's view of its nodes.
//!
//! A deserializer of our own, because serde's messages name Rust types and know no place. Here every fault carries
//! the key and the line or flag it comes from, and says what was expected in words.

use std::collections::btree_map;
use std::fmt::{self, Display};
use std::slice;

use serde::de::value::StrDeserializer;
use serde::de::{
    Deserialize, DeserializeSeed, Deserializer, Error as _, Expected, IntoDeserializer, MapAccess, SeqAccess,
    Unexpected, Visitor,
};

use super::document::{Document, Node, Origin, Value};
use super::other_tools;
use crate::error::{Error, Result, nearest};

/// Reads a value that serde knows.
pub(super) fn read_leaf<'de, T: Deserialize<'de>>(node: &'de Node) -> Result<T, Fault> {
    T::deserialize(node)
}

impl Document {
    /// The error that a fault stands for, with its place.
    pub(super) fn error_of(&self, fault: Fault) -> Error {
        let origin = fault.origin.clone().unwrap_or(Origin::Document);
        self.error_from(&origin, fault.into_error(self.upcycles()))
    }

    fn upcycles(&self) -> bool {
        let Value::Table(table) = &self.root.value else { return false };
        matches!(table.get("task"), Some(Node { value: Value::String(task), .. }) if task == "upcycle")
    }
}

/// What is wrong with a node. The key and the origin are filled in on the way up, the innermost first.
#[derive(Debug)]
pub(super) struct Fault {
    kind: FaultKind,
    /// Keys from the inside out.
    key: Vec<String>,
    origin: Option<Origin>,
}

#[derive(Debug)]
enum FaultKind {
    /// The last part of the key is unknown; those that would be known.
    UnknownKey(Vec<&'static str>),
    MissingKey(&'static str),
    UnknownName {
        found: String,
        expected: &'static [&'static str],
    },
    Unfit {
        expected: String,
        found: String,
    },
    Other(String),
}

impl Fault {
    fn new(kind: FaultKind) -> Self {
        Self { kind, key: Vec::new(), origin: None }
    }

    /// Another value was `expected` than `node` is.
    pub(super) fn unfit(expected: &str, node: &Node) -> Self {
        Self::new(FaultKind::Unfit { expected: expected.to_string(), found: node.value.describe() })
    }

    /// A key is none of those that are `known` in its table.
    pub(super) fn unknown_key(known: Vec<&'static str>) -> Self {
        Self::new(FaultKind::UnknownKey(known))
    }

    /// A table has not the key that it needs.
    pub(super) fn missing_key(name: &'static str) -> Self {
        Self::new(FaultKind::MissingKey(name))
    }

    /// Where it stands among the faults of a document: those of the whole first, then line by line, then flags.
    pub(super) fn place(&self) -> (u8, usize) {
        match &self.origin {
            None | Some(Origin::Document) => (0, 0),
            Some(Origin::Line(line)) => (1, *line),
            Some(Origin::Flag(_)) => (2, 0),
        }
    }

    /// Adds the key around it, and the place if none is known yet.
    pub(super) fn within(mut self, key: Option<&str>, origin: &Origin) -> Self {
        self.key.extend(key.map(str::to_string));
        self.origin.get_or_insert_with(|| origin.clone());
        self
    }

    /// The error, which names a key of ours where the unknown one is of another tool. Recipes that upcycle have no such keys.
    fn into_error(self, upcycles: bool) -> Error {
        let keys: Vec<&str> = self.key.iter().rev().map(String::as_str).collect();
        let key = keys.join(".");
        let (message, hint) = match self.kind {
            FaultKind::UnknownKey(known) => {
                let wanted = keys.last().copied().unwrap_or_default();
                let foreign = if upcycles { None } else { other_tools::hint(wanted) };
                let hint = foreign
                    .or_else(|| did_you_mean(wanted, &known))
                    .or_else(|| Some(format!("expected {}", one_of(&known))));
                (format!("unknown key `{key}`"), hint)
            }
            FaultKind::MissingKey(missing) => {
                let key = keys.iter().copied().chain([missing]).collect::<Vec<_>>().join(".");
                (format!("the key `{key}` is missing"), None)
            }
            FaultKind::UnknownName { found, expected } => {
                let hint = did_you_mean(&found, expected);
                (format!("`{key}`: expected {}, found `{found}`", one_of(expected)), hint)
            }
            FaultKind::Unfit { expected, found } => {
                (format!("`{key}`: expected {expected}, found {found}"), None)
            }
            FaultKind::Other(message) => (format!("`{key}`: {message}"), None),
        };
        Error::Request { message, hint }
    }
}

fn one_of(names: &[&str]) -> String {
    let names: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
    if names.len() == 1 { names.concat() } else { format!("one of {}", names.join(", ")) }
}

fn did_you_mean(wanted: &str, known: &[&str]) -> Option<String> {
    // Other tools write the name of the table in front: `lora_alpha`.
    let last = known
        .iter()
        .copied()
        .find(|name| wanted.strip_suffix(name).is_some_and(|first| first.ends_with('_')));
    let nearest = last.or_else(|| nearest(wanted, known.iter().copied(), 1).first().copied());
    nearest.map(|name| format!("did you mean `{name}`?"))
}

impl Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.kind)
    }
}

impl std::error::Error for Fault {}

impl serde::de::Error for Fault {
    fn custom<T: Display>(message: T) -> Self {
        Self::new(FaultKind::Other(message.to_string()))
    }

    fn invalid_type(found: Unexpected<'_>, expected: &dyn Expected) -> Self {
        // serde's own types name themselves as Rust does; ours say it in words already.
        let expected = match expected.to_string().as_str() {
            "usize" | "u64" | "u32" => "a whole number".to_string(),
            "f64" => "a number".to_string(),
            "a boolean" => "`true` or `false`".to_string(),
            "path string" => "a path in a string".to_string(),
            "a sequence" => "a list".to_string(),
            other => other.to_string(),
        };
        let found = match found {
            Unexpected::Map => "a table".to_string(),
            Unexpected::Seq => "a list".to_string(),
            Unexpected::Str(text) => format!("the string \"{text}\""),
            Unexpected::Signed(number) => format!("`{number}`"),
            Unexpected::Unsigned(number) => format!("`{number}`"),
            Unexpected::Float(number) if number.abs() >= 1e15 => format!("`{number:e}`"),
            // With its point, without which 150.0 would look like a whole number.
            Unexpected::Float(number) if expected.starts_with("a whole number") => format!("`{number:?}`"),
            Unexpected::Float(number) => format!("`{number}`"),
            Unexpected::Bool(flag) => format!("`{flag}`"),
            other => other.to_string(),
        };
        Self::new(FaultKind::Unfit { expected, found })
    }

    fn invalid_value(found: Unexpected<'_>, expected: &dyn Expected) -> Self {
        match found {
            Unexpected::Signed(number) if number < 0 && expected.to_string().starts_with('u') => {
                Self::invalid_type(found, &"a whole number of at least 0")
            }
            _ => Self::invalid_type(found, expected),
        }
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        Self::new(FaultKind::UnknownName { found: variant.to_string(), expected })
    }

    fn unknown_field(_: &str, expected: &'static [&'static str]) -> Self {
        Self::unknown_key(expected.to_vec())
    }

    fn missing_field(field: &'static str) -> Self {
        Self::missing_key(field)
    }
}

impl<'de> Deserializer<'de> for &'de Node {
    type Error = Fault;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match &self.value {
            Value::String(text) => visitor.visit_borrowed_str(text),
            Value::Integer(number) => visitor.visit_i64(*number),
            Value::Float(number) => visitor.visit_f64(*number),
            Value::Boolean(flag) => visitor.visit_bool(*flag),
            Value::Date(text) => {
                Err(Fault::invalid_type(Unexpected::Other(&format!("the date {text}")), &visitor))
            }
            Value::Array(nodes) => visitor.visit_seq(Elements(nodes.iter())),
            Value::Table(nodes) => visitor.visit_map(Entries { nodes: nodes.iter(), value: None }),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Fault> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        names: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        match &self.value {
            Value::String(name) => {
                visitor.visit_enum(IntoDeserializer::<Fault>::into_deserializer(name.as_str()))
            }
            other => Err(Fault::new(FaultKind::Unfit { expected: one_of(names), found: other.describe() })),
        }
    }

    /// Not even looked at, so that what is skipped is judged by whoever reads it.
    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_unit()
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct
        seq tuple tuple_struct map struct identifier
    }
}

/// The elements of a list.
struct Elements<'de>(slice::Iter<'de, Node>);

impl<'de> SeqAccess<'de> for Elements<'de> {
    type Error = Fault;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Fault> {
        self.0
            .next()
            .map(|node| seed.deserialize(node).map_err(|fault| fault.within(None, &node.origin)))
            .transpose()
    }
}

/// The entries of a table.
struct Entries<'de> {
    nodes: btree_map::Iter<'de, String, Node>,
    value: Option<(&'de String, &'de Node)>,
}

impl<'de> MapAccess<'de> for Entries<'de> {
    type Error = Fault;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Fault> {
        self.value = self.nodes.next();
        let Some((key, node)) = self.value else { return Ok(None) };
        let name: StrDeserializer<'_, Fault> = key.as_str().into_deserializer();
        seed.deserialize(name).map(Some).map_err(|fault| fault.within(Some(key), &node.origin))
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Fault> {
        let (key, node) =
            self.value.take().ok_or_else(|| Fault::custom("a value was read before its key"))?;
        seed.deserialize(node).map_err(|fault| fault.within(Some(key), &node.origin))
    }
}
