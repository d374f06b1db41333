//! How much longer a tokenizer may make a text. Each part of a `tokenizer.json` is measured by itself, before it sees a
//! text: normalizers, pre-tokenizers, decoders, the post-processor and the vocabulary.
//!
//! The parts are looked at as the crate has read them, for it reads a part whose `type` is missing or wrong by its keys.

use fancy_regex::{Expr, Regex};
use serde::Serialize;
use serde_json::Value;
use tokenizers::{PostProcessor, Tokenizer};

use super::HINT;
use crate::error::{Error, Result};

/// Normalizers, and likewise pre-tokenizers and decoders, may make a text at most this many times as long. A character
/// of the published charsmaps becomes up to 18; Unicode forms are not counted.
const MOST_GROWTH: usize = 64;

/// The most steps of one part; those of published tokenizers have up to some dozens.
const MOST_STEPS: usize = 256;

/// The most characters that a step puts in at one place.
const LONGEST_CONTENT: usize = 1024;

/// The most characters of a token; the longest published ones, of spaces, have some hundreds.
const LONGEST_TOKEN: usize = 4096;

/// The most tokens that a post-processor adds; published ones add up to a few.
const MOST_ADDED: usize = 256;

/// The most pieces that the templates of a post-processor have, those for pairs of texts included.
const MOST_PIECES: usize = 64;

/// Refuses a tokenizer that can make a text grow without measure.
pub(super) fn refuse_excess(tokenizer: &Tokenizer) -> Result<()> {
    refuse_excess_of("normalizers", tokenizer.get_normalizer())?;
    refuse_excess_of("pre-tokenizers", tokenizer.get_pre_tokenizer())?;
    refuse_excess_of("decoders", tokenizer.get_decoder())?;
    if let Some(processor) = tokenizer.get_post_processor() {
        let added = processor.added_tokens(false).max(processor.added_tokens(true));
        if added > MOST_ADDED {
            return Err(refused(format!(
                "its post-processor adds {added} tokens to a text, and at most {MOST_ADDED} are read"
            )));
        }
        let pieces = pieces(&serde_json::to_value(processor)?);
        if pieces > MOST_PIECES {
            return Err(refused(format!(
                "the templates of its post-processor have {pieces} pieces, and at most {MOST_PIECES} are read"
            )));
        }
    }
    let longest = tokenizer.get_vocab(true).keys().map(|token| token.chars().count()).max().unwrap_or(0);
    if longest > LONGEST_TOKEN {
        return Err(refused(format!(
            "a token of its vocabulary has {longest} characters, and at most {LONGEST_TOKEN} are read"
        )));
    }
    Ok(())
}

fn refused(what: String) -> Error {
    Error::invalid(what).with_hint(HINT)
}

fn refuse_excess_of(what: &str, part: Option<&impl Serialize>) -> Result<()> {
    let Some(part) = part else { return Ok(()) };
    let mut steps = 0;
    let growth = growth(what, &serde_json::to_value(part)?, &mut steps)?;
    if growth > MOST_GROWTH {
        return Err(refused(format!(
            "its {what} can make a text {growth} times as long, and at most {MOST_GROWTH} times is read"
        )));
    }
    if steps > MOST_STEPS {
        return Err(refused(format!("its {what} have {steps} steps, and at most {MOST_STEPS} are read")));
    }
    Ok(())
}

/// Computes by which factor a part may multiply the characters of a text, and counts its steps. What is put before or
/// behind every piece of a text counts as if each character were a piece.
fn growth(what: &str, part: &Value, steps: &mut usize) -> Result<usize> {
    let text = |path: &str| part.pointer(path).and_then(Value::as_str);
    let count = |path: &str| text(path).unwrap_or_default().chars().count();
    let is_empty = |path: &str| text(path).is_some_and(str::is_empty);
    *steps += 1;
    let grown = match text("/type").unwrap_or_default() {
        "Sequence" => {
            *steps -= 1;
            let parts = ["normalizers", "pretokenizers", "decoders"].iter().find_map(|key| part.get(*key));
            let parts = parts.and_then(Value::as_array).into_iter().flatten();
            return parts
                .map(|part| growth(what, part, steps))
                .try_fold(1usize, |product, part| Ok(product.saturating_mul(part?)));
        }
        "Replace" if is_empty("/pattern/String") => {
            return Err(refused(format!("one of its {what} replaces the empty text")));
        }
        "Replace" => {
            let content = bounded(what, count("/content"))?;
            match text("/pattern/Regex") {
                None => content.div_ceil(count("/pattern/String").max(1)),
                Some(regex) if always_takes(regex) => content,
                // What matches between characters is put in beside them.
                Some(_) => content + 1,
            }
        }
        "Prepend" => 1 + bounded(what, count("/prepend"))?,
        "Precompiled" => longest_text(text("/precompiled_charsmap").unwrap_or_default()),
        // Spaces around a Chinese character.
        "BertNormalizer" => 3,
        // A byte of a character becomes a character of two bytes.
        "ByteLevel" if what == "decoders" => 1,
        "ByteLevel" if part.get("add_prefix_space") == Some(&Value::Bool(true)) => 4,
        "ByteLevel" => 2,
        "Metaspace" if what != "decoders" => 2,
        "WordPiece" => 2,
        // A space for a text without characters is put between all characters.
        "BPEDecoder" if is_empty("/suffix") => 3,
        "CTC" if is_empty("/word_delimiter_token") => 3,
        _ => 1,
    };
    Ok(grown.max(1))
}

