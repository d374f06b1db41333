//! The header of a safetensors file, looked at before the crate reads it: of two entries of one name a JSON reader keeps
//! the last in silence.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt;

use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};

use crate::error::{Error, Result};

/// Refuses the bytes of a safetensors file whose header names a tensor twice. Other faults are left to the reader.
pub fn refuse_repeated_names(file: &[u8]) -> Result<()> {
    let Some(header) = header(file) else { return Ok(()) };
    match serde_json::Deserializer::from_slice(header).deserialize_map(FirstRepeated) {
        Ok(Some(name)) => Err(Error::invalid(format!("the header names tensor `{name}` twice"))
            .with_hint("one of the two would be ignored; write the file again with each tensor once")),
        Ok(None) | Err(_) => Ok(()),
    }
}

/// The JSON of the header, where the file is long enough to have one.
fn header(file: &[u8]) -> Option<&[u8]> {
    let length = u64::from_le_bytes(file.get(..8)?.try_into().ok()?);
    file.get(8..usize::try_from(length).ok()?.checked_add(8)?)
}

/// Reads the keys of a JSON object and gives the first one that is there twice.
struct FirstRepeated;

impl<'de> Visitor<'de> for FirstRepeated {
    type Value = Option<String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a table of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut seen: HashSet<Cow<'de, str>> = HashSet::new();
        let mut first = None;
        // To the end: what is left of a map is an error to its reader.
        while let Some((Name(name), IgnoredAny)) = map.next_entry::<Name<'de>, IgnoredAny>()? {
            if let Some(repeated) = seen.replace(name) {
                first.get_or_insert_with(|| repeated.into_owned());
            }
        }
        Ok(first)
    }
}

/// A key, borrowed from the file unless it has escapes.
#[derive(serde::Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

#[cfg(test)]
mod tests {
    use super::*;

    fn file(json: &str) -> Vec<u8> {
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend(json.as_bytes());
        bytes
    }

    #[test]
    fn a_name_counts_as_it_is_read_not_as_it_is_escaped() {
        assert!(refuse_repeated_names(&file(r#"{"a":{},"b":{"a":1},"__metadata__":{"a":"b"}}"#)).is_ok());
        for twice in [r#"{"a":{},"b":1,"a":{},"c":{}}"#, r#"{"a":{},"\u0061":{},"b":1,"b":2}"#] {
            let error = refuse_repeated_names(&file(twice)).unwrap_err();
            assert_eq!(error.to_string(), "the header names tensor `a` twice");
        }
        for other in [&b"short"[..], &u64::MAX.to_le_bytes(), &file("["), &file("{\"a\"")] {
            assert!(refuse_repeated_names(other).is_ok());
        }
    }
}
