//! The tokenizer and the chat template together: strings to tokens and back.

use std::collections::BTreeSet;
use std::time::{SystemTime, UNIX_EPOCH};

use tokenizers::{Encoding, Tokenizer};

use super::conversation::Message;
use super::template::Template;
use crate::error::{Error, Result};

/// What a model says about its text beside the tokenizer.
#[derive(Debug, Clone, Default)]
pub struct TemplateParts {
    /// The Jinja source of the chat template.
    pub chat_template: Option<String>,
    /// The token that begins a document, as text.
    pub bos_token: Option<String>,
    /// The token that ends a document, as text.
    pub eos_token: Option<String>,
    /// Further tokens that end an answer.
    pub eos_token_ids: Vec<u32>,
    /// Whether documents begin with the first of these tokens; left out: as the tokenizer itself does.
    pub add_bos: Option<bool>,
    /// What `strftime_now` tells templates that write the date, in seconds since 1970 (UTC); left out: the clock.
    /// A run that is to be resumed keeps it fixed.
    pub now: Option<i64>,
}

/// A tokenizer, and the chat template that goes with it.
#[derive(Debug)]
pub struct Text {
    tokenizer: Tokenizer,
    template: Option<Template>,
    bos: Option<u32>,
    add_bos: Option<bool>,
    /// Whether documents begin with `bos`.
    begins: bool,
    /// The first is the one to append.
    eos: Vec<u32>,
    special: BTreeSet<u32>,
}

impl Text {
    /// Puts the two together. Truncation and padding that the tokenizer's file asks for are turned off.
    pub fn new(mut tokenizer: Tokenizer, parts: TemplateParts) -> Result<Self> {
        tokenizer.with_truncation(None).map_err(failed)?;
        tokenizer.with_padding(None);
        let id = |token: &Option<String>, name: &str| match token {
            None => Ok(None),
            Some(token) => tokenizer.token_to_id(token).map(Some).ok_or_else(|| {
                Error::invalid(format!("the `{name}` is `{token}`, which the tokenizer does not know"))
            }),
        };
        let bos = id(&parts.bos_token, "bos_token")?;
        let mut eos: Vec<u32> = id(&parts.eos_token, "eos_token")?.into_iter().collect();
        for id in parts.eos_token_ids {
            if !eos.contains(&id) {
                eos.push(id);
            }
        }
        let now = parts.now.unwrap_or_else(|| {
            SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs() as i64)
        });
        let template = match parts.chat_template {
            None => None,
            Some(source) => Some(Template::new(&source, parts.bos_token, parts.eos_token, now)?),
        };
        let special = tokenizer
            .get_added_tokens_decoder()
            .into_iter()
            .filter(|(_, token)| token.special)
            .map(|(id, _)| id)
            .collect();
        let mut text = Self { tokenizer, template, bos, add_bos: parts.add_bos, begins: false, eos, special };
        text.begins = bos.is_some() && text.encode_document("a")?.first() == bos.as_ref();
        Ok(text)
    }

    /// The tokens of a string, with nothing added.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self.encoding(text)?.get_ids().to_vec())
    }

    /// The tokens of a document, with those that the tokenizer itself adds: what `tokenizer(text)` gives in Python.
    pub fn encode_document(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode_fast(text, true).map_err(failed)?;
        let mut tokens = encoding.get_ids().to_vec();
        match (self.bos, self.add_bos) {
            (Some(bos), Some(true)) if tokens.first() != Some(&bos) => tokens.insert(0, bos),
            (Some(bos), Some(false))
                if tokens.first() == Some(&bos) && !self.encode(text)?.starts_with(&[bos]) =>
            {
                tokens.remove(0);
            }
            _ => {}
        }
        Ok(tokens)
    }

    /// The text of tokens.
    pub fn decode(&self, tokens: &[u32], skip_special: bool) -> Result<String> {
        self.tokenizer.decode(tokens, skip_special).map_err(failed)
    }

    /// Text from tokens that come one at a time.
    #[must_use]
    pub fn decode_stream(&self, skip_special: bool) -> DecodeStream<'_> {
        DecodeStream { text: self, skip_special, tokens: Vec::new(), sent: String::new(), settled: 0 }
    }

    /// Every token that ends an answer; the first is the one that documents end with.
    #[must_use]
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos
    }

    /// The tokenizer itself.
    #[must_use]
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Whether conversations can be rendered.
    #[must_use]
    pub fn has_template(&self) -> bool {
        self.template.is_some()
    }

    /// What the chat template makes of messages.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        self.template()?.render(messages, None, &serde_json::Map::new(), add_generation_prompt)
    }

    /// The tokens that ask the model for the next message.
    pub fn prompt_tokens(&self, messages: &[Message]) -> Result<Vec<u32>> {
        let mut tokens = self.encode(&self.render(messages, true)?)?;
        if let Some(bos) = self.missing_bos(&tokens) {
            tokens.insert(0, bos);
        }
        Ok(tokens)
    }

    pub(crate) fn template(&self) -> Result<&Template> {
        self.template.as_ref().ok_or_else(|| {
            Error::invalid("the data are conversations, but the model has no chat template").with_hint(
                "put a `chat_template.jinja` beside the model, or give data of format prompt-completion or text",
            )
        })
    }

    pub(crate) fn encoding(&self, text: &str) -> Result<Encoding> {
        self.tokenizer.encode(text, false).map_err(failed)
    }

    pub(crate) fn is_special(&self, token: u32) -> bool {
        self.special.contains(&token) || self.eos.contains(&token)
    }

    /// The token to put before a rendered conversation: templates that write it themselves must not get a second.
    pub(crate) fn missing_bos(&self, tokens: &[u32]) -> Option<u32> {
        self.bos.filter(|bos| self.begins && tokens.first() != Some(bos))
    }
}

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

