//! The header of a GGUF file, held against the length of the file before any of it is read into memory: every count, length
//! and alignment that it states, and that it states each name once.

use std::collections::HashSet;

use crate::error::{Error, Result};

/// Metadata values of a file in all: a vocabulary has a few hundred thousand tokens, scores and merges. Each takes some
/// thirty bytes in memory, however small it is in the file.
const MOST_VALUES: u64 = 1 << 24;

/// Lists within lists that are followed; no known file has any.
const MOST_DEPTH: usize = 8;

/// Refuses a header that promises more than the file can hold, or says something twice.
pub(super) fn check(file: &[u8]) -> Result<()> {
    let mut header = Header { rest: file, wide: true, values: 0 };
    header.take(4)?;
    let version = header.number(4)?;
    if !(1..=3).contains(&version) {
        return Err(unreadable(format!("it is of version {version}, and versions 1 to 3 are known")));
    }
    header.wide = version > 1;
    let (tensors, entries) = (header.length()?, header.length()?);
    let mut seen = HashSet::new();
    for _ in 0..entries {
        let key = header.string()?;
        if !seen.insert(key) {
            return Err(twice("metadata key", key));
        }
        let kind = header.number(4)?;
        let value = header.value(kind, 0)?;
        if key == b"general.alignment" && !value.is_some_and(u64::is_power_of_two) {
            let stated = value.map_or("no whole number".to_string(), |value| value.to_string());
            return Err(Error::invalid(format!(
                "the header states an impossible alignment: `general.alignment` is {stated}, expected a power of two"
            )));
        }
    }
    seen.clear();
    for _ in 0..tensors {
        let name = header.string()?;
        if !seen.insert(name) {
            return Err(twice("tensor", name));
        }
        let dimensions = header.number(4)?;
        if dimensions > 4 {
            return Err(unreadable(format!(
                "tensor `{}` has {dimensions} dimensions, and 4 are the most",
                String::from_utf8_lossy(name)
            )));
        }
        for _ in 0..dimensions {
            header.length()?;
        }
        // The type, and where the values are.
        header.take(4 + 8)?;
    }
    Ok(())
}

/// Reads a GGUF header; `rest` holds the bytes that have not been read yet.
struct Header<'a> {
    rest: &'a [u8],
    /// Lengths have eight bytes; in version 1, four.
    wide: bool,
    /// Metadata values so far.
    values: u64,
}

impl<'a> Header<'a> {
    fn take(&mut self, count: u64) -> Result<&'a [u8]> {
        let taken = usize::try_from(count).ok().and_then(|count| self.rest.split_at_checked(count));
        let Some((taken, rest)) = taken else {
            let left = self.rest.len();
            return Err(unreadable(format!("its header needs {count} bytes where the file has {left} left")));
        };
        self.rest = rest;
        Ok(taken)
    }

    /// A whole number of `size` bytes, of at most eight.
    fn number(&mut self, size: u64) -> Result<u64> {
        Ok(self.take(size)?.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

    fn length(&mut self) -> Result<u64> {
        self.number(if self.wide { 8 } else { 4 })
    }

    fn string(&mut self) -> Result<&'a [u8]> {
        let length = self.length()?;
        self.take(length)
    }

    /// Passes over a value of a type and gives it where it is a whole number of at least zero.
    fn value(&mut self, kind: u64, depth: usize) -> Result<Option<u64>> {
        self.values += 1;
        if self.values > MOST_VALUES {
            return Err(unreadable(format!("it has more than {MOST_VALUES} metadata values")));
        }
        let not_negative = |number: u64, bits: u32| Some(number).filter(|number| number >> (bits - 1) == 0);
        match kind {
            0 | 7 => Ok(Some(self.number(1)?)),
            1 => Ok(not_negative(self.number(1)?, 8)),
            2 => Ok(Some(self.number(2)?)),
            3 => Ok(not_negative(self.number(2)?, 16)),
            4 => Ok(Some(self.number(4)?)),
            5 => Ok(not_negative(self.number(4)?, 32)),
            // Wide integers are not what candle reads as an alignment; floats are none.
            6 => self.take(4).map(|_| None),
            10..=12 => self.take(8).map(|_| None),
            8 => self.string().map(|_| None),
            9 if depth < MOST_DEPTH => {
                let (kind, count) = (self.number(4)?, self.length()?);
                for _ in 0..count {
                    self.value(kind, depth + 1)?;
                }
                Ok(None)
            }
            9 => Err(unreadable(format!("its metadata has lists within lists, {MOST_DEPTH} deep"))),
            other => Err(unreadable(format!("its metadata has a value of the unknown type {other}"))),
        }
    }
}