fn bounded(what: &str, content: usize) -> Result<usize> {
    if content > LONGEST_CONTENT {
        return Err(refused(format!(
            "one of its {what} puts in a text of {content} characters, and at most {LONGEST_CONTENT} are read"
        )));
    }
    Ok(content)
}

/// Whether every match of a regular expression takes at least one character away.
fn always_takes(regex: &str) -> bool {
    fn takes(expression: &Expr) -> bool {
        match expression {
            Expr::Any { .. } | Expr::GeneralNewline { .. } | Expr::Delegate { .. } => true,
            Expr::Literal { val, .. } => !val.is_empty(),
            Expr::Concat(parts) => parts.iter().any(takes),
            Expr::Alt(choices) => choices.iter().all(takes),
            Expr::Group(inner) => takes(inner),
            Expr::AtomicGroup(inner) => takes(inner),
            Expr::Repeat { child, lo, .. } => *lo > 0 && takes(child),
            _ => false,
        }
    }
    // `\K` gives back what was matched before it.
    !regex.contains("\\K")
        && Regex::new(regex).is_ok()
        && Expr::parse_tree(regex).is_ok_and(|tree| takes(&tree.expr))
}

/// The pieces of all templates in a post-processor.
fn pieces(processor: &Value) -> usize {
    let parts = processor.get("processors").and_then(Value::as_array).into_iter().flatten();
    let own = ["single", "pair"].iter().filter_map(|key| processor.get(*key)?.as_array());
    own.map(Vec::len).sum::<usize>() + parts.map(pieces).sum::<usize>()
}

/// The most characters that a charsmap (base64) puts in the place of one or several.
fn longest_text(map: &str) -> usize {
    let map = decoded(map);
    let Some((trie, rest)) = map.split_first_chunk().map(|(size, rest)| (u32::from_le_bytes(*size), rest))
    else {
        return 0;
    };
    let texts = rest.get(trie as usize..).unwrap_or_default();
    // Bytes that go on with a character are none of their own.
    let characters = |text: &[u8]| text.iter().filter(|byte| **byte & 0xC0 != 0x80).count();
    texts.split(|byte| *byte == 0).map(characters).max().unwrap_or(0)
}

/// Refuses a normalizer with a charsmap that is shorter than its first four bytes say, wherever in it the charsmap is.
/// The crate would make room for what they say.
pub(super) fn refuse_false_charsmaps(normalizer: &Value) -> Result<()> {
    match normalizer {
        Value::Array(parts) => parts.iter().try_for_each(refuse_false_charsmaps),
        Value::Object(map) => map.iter().try_for_each(|(key, value)| {
            if key == "precompiled_charsmap" && !holds_its_trie(value.as_str().unwrap_or_default()) {
                let message =
                    "the `precompiled_charsmap` of its normalizer is shorter than it says of itself";
                return Err(Error::invalid(message).with_hint(HINT));
            }
            refuse_false_charsmaps(value)
        }),
        _ => Ok(()),
    }
}

/// Whether a charsmap (base64) is as long as it says.
pub(super) fn holds_its_trie(map: &str) -> bool {
    let map = decoded(map);
    map.first_chunk().is_some_and(|size| {
        let trie = u32::from_le_bytes(*size) as usize;
        trie.is_multiple_of(4) && 4 + trie <= map.len()
    })
}

/// The bytes of base64 up to its end or to what is none.
fn decoded(text: &str) -> Vec<u8> {
    let digit = |byte: u8| match byte {
        b'A'..=b'Z' => Some(byte - b'A'),
        b'a'..=b'z' => Some(byte - b'a' + 26),
        b'0'..=b'9' => Some(byte - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    let digits: Vec<u8> = text.bytes().map_while(digit).collect();
    let mut bytes = Vec::with_capacity(digits.len() / 4 * 3 + 2);
    for group in digits.chunks(4) {
        let bits = group.iter().fold(0u32, |bits, digit| bits << 6 | u32::from(*digit));
        let bits = bits << (6 * (4 - group.len()));
        // Of 2, 3 or 4 digits there are 1, 2 or 3 whole bytes.
        bytes.extend(&bits.to_be_bytes()[1..group.len().max(1)]);
    }
    bytes
}
