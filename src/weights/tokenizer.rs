//! A `tokenizer.json` before and while the `tokenizers` crate reads it: what makes the crate panic, or a text grow
//! without measure, is an error.

use serde::Deserialize;
use serde_json::Value;
use tokenizers::Tokenizer;

use crate::error::{Error, Result, caught};

/// Normalizers may make a text at most this many times as long. SentencePiece needs 1, and Unicode forms are not
/// counted.
const MOST_GROWTH: usize = 16;

const HINT: &str =
    "load the tokenizer with transformers and save it again, or take the file of the published model";

/// A tokenizer from its JSON.
pub(super) fn read(json: &[u8]) -> Result<Tokenizer> {
    #[derive(Deserialize)]
    struct Parts {
        #[serde(default)]
        normalizer: Value,
    }

    if let Ok(parts) = serde_json::from_slice::<Parts>(json) {
        let growth = growth(&parts.normalizer)?;
        if growth > MOST_GROWTH {
            return Err(Error::invalid(format!(
                "its normalizers can make a text {growth} times as long, and at most {MOST_GROWTH} times is read"
            ))
            .with_hint(HINT));
        }
    }
    let read = caught(|| {
        let mut tokenizer = Tokenizer::from_bytes(json)?;
        // Whoever trains decides where rows are cut and filled, and a file may ask for filled ones without end.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None)?;
        // What is wrong with a normalizer shows with the first text.
        tokenizer.encode_fast("a b\nHello wörld", true)?;
        Ok::<_, tokenizers::Error>(tokenizer)
    });
    match read {
        Ok(Ok(tokenizer)) => Ok(tokenizer),
        Ok(Err(error)) => Err(Error::invalid(format!("not a readable tokenizer: {error}")).with_hint(HINT)),
        Err(panic) => Err(Error::invalid(format!("not a usable tokenizer: {panic}")).with_hint(HINT)),
    }
}

/// Computes by which factor a normalizer may multiply the characters of a text.
fn growth(normalizer: &Value) -> Result<usize> {
    let text = |path: &str| normalizer.pointer(path).and_then(Value::as_str);
    match text("/type") {
        Some("Sequence") => {
            let parts = normalizer.get("normalizers").and_then(Value::as_array).into_iter().flatten();
            parts.map(growth).try_fold(1usize, |product, part| Ok(product.saturating_mul(part?)))
        }
        Some("Replace") => {
            // A regular expression may match a single character.
            let replaced = text("/pattern/String").map_or(1, |pattern| pattern.chars().count());
            let content = text("/content").unwrap_or_default().chars().count();
            if replaced == 0 {
                return Err(Error::invalid("a normalizer replaces the empty text").with_hint(HINT));
            }
            Ok(content.div_ceil(replaced).max(1))
        }
        Some("Precompiled") => {
            let map = text("/precompiled_charsmap").unwrap_or_default();
            if !holds_its_trie(map) {
                let message =
                    "the `precompiled_charsmap` of its normalizer is shorter than it says of itself";
                return Err(Error::invalid(message).with_hint(HINT));
            }
            Ok(1)
        }
        _ => Ok(1),
    }
}

/// Whether a map (base64) is at least as long as its first four bytes say. The crate would make room for what they say.
fn holds_its_trie(map: &str) -> bool {
    let digit = |byte: u8| match byte {
        b'A'..=b'Z' => Some(byte - b'A'),
        b'a'..=b'z' => Some(byte - b'a' + 26),
        b'0'..=b'9' => Some(byte - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    let bits = map
        .bytes()
        .take(6)
        .map_while(digit)
        .fold((0u64, 0), |(bits, n), digit| (bits << 6 | u64::from(digit), n + 1));
    let (bits, 6) = bits else { return false };
    let mut first = ((bits >> 4) as u32).to_be_bytes();
    first.reverse();
    let trie = u32::from_be_bytes(first) as usize;
    let digits = map.trim_end_matches('=').len();
    trie.is_multiple_of(4) && 4 + trie <= digits * 3 / 4
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn with(part: &str, value: Value) -> String {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/tiny-llama/tokenizer.json");
        let mut file: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        file[part] = value;
        file.to_string()
    }

    /// Each of these ended the program.
    #[test]
    fn what_panics_or_swells_is_an_error() {
        let replace = |pattern: Value, content: &str| json!({ "type": "Replace", "pattern": pattern, "content": content });
        let double = || replace(json!({ "String": "e" }), "ee");
        let many = json!({ "type": "Sequence", "normalizers": (0..6).map(|_| double()).collect::<Vec<_>>() });
        let charsmap = |map: &str| json!({ "type": "Precompiled", "precompiled_charsmap": map });
        for (normalizer, expected) in [
            (replace(json!({ "String": "" }), "x"), "a normalizer replaces the empty text"),
            (charsmap("AAAA"), "the `precompiled_charsmap` of its normalizer is shorter"),
            (charsmap("////////////////"), "the `precompiled_charsmap` of its normalizer is shorter"),
            (charsmap(""), "the `precompiled_charsmap` of its normalizer is shorter"),
            (charsmap("AAAAAAAA"), "not a usable tokenizer: "),
            (many, "its normalizers can make a text 64 times as long, and at most 16 times is read"),
        ] {
            let error = read(with("normalizer", normalizer.clone()).as_bytes()).unwrap_err();
            assert!(error.to_string().starts_with(expected), "{normalizer}: {error}");
            assert!(error.hint().is_some());
        }
        let raw =
            with("decoder", json!({ "type": "ByteFallback" })).replace("ByteFallback", "Byte\u{1}Fallback");
        assert!(read(raw.as_bytes()).unwrap_err().to_string().starts_with("not a "));
        let filled = json!({
            "strategy": { "Fixed": 1_000_000_000_000_000u64 }, "direction": "Right", "pad_to_multiple_of": null,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "x"
        });
        assert!(read(with("padding", filled).as_bytes()).unwrap().get_padding().is_none());
    }

    #[test]
    fn tokenizers_as_they_are_published_are_read() {
        let spaces = json!({ "type": "Sequence", "normalizers": [
            { "type": "Prepend", "prepend": "▁" },
            { "type": "Replace", "pattern": { "String": " " }, "content": "▁" },
            { "type": "Replace", "pattern": { "Regex": " {2,}" }, "content": "▁" },
            { "type": "NFKD" },
        ]});
        read(with("normalizer", spaces).as_bytes()).unwrap();
        // A trie of 4 bytes, and no texts.
        assert!(holds_its_trie("BAAAAAAAAAA="));
        assert!(!holds_its_trie("CAAAAAAAAAA="));
    }
}
