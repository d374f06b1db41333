//! A text through the `tokenizers` crate: panics are errors, and of a very long text only the beginning is encoded.

use tokenizers::Tokenizer;

use crate::error::{Error, Result, caught};

/// Bytes for each token that is wanted: many times what tokens have.
const BYTES_PER_TOKEN: usize = 64;

/// The least that is encoded of a long text.
pub(super) const LEAST_BEGINNING: usize = 256 << 10;

/// Bytes of the longest text that is encoded whole for its first tokens.
pub(super) fn longest(enough: usize) -> usize {
    enough.saturating_mul(BYTES_PER_TOKEN).max(LEAST_BEGINNING).saturating_mul(4)
}

/// Tokens with the places of their texts.
pub(super) type Placed = (Vec<u32>, Vec<(usize, usize)>);

/// The tokens of a text, or of a long one at least the first `enough`; and whether there may be more. Two beginnings of
/// different lengths have to agree on them: what follows a token changes it only from nearby.
pub(super) fn beginning(
    tokenizer: &Tokenizer,
    text: &str,
    add_special: bool,
    enough: usize,
) -> Result<(Vec<u32>, Vec<(usize, usize)>, bool)> {
    let piece = longest(enough) / 4;
    if text.len() > piece.saturating_mul(4) {
        let first = encoded(tokenizer, cut(text, piece), add_special)?;
        let second = encoded(tokenizer, cut(text, 2 * piece), add_special)?;
        let agree = first.0.len() > enough && second.0.get(..enough) == first.0.get(..enough);
        if agree {
            return Ok((first.0, first.1, true));
        }
    }
    let (tokens, spans) = encoded(tokenizer, text, add_special)?;
    Ok((tokens, spans, false))
}

/// The beginning of a text, up to a line's end or a space near `bytes`.
fn cut(text: &str, bytes: usize) -> &str {
    let text = &text[..text.floor_char_boundary(bytes)];
    let near = text.ceil_char_boundary(text.len().saturating_sub(4096));
    let end = text[near..].rfind('\n').or_else(|| text[near..].rfind(' '));
    end.map_or(text, |end| &text[..near + end])
}

pub(super) fn encoded(tokenizer: &Tokenizer, text: &str, add_special: bool) -> Result<Placed> {
    // Only of conversations are the places asked for, and without them it is faster.
    let encoding = caught(|| match add_special {
        true => tokenizer.encode_fast(text, true),
        false => tokenizer.encode(text, false),
    });
    let encoding = encoding.map_err(panicked)?.map_err(failed)?;
    Ok((encoding.get_ids().to_vec(), encoding.get_offsets().to_vec()))
}

pub(super) fn panicked(said: String) -> Error {
    Error::invalid(format!("the tokenizer fails on a text: {said}")).with_hint(
        "load the tokenizer with transformers and save it again, or take the file of the published model",
    )
}

pub(super) fn failed(error: tokenizers::Error) -> Error {
    Error::invalid(format!("the tokenizer failed: {error}"))
}