fn twice(what: &str, name: &[u8]) -> Error {
    Error::invalid(format!("the header names {what} `{}` twice", String::from_utf8_lossy(name)))
        .with_hint("one of the two would be ignored; write the file again with each name once")
}

pub(super) fn unreadable(what: String) -> Error {
    Error::invalid(format!("not a readable GGUF file: {what}"))
        .with_hint("a download or copy may have been cut short; fetch the file again")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn string(text: &str) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
    }

    /// A file of version 3 with these metadata entries (key, type, value) and tensors.
    fn file(entries: &[(&str, u32, Vec<u8>)], tensors: &[(&str, &[u64])]) -> Vec<u8> {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend((tensors.len() as u64).to_le_bytes());
        bytes.extend((entries.len() as u64).to_le_bytes());
        for (key, kind, value) in entries {
            bytes.extend([string(key), kind.to_le_bytes().to_vec(), value.clone()].concat());
        }
        for (name, dims) in tensors {
            bytes.extend(string(name));
            bytes.extend((dims.len() as u32).to_le_bytes());
            bytes.extend(dims.iter().flat_map(|n| n.to_le_bytes()));
            bytes.extend([0; 12]);
        }
        bytes
    }

    fn said(file: &[u8]) -> String {
        check(file).unwrap_err().to_string()
    }

    fn list(kind: u32, count: u64, values: &[u8]) -> Vec<u8> {
        [&kind.to_le_bytes()[..], &count.to_le_bytes(), values].concat()
    }

    #[test]
    fn an_honest_header_passes_and_every_prefix_of_it_is_refused() {
        let entries = [
            ("general.alignment", 4, 32u32.to_le_bytes().to_vec()),
            ("general.architecture", 8, string("llama")),
            ("tokens", 9, list(8, 2, &[string("a"), string("b")].concat())),
            ("eps", 6, vec![0; 4]),
        ];
        let whole = file(&entries, &[("a", &[2, 3]), ("b", &[])]);
        check(&whole).unwrap();
        for end in 0..whole.len() {
            assert!(said(&whole[..end]).starts_with("not a readable GGUF file"), "{end}");
        }
    }

    #[test]
    fn counts_beyond_the_file_and_repeated_names_are_refused() {
        let huge = u64::MAX.to_le_bytes().to_vec();
        assert!(said(&file(&[("x", 8, huge)], &[])).contains("needs 18446744073709551615 bytes"));
        let bytes = vec![0; MOST_VALUES as usize];
        assert!(
            said(&file(&[("x", 9, list(0, MOST_VALUES, &bytes))], &[])).contains("16777216 metadata values")
        );
        assert!(said(&file(&[("x", 9, list(0, 1 << 40, &[0; 9]))], &[])).contains("has 0 left"));
        let mut nested = list(0, 1, &[0]);
        (0..9).for_each(|_| nested = list(9, 1, &nested));
        assert!(said(&file(&[("x", 9, nested)], &[])).contains("lists within lists"));
        let one = ("x", 0, vec![1]);
        assert_eq!(said(&file(&[one.clone(), one], &[])), "the header names metadata key `x` twice");
        assert_eq!(said(&file(&[], &[("a", &[1]), ("a", &[1])])), "the header names tensor `a` twice");
        assert!(said(&file(&[], &[("a", &[1; 5])])).contains("has 5 dimensions"));
    }

    #[test]
    fn an_alignment_is_a_power_of_two() {
        for (kind, value) in [(4, vec![0; 4]), (4, vec![24, 0, 0, 0]), (5, vec![255; 4]), (8, string("8"))] {
            let said = said(&file(&[("general.alignment", kind, value)], &[]));
            assert!(said.contains("impossible alignment"), "{said}");
        }
    }
}
