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
        Ok(Self { tokenizer, template, bos, add_bos: parts.add_bos, eos, special })
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
        self.template()?.render(messages, None, add_generation_prompt)
    }

    /// The tokens that ask the model for the next message.
    pub fn prompt_tokens(&self, messages: &[Message]) -> Result<Vec<u32>> {
        let mut tokens = self.encode(&self.render(messages, true)?)?;
        if let Some(bos) = self.missing_bos(&tokens)? {
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
    pub(crate) fn missing_bos(&self, tokens: &[u32]) -> Result<Option<u32>> {
        let Some(bos) = self.bos.filter(|bos| tokens.first() != Some(bos)) else { return Ok(None) };
        Ok((self.encode_document("a")?.first() == Some(&bos)).then_some(bos))
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
