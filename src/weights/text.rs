//! What belongs to the text side of a model: tokenizer, chat template, special tokens.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tokenizers::Tokenizer;

use super::companion::{LONGEST_TEMPLATE, TEMPLATES, names_of_templates};
use super::{LARGEST_JSON, LARGEST_TOKENIZER};
use crate::error::{Context, Error, Result, caught, is_there, read_regular, read_regular_text};

/// Tokenizer, chat template and special tokens of a model.
#[derive(Debug, Clone)]
pub struct TextFiles {
    /// The tokenizer, as its file has it.
    pub tokenizer: Tokenizer,
    /// The default chat template.
    pub chat_template: Option<String>,
    /// The template for conversations with tools, where it is another one.
    pub tool_template: Option<String>,
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
    /// What the model was told about its text when all its weights were trained, by key.
    pub told: BTreeMap<String, String>,
    /// The file that says what the model was told.
    pub told_by: PathBuf,
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
        let tokenizer =
            super::tokenizer::read(&read_regular(&path, LARGEST_TOKENIZER).at(&path)?).at(&path)?;
        let settings = super::read_json_if_there(&folder.join(SETTINGS))?;
        let special = super::read_json_if_there(&folder.join(SPECIAL))?;
        let generation = super::read_json_if_there(&folder.join(GENERATION))?;
        let token = |name: &str| special_token(folder, [&settings, &special], name);
        let (chat_template, tool_template) = templates(folder, &settings)?;
        let eos_token = token("eos_token")?;
        let mut eos_token_ids = endings(config).at(folder.join("config.json"))?;
        eos_token_ids.extend(endings(&generation).at(folder.join(GENERATION))?);
        eos_token_ids.extend(eos_token.as_deref().and_then(|token| tokenizer.token_to_id(token)));
        Ok(Self {
            chat_template,
            tool_template,
            bos_token: token("bos_token")?,
            eos_token,
            pad_token: token("pad_token")?,
            unk_token: token("unk_token")?,
            eos_token_ids,
            add_bos_token: false,
            told: super::told::of(&settings),
            told_by: folder.join(SETTINGS),
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
            "chat_template": self.written_templates(),
        });
        let path = folder.join(SETTINGS);
        std::fs::write(&path, serde_json::to_string_pretty(&settings)? + "\n").at(&path)
    }

    /// The templates as the settings of a tokenizer have them.
    pub(super) fn written_templates(&self) -> Value {
        match (&self.chat_template, &self.tool_template) {
            (Some(default), Some(tools)) => json!([
                { "name": "default", "template": default }, { "name": "tool_use", "template": tools },
            ]),
            (template, _) => json!(template),
        }
    }

    /// Sorts the ending tokens and asks the tokenizer what it does with the beginning.
    pub(super) fn settled(mut self) -> Self {
        self.eos_token_ids.sort_unstable();
        self.eos_token_ids.dedup();
        let bos = self.bos_token.as_deref().and_then(|token| self.tokenizer.token_to_id(token));
        let first = caught(|| Some(*self.tokenizer.encode_fast("a", true).ok()?.get_ids().first()?));
        self.add_bos_token = bos.is_some() && first.is_ok_and(|first| first == bos);
        self
    }
}

/// Reads a special token of a folder from its settings; what these leave out, its file of special tokens says.
pub(super) fn special_token(
    folder: &Path,
    [settings, special]: [&Value; 2],
    name: &str,
) -> Result<Option<String>> {
    match token(settings, name).at(folder.join(SETTINGS))? {
        None => token(special, name).at(folder.join(SPECIAL)),
        found => Ok(found),
    }
}

/// Reads a special token, which is a string or a table with its `content`.
fn token(settings: &Value, name: &str) -> Result<Option<String>> {
    let Some(value) = settings.get(name).filter(|value| !value.is_null()) else { return Ok(None) };
    match value.as_str().or_else(|| value.get("content")?.as_str()) {
        Some(token) => Ok(Some(token.to_string())),
        None => Err(Error::invalid(format!(
            "`{name}` is {value}, expected the text of a token or a table with its `content`"
        ))
        .with_hint("write the token as `tokenizer.json` spells it; numbers of tokens go into `config.json`")),
    }
}

/// The file of a tokenizer's settings.
pub(super) const SETTINGS: &str = "tokenizer_config.json";

/// The file of special tokens that older versions of transformers read.
pub(super) const SPECIAL: &str = "special_tokens_map.json";

/// The file of settings for generating text.
pub(super) const GENERATION: &str = "generation_config.json";

