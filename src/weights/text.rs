//! What belongs to the text side of a model: tokenizer, chat template, special tokens.

use std::path::Path;

use serde_json::{Value, json};
use tokenizers::Tokenizer;

use super::{LARGEST_JSON, LARGEST_TOKENIZER};
use crate::error::{Context, Error, Result, is_there, read_regular, read_regular_text};

/// Tokenizer, chat template and special tokens of a model.
#[derive(Debug, Clone)]
pub struct TextFiles {
    /// The tokenizer, as its file has it.
    pub tokenizer: Tokenizer,
    /// The default chat template.
    pub chat_template: Option<String>,
    /// Begins a text.
    pub bos_token: Option<String>,
    /// Ends a text.
    pub eos_token: Option<String>,
    /// Fills batches elsewhere; here it is only handed on.
    pub pad_token: Option<String>,
    /// Stands for what the tokenizer does not know.
    pub unk_token: Option<String>,
    /// Every token that ends a generation, sorted: the tokenizer's, the model's and the generation's.
    pub eos_token_ids: Vec<u32>,
    /// Whether the tokenizer itself puts the first token before a text.
    pub add_bos_token: bool,
}

impl TextFiles {
    /// From a Hugging Face folder. `config` is its `config.json`.
    pub(super) fn from_folder(folder: &Path, config: &Value) -> Result<Self> {
        let path = folder.join("tokenizer.json");
        if !is_there(&path) {
            return Err(Error::invalid("holds no `tokenizer.json`").with_hint(
                "load the tokenizer with transformers and save it; that writes `tokenizer.json`",
            ))
            .at(folder);
        }
        let tokenizer = Tokenizer::from_bytes(read_regular(&path, LARGEST_TOKENIZER).at(&path)?)
            .map_err(|error| Error::invalid(format!("not a readable tokenizer: {error}")))
            .at(&path)?;
        let settings = super::read_json_if_there(&folder.join("tokenizer_config.json"))?;
        let special = super::read_json_if_there(&folder.join("special_tokens_map.json"))?;
        let generation = super::read_json_if_there(&folder.join("generation_config.json"))?;
        let token = |name: &str| token(&settings, name).or_else(|| self::token(&special, name));

        // transformers reads the file after the settings, so the file wins.
        let jinja = folder.join("chat_template.jinja");
        let chat_template = if is_there(&jinja) {
            Some(read_regular_text(&jinja, LARGEST_JSON).at(&jinja)?)
        } else {
            chat_template(&settings).at(folder.join("tokenizer_config.json"))?
        };

        let eos_token = token("eos_token");
        let mut eos_token_ids = ids(config.get("eos_token_id"));
        eos_token_ids.extend(ids(generation.get("eos_token_id")));
        eos_token_ids.extend(eos_token.as_deref().and_then(|token| tokenizer.token_to_id(token)));
        Ok(Self {
            chat_template,
            bos_token: token("bos_token"),
            eos_token,
            pad_token: token("pad_token"),
            unk_token: token("unk_token"),
            eos_token_ids,
            add_bos_token: false,
            tokenizer,
        }
        .settled())
    }

    /// Writes `tokenizer.json` and `tokenizer_config.json`, as transformers reads them.
    pub(super) fn write(&self, folder: &Path) -> Result<()> {
        let path = folder.join("tokenizer.json");
        let text =
            self.tokenizer.to_string(false).map_err(|error| Error::invalid(error.to_string())).at(&path)?;
        std::fs::write(&path, text).at(&path)?;
        let settings = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": false,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "pad_token": self.pad_token,
            "unk_token": self.unk_token,
            "chat_template": self.chat_template,
        });
        let path = folder.join("tokenizer_config.json");
        std::fs::write(&path, serde_json::to_string_pretty(&settings)? + "\n").at(&path)
    }

    /// Sorts the ending tokens and asks the tokenizer what it does with the beginning.
    pub(super) fn settled(mut self) -> Self {
        self.eos_token_ids.sort_unstable();
        self.eos_token_ids.dedup();
        let bos = self.bos_token.as_deref().and_then(|token| self.tokenizer.token_to_id(token));
        self.add_bos_token = bos.is_some()
            && self.tokenizer.encode_fast("a", true).is_ok_and(|text| text.get_ids().first() == bos.as_ref());
        // A file may ask for cut or filled rows; whoever trains decides that, not the tokenizer.
        self.tokenizer.with_padding(None);
        if self.tokenizer.get_truncation().is_some() {
            // Switching truncation off cannot fail; only an impossible stride can.
            let _ = self.tokenizer.with_truncation(None);
        }
        self
    }
}

/// A special token: a string, or a table with its `content`.
fn token(settings: &Value, name: &str) -> Option<String> {
    let value = settings.get(name)?;
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_string)
}

/// A template, or of a list of named ones the default.
fn chat_template(settings: &Value) -> Result<Option<String>> {
    match settings.get("chat_template") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(template)) => Ok(Some(template.clone())),
        Some(Value::Array(list)) => {
            let named = |name: &str| {
                list.iter()
                    .find(|entry| entry.get("name").and_then(Value::as_str) == Some(name))
                    .and_then(|entry| entry.get("template")?.as_str())
            };
            named("default").map(|template| Some(template.to_string())).ok_or_else(|| {
                Error::invalid("`chat_template` is a list of templates without one named `default`")
            })
        }
        Some(_) => Err(Error::invalid("`chat_template` must be a string or a list of named templates")),
    }
}

/// One id or a list of them.
fn ids(value: Option<&Value>) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Some(Value::Array(list)) => list.iter().filter_map(id).collect(),
        Some(value) => id(value).into_iter().collect(),
        None => Vec::new(),
    }
}
