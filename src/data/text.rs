//! The tokenizer and the chat template together: strings to tokens and back.

use std::collections::BTreeSet;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value};
use tokenizers::Tokenizer;

use super::conversation::Message;
use super::encode::{Rendered, beginning, encoded, failed, opening, panicked};
use super::special::{Controls, SpecialTokens};
use super::template::{Template, Variables};
use crate::error::{Error, Result, caught};

/// What a model says about its text beside the tokenizer.
#[derive(Debug, Clone, Default)]
pub struct TemplateParts {
    /// The Jinja source of the chat template.
    pub chat_template: Option<String>,
    /// The template for conversations with tools, where it is another one.
    pub tool_template: Option<String>,
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
    /// Further variables of templates, such as `enable_thinking`.
    pub variables: Map<String, Value>,
    /// Says whether control tokens in the data are encoded as tokens or as text.
    pub special_tokens: SpecialTokens,
    /// Rows of the embedding: tokens from this one on are refused; left out: none is.
    pub vocabulary: Option<usize>,
}

/// A tokenizer, and the chat template that goes with it.
#[derive(Debug)]
pub struct Text {
    tokenizer: Tokenizer,
    template: Option<Template>,
    tool_template: Option<Template>,
    pub(super) controls: Controls,
    vocabulary: Option<usize>,
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
        let mut known: BTreeSet<u32> = eos.iter().copied().collect();
        eos.extend(parts.eos_token_ids.into_iter().filter(|id| known.insert(*id)));
        let now = parts.now.unwrap_or_else(|| {
            SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs() as i64)
        });
        let variables = Variables { now, others: parts.variables };
        let compiled = |source: Option<String>| match source {
            None => Ok(None),
            Some(source) => {
                let (bos, eos) = (parts.bos_token.clone(), parts.eos_token.clone());
                Template::new(&source, bos, eos, variables.clone()).map(Some)
            }
        };
        let (template, tool_template) = (compiled(parts.chat_template)?, compiled(parts.tool_template)?);
        let controls = Controls::of(&tokenizer, parts.special_tokens)?;
        let special = tokenizer
            .get_added_tokens_decoder()
            .into_iter()
            .filter(|(_, token)| token.special)
            .map(|(id, _)| id)
            .collect();
        let mut text = Self {
            tokenizer,
            template,
            tool_template,
            controls,
            vocabulary: None,
            bos,
            add_bos: parts.add_bos,
            begins: false,
            eos,
            special,
        };
        text.begins = bos.is_some() && text.encode_document("a")?.first() == bos.as_ref();
        text.vocabulary = parts.vocabulary;
        Ok(text)
    }

    /// The tokens of a string, with nothing added.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(encoded(&self.tokenizer, text, false)?.0)
    }

    /// The tokens of a document, with those that the tokenizer itself adds: what `tokenizer(text)` gives in Python.
    pub fn encode_document(&self, text: &str) -> Result<Vec<u32>> {
        let tokens = self.document(text, usize::MAX)?.0;
        self.refuse_unknown(&tokens)?;
        Ok(tokens)
    }

    /// The tokens of a document, and whether they are only those of its beginning: at least `enough` all the same.
    pub(crate) fn document(&self, text: &str, enough: usize) -> Result<(Vec<u32>, bool)> {
        let marked = self.controls.marked(text)?;
        let (mut tokens, is_cut) = match self.controls.encode(&marked, true, enough) {
            Some(encoded) => encoded.map(|encoded| (encoded.tokens, encoded.is_cut))?,
            None => {
                let ((tokens, _), is_cut) = beginning(&self.tokenizer, text, true, enough)?;
                (tokens, is_cut)
            }
        };
        match (self.bos, self.add_bos) {
            (Some(bos), Some(true)) if tokens.first() != Some(&bos) => tokens.insert(0, bos),
            (Some(bos), Some(false))
                if tokens.first() == Some(&bos) && self.first_written(&marked)? != Some(bos) =>
            {
                tokens.remove(0);
            }
            _ => {}
        }
        Ok((tokens, is_cut))
    }

    /// The first token of a marked text, with nothing added: of its beginning alone, as it may be very long.
    fn first_written(&self, marked: &str) -> Result<Option<u32>> {
        let opening = opening(marked);
        let tokens = match self.controls.encode(opening, false, usize::MAX) {
            Some(encoded) => encoded?.tokens,
            None => self.encode(opening)?,
        };
        Ok(tokens.first().copied())
    }

    /// The text of tokens.
    pub fn decode(&self, tokens: &[u32], skip_special: bool) -> Result<String> {
        caught(|| self.tokenizer.decode(tokens, skip_special)).map_err(panicked)?.map_err(failed)
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
        let rendered = self.rendered(messages, None, &Map::new(), add_generation_prompt)?;
        Ok(self.controls.readable(rendered))
    }

    /// Renders messages, with marks in their control tokens where these are to be text.
    pub(super) fn rendered(
        &self,
        messages: &[Message],
        tools: Option<&Value>,
        extra: &Map<String, Value>,
        add_generation_prompt: bool,
    ) -> Result<String> {
        let (mut tools, mut extra) = (tools.cloned(), extra.clone());
        tools.iter_mut().chain(extra.values_mut()).try_for_each(|value| self.controls.mark(value))?;
        let marked = self.controls.marked_messages(messages)?;
        let messages = marked.as_deref().unwrap_or(messages);
        self.template(tools.as_ref())?.render(messages, tools.as_ref(), &extra, add_generation_prompt)
    }

    /// The tokens that ask the model for the next message.
    pub fn prompt_tokens(&self, messages: &[Message]) -> Result<Vec<u32>> {
        self.prompt_tokens_with(messages, None, &Map::new())
    }

    /// The tokens that ask the model for the next message, where the template gets tools and further variables.
    pub(super) fn prompt_tokens_with(
        &self,
        messages: &[Message],
        tools: Option<&Value>,
        extra: &Map<String, Value>,
    ) -> Result<Vec<u32>> {
        let rendered = self.rendered(messages, tools, extra, true)?;
        let mut tokens = self.encode_rendered(rendered, usize::MAX)?.tokens;
        self.refuse_unknown(&tokens)?;
        if let Some(bos) = self.missing_bos(&tokens) {
            tokens.insert(0, bos);
        }
        Ok(tokens)
    }

    /// The template for a conversation with these tools.
    pub(crate) fn template(&self, tools: Option<&Value>) -> Result<&Template> {
        let of_tools = self.tool_template.as_ref().filter(|_| tools.is_some());
        of_tools.or(self.template.as_ref()).ok_or_else(|| {
            Error::invalid("the data are conversations, but the model has no chat template").with_hint(
                "put a `chat_template.jinja` beside the model, or give data of format prompt-completion or text",
            )
        })
    }

    /// Whether a template reads a variable, or calls a function, of this name.
    #[must_use]
    pub fn template_asks_for(&self, name: &str) -> bool {
        [&self.template, &self.tool_template].into_iter().flatten().any(|template| template.asks_for(name))
    }

    /// Whether the source of a template has this word.
    pub(crate) fn template_mentions(&self, word: &str) -> bool {
        [&self.template, &self.tool_template].into_iter().flatten().any(|template| template.mentions(word))
    }

    /// How many control tokens of the model, such as `<|im_end|>`, stand in a text; and the first.
    #[must_use]
    pub fn control_tokens<'a>(&self, text: &'a str) -> (usize, Option<&'a str>) {
        self.controls.found(text)
    }

    /// Encodes a rendered conversation, or of a much longer one at least the first `enough` tokens.
    pub(crate) fn encode_rendered(&self, rendered: String, enough: usize) -> Result<Rendered> {
        if let Some(encoded) = self.controls.encode(&rendered, false, enough) {
            return encoded;
        }
        let ((tokens, spans), is_cut) = beginning(&self.tokenizer, &rendered, false, enough)?;
        Ok(Rendered { rendered, tokens, spans, is_cut })
    }

    /// Whether control tokens of the data are encoded as text.
    #[must_use]
    pub fn takes_control_tokens_for_text(&self) -> bool {
        self.controls.are_text()
    }

    /// Refuses tokens for which the model has no row.
    pub(crate) fn refuse_unknown(&self, tokens: &[u32]) -> Result<()> {
        let Some(rows) = self.vocabulary else { return Ok(()) };
        let Some(unknown) = tokens.iter().find(|token| **token as usize >= rows) else { return Ok(()) };
        let name = self.tokenizer.id_to_token(*unknown).unwrap_or_default();
        Err(Error::invalid(format!(
            "`{name}` is token {unknown} of the tokenizer, and the model's embedding has rows for tokens below {rows}"
        ))
        .with_hint("take it out of the text, or give the model the tokenizer that it was trained with"))
    }

    pub(crate) fn is_special(&self, token: u32) -> bool {
        self.special.contains(&token) || self.eos.contains(&token)
    }

    /// The token to put before a rendered conversation: templates that write it themselves must not get a second.
    pub(crate) fn missing_bos(&self, tokens: &[u32]) -> Option<u32> {
        self.bos.filter(|bos| self.begins && tokens.first() != Some(bos))
    }
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
        with_bos_and(SpecialTokens::Tokens, add_bos, template)
    }

    fn with_bos_and(special_tokens: SpecialTokens, add_bos: Option<bool>, template: &str) -> Text {
        let parts = TemplateParts {
            chat_template: Some(template.into()),
            bos_token: Some("<|im_start|>".into()),
            add_bos,
            special_tokens,
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
        let long = format!("<|im_start|>{}", "so on ".repeat(9999));
        assert_eq!(plain.encode_document(&long).unwrap()[0], 1);
        assert!(!plain.encode_document(&long[12..]).unwrap().contains(&1));
        // Spelt out it is none, and the one that the tokenizer adds is taken away all the same.
        let spelt = with_bos_and(SpecialTokens::Text, Some(false), "{{ messages[0].content }}");
        let tokens = spelt.encode_document("<|im_start|>x").unwrap();
        assert!(!tokens.contains(&1), "{tokens:?}");
        assert_eq!(spelt.decode(&tokens, false).unwrap(), "<|im_start|>x");
        let parts = TemplateParts {
            bos_token: Some("<|im_start|>".into()),
            add_bos: Some(true),
            ..Default::default()
        };
        assert_eq!(text(&[], parts, |_| {}).encode_document("hello").unwrap()[0], 1);
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
