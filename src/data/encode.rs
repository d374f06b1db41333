//! A text through the `tokenizers` crate: panics are errors, and of a very long text only the beginning is encoded.

use tokenizers::Tokenizer;

use crate::error::{Error, Result, caught};

/// A rendered conversation and its tokens.
#[derive(Debug)]
pub(crate) struct Rendered {
    pub(crate) rendered: String,
    pub(crate) tokens: Vec<u32>,
    /// Where each token's text begins and ends in `rendered`.
    pub(crate) spans: Vec<(usize, usize)>,
    /// Whether the tokens are only those of the beginning.
    pub(crate) is_cut: bool,
}

/// Bytes for each token that is wanted: many times what tokens have.
const BYTES_PER_TOKEN: usize = 64;

/// The least that is encoded of a long text.
const LEAST_BEGINNING: usize = 256 << 10;

/// Tokens with the places of their texts.
type Placed = (Vec<u32>, Vec<(usize, usize)>);

/// The tokens of a text, or of a long one at least the first `enough`; and whether there may be more. Two beginnings of
/// different lengths have to agree on them: what follows a token changes it only from nearby.
pub(super) fn beginning(
    tokenizer: &Tokenizer,
    text: &str,
    add_special: bool,
    enough: usize,
) -> Result<(Placed, bool)> {
    let piece = enough.saturating_mul(BYTES_PER_TOKEN).max(LEAST_BEGINNING);
    if text.len() > piece.saturating_mul(4) {
        let first = encoded(tokenizer, cut(text, piece), add_special)?;
        let second = encoded(tokenizer, cut(text, piece.saturating_mul(2)), add_special)?;
        let agree = first.0.len() > enough && second.0.get(..enough) == first.0.get(..enough);
        if agree {
            return Ok((first, true));
        }
    }
    Ok((encoded(tokenizer, text, add_special)?, false))
}

/// So much of a text as says what its first token is.
pub(super) fn opening(text: &str) -> &str {
    const BYTES: usize = 8192;
    if text.len() > BYTES { cut(text, BYTES) } else { text }
}

/// The beginning of a text, up to a line's end or a space near `bytes`.
fn cut(text: &str, bytes: usize) -> &str {
    let boundary = |mut at: usize| {
        while !text.is_char_boundary(at) {
            at -= 1;
        }
        at
    };
    let (near, end) = (boundary(bytes.saturating_sub(4096)), boundary(bytes));
    let text = &text[..end];
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::text::tests::chatml;

    /// The first tokens of a text that is cut are those of the whole, in texts of many kinds.
    #[test]
    fn the_beginning_of_a_long_text_has_the_tokens_of_the_whole() {
        let text = chatml();
        for part in ["One day, Tom saw a fat duck. ", "x", "é🦀", "\n\n  ", "<|im_end|>", "ab1 "] {
            let long = part.repeat(4 * LEAST_BEGINNING / part.len() + 100);
            let (beginning, is_cut) = text.document(&long, 300).unwrap();
            assert!(is_cut && beginning.len() > 300, "{part:?}: {}", beginning.len());
            let (whole, is_whole) = text.document(&long, usize::MAX).unwrap();
            assert!(!is_whole && whole.len() > beginning.len());
            assert_eq!(beginning[..300], whole[..300], "{part:?}");
            let rendered = text.encode_rendered(long, 300).unwrap();
            assert!(rendered.is_cut && rendered.tokens[..300] == whole[..300]);
        }
    }
}
