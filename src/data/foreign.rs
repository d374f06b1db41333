//! Files that are no JSON, named for what they are and with what to do: compressed files, tables, other encodings.

use std::path::Path;

use crate::error::{Context, Error, Result};

/// First bytes of files that are often given for data, what has them, and what to do.
const BINARY: [(&[u8], &str, &str); 15] = [
    (b"\x1f\x8b", "compressed with gzip", "decompress it first, with `gunzip`"),
    (
        b"PK\x03\x04",
        "a zip archive",
        "unpack it first, with `unzip`; a table of Excel has to be written as JSON Lines",
    ),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", "decompress it first, with `zstd -d`"),
    (b"\xfd7zXZ\0", "compressed with xz", "decompress it first, with `xz -d`"),
    (b"BZh", "compressed with bzip2", "decompress it first, with `bunzip2`"),
    (b"\x04\x22\x4d\x18", "compressed with lz4", "decompress it first, with `lz4 -d`"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first, with `7z x`"),
    (
        b"PAR1",
        "a Parquet file",
        "write it as JSON Lines first: `pandas.read_parquet(old).to_json(new, orient=\"records\", lines=True)`",
    ),
    (b"ARROW1", "an Arrow file", ARROW),
    (b"\xff\xff\xff\xff", "an Arrow stream, as `datasets` keeps it", ARROW),
    (b"SQLite format 3\0", "a SQLite database", "write its rows as JSON Lines first"),
    (b"%PDF", "a PDF", "write its text as JSON Lines first, as `{\"text\": \"…\"}`"),
    (b"GGUF", "a GGUF model", "name it as `model.source`; data are `.jsonl` or `.json` files"),
    (b"\xff\xfe", "encoded in UTF-16", UTF_16),
    (b"\xfe\xff", "encoded in UTF-16", UTF_16),
];

const ARROW: &str = "write it as JSON Lines first: `datasets.Dataset.from_file(old).to_json(new)`, or `load_from_disk` for a folder";
const UTF_16: &str = "data files are UTF-8; convert it with `iconv -f UTF-16 -t UTF-8 OLD > NEW`";
const CSV: &str =
    "write it as JSON Lines first: `pandas.read_csv(old).to_json(new, orient=\"records\", lines=True)`";

/// Names the kind of a file from its first bytes and says how to make data of it; `None` where it may be JSON or is not known.
#[must_use]
pub fn kind_of_file(head: &[u8], path: &Path) -> Option<(&'static str, &'static str)> {
    let text = String::from_utf8_lossy(head);
    let first = text.trim_start_matches('\u{feff}').lines().find(|line| !line.trim().is_empty());
    binary(head).or_else(|| looks_like(first?, path))
}

/// Names a file that is no text in UTF-8 by its first bytes.
fn binary(bytes: &[u8]) -> Option<(&'static str, &'static str)> {
    let found = BINARY.iter().find(|(magic, ..)| bytes.starts_with(magic));
    // Without a byte order mark, an ASCII character in UTF-16 has a zero beside it.
    let wide = matches!(bytes, [b'{' | b'[', 0, ..] | [0, b'{' | b'[', ..]);
    found.map(|(_, name, hint)| (*name, *hint)).or(wide.then_some(("encoded in UTF-16", UTF_16)))
}

/// The text of a file without its byte order mark, or what the file is instead.
pub(super) fn text<'a>(bytes: &'a [u8], path: &Path) -> Result<&'a str> {
    if let Some((name, hint)) = binary(bytes) {
        return Err(
            Error::invalid(format!("the file is {name}, expected JSON Lines or JSON")).with_hint(hint)
        )
        .at(path);
    }
    match std::str::from_utf8(bytes) {
        Ok(text) => Ok(text.strip_prefix('\u{feff}').unwrap_or(text)),
        Err(error) => {
            let (valid, rest) = bytes.split_at(error.valid_up_to());
            let line = 1 + valid.iter().filter(|&&byte| byte == b'\n').count();
            let start = valid.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
            let column =
                1 + String::from_utf8_lossy(&valid[start..]).trim_start_matches('\u{feff}').chars().count();
            let byte = rest.first().copied().unwrap_or_default();
            let message = format!("not valid UTF-8: the byte 0x{byte:02x} at column {column}");
            Err(Error::invalid(message).with_hint(
                "data files are UTF-8; convert one that a Windows program wrote with `iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW`",
            ))
            .at_line(path, line)
        }
    }
}

/// Names the kind of file from its first line; `None` where it looks like broken JSON.
pub(super) fn of_text(line: &str, path: &Path) -> Option<Error> {
    let (name, hint) = looks_like(line, path)?;
    Some(Error::invalid(format!("the file looks like {name}, expected JSON Lines or JSON")).with_hint(hint))
}

