//! `data.train` and `data.eval`: a list of tables or of paths, or one path.

use std::fmt;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};

use super::SourceRecipe;

/// Reads a list of files.
pub(super) fn list<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<SourceRecipe>, D::Error> {
    deserializer.deserialize_any(List)
}

/// Reads a list of files like [`list`], for a key that may be left out.
pub(super) fn optional<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Vec<SourceRecipe>>, D::Error> {
    list(deserializer).map(Some)
}

impl SourceRecipe {
    fn of_path(path: &str) -> Self {
        Self { path: path.into(), weight: None, format: None }
    }
}

struct List;

impl<'de> Visitor<'de> for List {
    type Value = Vec<SourceRecipe>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of files, or a path in a string")
    }

    fn visit_str<E: Error>(self, path: &str) -> Result<Self::Value, E> {
        Ok(vec![SourceRecipe::of_path(path)])
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Self::Value, A::Error> {
        let mut files = Vec::new();
        while let Some(One(file)) = elements.next_element()? {
            files.push(file);
        }
        Ok(files)
    }
}

/// An element of the list.
struct One(SourceRecipe);

impl<'de> Deserialize<'de> for One {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(OneVisitor).map(Self)
    }
}

struct OneVisitor;

impl<'de> Visitor<'de> for OneVisitor {
    type Value = SourceRecipe;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a path in a string, or a table such as { path = \"data.jsonl\" }")
    }

    fn visit_str<E: Error>(self, path: &str) -> Result<SourceRecipe, E> {
        Ok(SourceRecipe::of_path(path))
    }

    fn visit_map<A: MapAccess<'de>>(self, table: A) -> Result<SourceRecipe, A::Error> {
        SourceRecipe::deserialize(MapAccessDeserializer::new(table))
    }
}