/// The file of the default chat template.
pub(super) const JINJA: &str = "chat_template.jinja";

/// Reads the default chat template of a folder and its template for conversations with tools. Files take the place of what
/// the settings say, and a file `default.jinja` that of `chat_template.jinja`, as in transformers.
pub(super) fn templates(folder: &Path, settings: &Value) -> Result<(Option<String>, Option<String>)> {
    let further = folder.join(TEMPLATES);
    let read = |path: PathBuf| if is_there(&path) { read_template(&path).map(Some) } else { Ok(None) };
    let default = match read(further.join("default.jinja"))? {
        None => read(folder.join(JINJA))?,
        found => found,
    };
    if default.is_some() {
        return Ok((default, read(further.join("tool_use.jinja"))?));
    }
    let names = names_of_templates(&further)?;
    if !names.is_empty() {
        return Err(no_default("holds templates", &names)).at(further);
    }
    chat_templates(settings).at(folder.join(SETTINGS))
}

/// An error that says that of several chat templates none is the default.
fn no_default(what: &str, names: &[String]) -> Error {
    let names: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
    let names = if names.is_empty() { "no names".to_string() } else { names.join(", ") };
    Error::invalid(format!("{what} without one named `default`: it has {names}"))
        .with_hint("put the template to use into a file `chat_template.jinja` beside the weights")
}

fn read_template(path: &Path) -> Result<String> {
    let bytes = std::fs::metadata(path).at(path)?.len();
    if bytes > LONGEST_TEMPLATE {
        return Err(Error::invalid(format!("has {bytes} bytes, which is no chat template")).with_hint(
            "the templates of published models have up to 20,000: look whether the right file is there",
        ))
        .at(path);
    }
    read_regular_text(path, LARGEST_JSON).at(path)
}

/// A template; or of a list of named ones the default, and the one for conversations with tools, as transformers chooses.
fn chat_templates(settings: &Value) -> Result<(Option<String>, Option<String>)> {
    match settings.get("chat_template") {
        None | Some(Value::Null) => Ok((None, None)),
        Some(Value::String(template)) => Ok((Some(template.clone()), None)),
        Some(Value::Array(list)) => {
            let named = |name: &str| {
                list.iter()
                    .find(|entry| entry.get("name").and_then(Value::as_str) == Some(name))
                    .and_then(|entry| entry.get("template")?.as_str())
            };
            let Some(default) = named("default") else {
                let names = list.iter().filter_map(|entry| entry.get("name")?.as_str());
                let names: Vec<String> = names.map(str::to_string).collect();
                return Err(no_default("`chat_template` is a list of templates", &names));
            };
            Ok((Some(default.to_string()), named("tool_use").map(str::to_string)))
        }
        Some(_) => Err(Error::invalid("`chat_template` must be a string or a list of named templates")),
    }
}

/// The entries of `eos_token_id`: one or a list of them.
fn entries(settings: &Value) -> &[Value] {
    match settings.get("eos_token_id") {
        None | Some(Value::Null) => &[],
        Some(Value::Array(list)) => list,
        Some(one) => std::slice::from_ref(one),
    }
}

/// The tokens that end a text. Numbers that no token has end nothing, as in transformers.
fn endings(settings: &Value) -> Result<Vec<u32>> {
    let entries = entries(settings);
    if let Some(wrong) = entries.iter().find(|entry| !entry.is_i64() && !entry.is_u64()) {
        return Err(Error::invalid(format!(
            "`eos_token_id` has {wrong}, expected the number of a token or a list of such numbers"
        ))
        .with_hint("write the number that `tokenizer.json` gives to the token that ends a text"));
    }
    Ok(entries.iter().filter_map(|entry| u32::try_from(entry.as_u64()?).ok()).collect())
}

/// Warns of ending tokens in the files of a folder that a vocabulary of `tokens` does not have. What else may be wrong with
/// these files is an error of those who read the texts.
pub(super) fn warnings_of_endings(folder: &Path, config: &Value, tokens: usize) -> Vec<String> {
    let generation = super::read_json_if_there(&folder.join(GENERATION)).unwrap_or_default();
    let is_token = |entry: &Value| entry.as_u64().is_some_and(|id| id < tokens as u64);
    let files = [("config.json", config), (GENERATION, &generation)].into_iter();
    files
        .filter_map(|(name, settings)| {
            let wrong = entries(settings).iter().find(|id| id.is_number() && !is_token(id))?;
            Some(format!(
                "`eos_token_id` in `{name}` has {wrong}, which is no token of the vocabulary of {tokens} and never ends a text"
            ))
        })
        .collect()
}