fn looks_like(line: &str, path: &Path) -> Option<(&'static str, &'static str)> {
    let said = line.trim();
    if said.starts_with(['{', '[']) {
        return None;
    }
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default().to_ascii_lowercase();
    let lower = said.to_ascii_lowercase();
    Some(if said.starts_with("version https://git-lfs.github.com/") {
        ("a pointer of Git LFS to data that are not here", "fetch them with `git lfs pull`")
    } else if lower.starts_with("<!doctype html") || lower.starts_with("<html") {
        ("a web page", "download the file itself; a page is what a browser shows of it")
    } else if lower.starts_with("<?xml") {
        ("XML", "write its records as JSON Lines first")
    } else if ["yaml", "yml"].contains(&ending.as_str()) || is_yaml(said) {
        ("YAML", "write it as JSON first: `json.dump(yaml.safe_load(open(old)), open(new, \"w\"))`")
    } else if ending == "tsv" || said.contains('\t') {
        (
            "a table with tabs (TSV)",
            "write it as JSON Lines first: `pandas.read_csv(old, sep=\"\\t\").to_json(new, orient=\"records\", lines=True)`",
        )
    } else if ending == "csv" || is_csv(said) {
        ("a CSV file", CSV)
    } else if said.starts_with(|c: char| c.is_alphabetic()) {
        ("plain text", "write each document as a line `{\"text\": \"…\"}`")
    } else {
        return None;
    })
}

fn is_yaml(line: &str) -> bool {
    let key = line.strip_prefix("- ").unwrap_or(line);
    let is_key =
        |key: &str| !key.is_empty() && key.chars().all(|c| c.is_alphanumeric() || c == '_' || c == '-');
    line == "---"
        || line.starts_with("%YAML")
        || line.starts_with("- ")
        || key
            .split_once(':')
            .is_some_and(|(key, rest)| is_key(key) && (rest.is_empty() || rest.starts_with(' ')))
}

/// A header of short names, or a first row that begins with a quoted field.
fn is_csv(line: &str) -> bool {
    let separated = |by: char| {
        let mut fields = line.split(by);
        line.contains(by) && fields.all(|field| (1..=3).contains(&field.split_whitespace().count()))
    };
    (line.starts_with('"') && (line.contains("\",") || line.contains("\";")))
        || separated(',')
        || separated(';')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(bytes: &[u8]) -> String {
        text(bytes, Path::new("F")).unwrap_err().to_string()
    }

    #[test]
    fn binary_files_are_named() {
        for (bytes, name) in [
            (&b"\x1f\x8b\x08\0"[..], "compressed with gzip"),
            (b"PK\x03\x04\x14", "a zip archive"),
            (b"\x28\xb5\x2f\xfd\x04", "compressed with zstd"),
            (b"PAR1\x15\x04", "a Parquet file"),
            (b"ARROW1\0\0", "an Arrow file"),
            (b"\xff\xff\xff\xff\x10\0", "an Arrow stream, as `datasets` keeps it"),
            (b"\xff\xfe{\0", "encoded in UTF-16"),
            (b"{\0\"\0", "encoded in UTF-16"),
        ] {
            assert_eq!(named(bytes), format!("F: the file is {name}, expected JSON Lines or JSON"));
        }
    }

    #[test]
    fn a_wrong_byte_is_named_with_its_place() {
        let latin = [&b"{\"text\": \"a\"}\n{\"text\": \"caf"[..], b"\xe9\"}"].concat();
        assert_eq!(named(&latin), "F:2: not valid UTF-8: the byte 0xe9 at column 14");
        let cut = ["\u{feff}éé".as_bytes(), b"\xc3"].concat();
        assert_eq!(named(&cut), "F:1: not valid UTF-8: the byte 0xc3 at column 3");
    }

    #[test]
    fn other_text_is_named() {
        let named = |line: &str, path: &str| {
            let error = of_text(line, Path::new(path))?.to_string();
            Some(error.strip_prefix("the file looks like ")?.split(", expected").next()?.to_string())
        };
        for (line, path, name) in [
            ("instruction,output", "x.jsonl", "a CSV file"),
            ("\"a b, c\",\"d\"", "x.jsonl", "a CSV file"),
            ("text", "x.csv", "a CSV file"),
            ("q;a", "x", "a CSV file"),
            ("q\ta", "x", "a table with tabs (TSV)"),
            ("- text: a", "x", "YAML"),
            ("messages:", "x", "YAML"),
            ("text: hello", "x", "YAML"),
            ("---", "x", "YAML"),
            (
                "version https://git-lfs.github.com/spec/v1",
                "x.jsonl",
                "a pointer of Git LFS to data that are not here",
            ),
            ("<!DOCTYPE html>", "x", "a web page"),
            ("Once upon a time, there was a king.", "x.txt", "plain text"),
        ] {
            assert_eq!(named(line, path).as_deref(), Some(name), "{line}");
        }
        for line in ["{\"text\": }", "{\"a\", \"b\"}", "{'text': 'a'}"] {
            assert_eq!(named(line, "x.csv"), None, "{line}");
        }
    }
}