impl DecodeStream<'_> {
    /// The text that this token makes certain; empty while a character is incomplete.
    pub fn push(&mut self, token: u32) -> Result<String> {
        self.tokens.push(token);
        let decoded = self.text.decode(&self.tokens, self.skip_special)?;
        if decoded.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(String::new());
        }
        self.settle(decoded)
    }

    /// What is left at the end: an incomplete character shows as replacement characters.
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

fn failed(error: tokenizers::Error) -> Error {
    Error::invalid(format!("the tokenizer failed: {error}"))
}

#[cfg(test)]
pub(crate) mod tests {
    use serde_json::json;

    use super::*;
    use crate::data::conversation::Role;

    pub(crate) const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + \
        '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

    /// The bundled byte-level tokenizer with further special tokens, changed by `edit`.
    pub(crate) fn text(
        special: &[&str],
        parts: TemplateParts,
        edit: impl FnOnce(&mut serde_json::Value),
    ) -> Text {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/tiny-llama/tokenizer.json");
        let mut file: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        edit(&mut file);
        let mut tokenizer: Tokenizer = file.to_string().parse().unwrap();
        let special = special.iter().map(|&token| tokenizers::AddedToken::from(token, true));
        tokenizer.add_special_tokens(special).unwrap();
        Text::new(tokenizer, parts).unwrap()
    }

    pub(crate) fn chatml() -> Text {
        let parts = TemplateParts {
            chat_template: Some(CHATML.into()),
            eos_token: Some("<|im_end|>".into()),
            ..TemplateParts::default()
        };
        text(&[], parts, |_| {})
    }

    /// A tokenizer that puts `<|im_start|>` (token 1) before each document, as Llama puts its `<s>`.
    fn with_bos(add_bos: Option<bool>, template: &str) -> Text {
        let parts = TemplateParts {
            chat_template: Some(template.into()),
            bos_token: Some("<|im_start|>".into()),
            add_bos,
            ..TemplateParts::default()
        };
        text(&[], parts, |file| {
            file["post_processor"] = json!({
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "B", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {"B": {"id": "B", "ids": [1], "tokens": ["<|im_start|>"]}}
            });
            file["truncation"] = json!(
                {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
            );
        })
    }

    #[test]
    fn the_beginning_is_never_doubled_and_never_missing() {
        let user = [Message::new(Role::User, "a long enough question")];
        for template in ["{{ bos_token }}{{ messages[0].content }}", "{{ messages[0].content }}"] {
            let text = with_bos(None, template);
            let tokens = text.prompt_tokens(&user).unwrap();
            assert_eq!(tokens[0], 1);
            assert_eq!(text.decode(&tokens[1..], false).unwrap(), "a long enough question");
            assert_eq!(tokens, text.encode_document("a long enough question").unwrap());
        }
        let plain = with_bos(Some(false), "{{ messages[0].content }}");
        assert!(!plain.prompt_tokens(&user).unwrap().contains(&1));
        assert!(!plain.encode_document("hello").unwrap().contains(&1));
        assert_eq!(plain.encode_document("<|im_start|>x").unwrap()[0], 1);
        let parts = TemplateParts {
            bos_token: Some("<|im_start|>".into()),
            add_bos: Some(true),
            ..Default::default()
        };
        assert_eq!(text(&[], parts, |_| {}).encode_document("hello").unwrap()[0], 1);
    }

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

    #[test]
    fn special_tokens_can_be_left_out() {
        let text = chatml();
        let tokens = text.encode("<|im_start|>hi<|im_end|>").unwrap();
        assert_eq!(text.decode(&tokens, true).unwrap(), "hi");
        let mut stream = text.decode_stream(true);
        assert_eq!(tokens.iter().map(|&token| stream.push(token).unwrap()).collect::<String>(), "hi");
        assert_eq!(text.eos_ids(), [2]);
    }

    #[test]
    fn unknown_tokens_and_missing_templates_are_told() {
        let error = Text::new(
            chatml().tokenizer().clone(),
            TemplateParts { eos_token: Some("</s>".into()), ..TemplateParts::default() },
        );
        assert_eq!(
            error.unwrap_err().to_string(),
            "the `eos_token` is `</s>`, which the tokenizer does not know"
        );
        let error = text(&[], TemplateParts::default(), |_| {}).prompt_tokens(&[]).unwrap_err();
        assert!(error.hint().unwrap().contains("chat_template.jinja"));
    }
}
