//! Tokens that come one at a time, as text.

use super::text::Text;
use crate::error::Result;

/// Text that grows as tokens come; a character is given out when all its bytes are there.
#[derive(Debug)]
pub struct DecodeStream<'a> {
    text: &'a Text,
    skip_special: bool,
    /// The tokens since the last place where text could be cut, the first `settled` of them given out as `sent`.
    tokens: Vec<u32>,
    sent: String,
    settled: usize,
}

impl<'a> DecodeStream<'a> {
    fn new(text: &'a Text, skip_special: bool) -> Self {
        Self { text, skip_special, tokens: Vec::new(), sent: String::new(), settled: 0 }
    }

    /// The text that this token makes certain; empty while a character is incomplete.
    pub fn push(&mut self, token: u32) -> Result<String> {
        self.tokens.push(token);
        let decoded = self.text.decode(&self.tokens, self.skip_special)?;
        if decoded.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(String::new());
        }
        self.settle(decoded)
    }

    /// Returns the text that is left at the end; an incomplete character becomes replacement characters.
    pub fn finish(mut self) -> Result<String> {
        let decoded = self.text.decode(&self.tokens, self.skip_special)?;
        self.settle(decoded)
    }

    /// Tokens already given out stay for one round as context: decoders treat the first token of a text differently.
    fn settle(&mut self, decoded: String) -> Result<String> {
        let fresh = decoded.get(self.sent.len()..).unwrap_or_default().to_string();
        if fresh.is_empty() {
            return Ok(fresh);
        }
        self.tokens.drain(..self.settled);
        self.settled = self.tokens.len();
        self.sent = self.text.decode(&self.tokens, self.skip_special)?;
        Ok(fresh)
    }
}

impl Text {
    /// Text from tokens that come one at a time.
    #[must_use]
    pub fn decode_stream(&self, skip_special: bool) -> DecodeStream<'_> {
        DecodeStream::new(self, skip_special)
    }
}

#[cfg(test)]
mod tests {
    use crate::data::text::tests::chatml;

    #[test]
    fn a_stream_gives_whole_characters() {
        let text = chatml();
        let said = "naïve 日本語 🦀🔥 <|im_end|>\n  end e\u{301}";
        let tokens = text.encode(said).unwrap();
        let mut stream = text.decode_stream(false);
        let pieces: Vec<String> = tokens.iter().map(|&token| stream.push(token).unwrap()).collect();
        assert!(pieces.iter().all(|piece| !piece.contains(char::REPLACEMENT_CHARACTER)), "{pieces:?}");
        assert!(pieces.iter().any(String::is_empty), "the crab has four bytes and as many tokens");
        assert_eq!(pieces.concat() + &stream.finish().unwrap(), said);

        let crab = text.encode("a🦀").unwrap();
        let mut stream = text.decode_stream(true);
        let cut: String = crab[..crab.len() - 1].iter().map(|&token| stream.push(token).unwrap()).collect();
        assert_eq!(cut, "a");
        assert!(stream.finish().unwrap().starts_with(char::REPLACEMENT_CHARACTER));
    }
}
