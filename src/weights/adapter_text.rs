//! Tokenizer and chat template that lie beside an adapter. An adapter is trained on texts as these make them, so they take the
//! place of the model's own, as they do for whoever loads them with transformers.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tokenizers::Tokenizer;

use super::companion::{self, TEMPLATES, companions};
use super::text::{GENERATION, JINJA, SETTINGS, SPECIAL, TextFiles, templates};
use super::told::{SPECIAL_TOKENS, TEMPLATE, record};
use super::{Checkpoint, LARGEST_TOKENIZER, read_json_if_there, write_atomic};
use crate::error::{Context, Result, is_there, read_regular};

const TOKENIZER: &str = "tokenizer.json";

/// The most tokens that a message names.
const NAMED: usize = 3;

/// Text files beside an adapter that are not those of its model.
#[derive(Debug, Clone)]
pub struct AdapterText {
    /// The text side of the model with this adapter.
    pub files: TextFiles,
    /// What differs from the model, as parts of a sentence; there is at least one.
    pub differences: Vec<String>,
    folder: PathBuf,
    has_tokenizer: bool,
    has_template: bool,
}

impl AdapterText {
    /// Reads the text files in the folder of an adapter; `None` where they say what those of the model say. Files that are
    /// not there are the model's. The model's embedding has `rows`.
    pub(super) fn of(model: &Checkpoint, folder: &Path, rows: usize) -> Result<Option<Self>> {
        let is_copied = model.folder().is_some_and(|base| are_same(folder, base).unwrap_or(false));
        // An adapter that was made in memory has no folder.
        if is_copied || !folder.is_dir() || companions(folder)?.is_empty() {
            return Ok(None);
        }
        let own = templates(folder, &read_json_if_there(&folder.join(SETTINGS))?)?;
        let (has_tokenizer, has_template) = (is_there(&folder.join(TOKENIZER)), own.0.is_some());
        let model_has_tokenizer = model.folder().is_none_or(|base| is_there(&base.join(TOKENIZER)));
        let (files, differences) = match (model_has_tokenizer, has_tokenizer) {
            (true, _) => {
                let theirs = model.text()?;
                let files = laid_over(&theirs, folder, has_tokenizer, own)?;
                let differences = compared(&files, &theirs, rows);
                (files, differences)
            }
            (false, true) => {
                let files = TextFiles::from_folder(folder, &model.config_json()?)?;
                (files, vec![format!("the model has no `{TOKENIZER}`")])
            }
            (false, false) => return Ok(None),
        };
        let own = Self { files, differences, folder: folder.to_path_buf(), has_tokenizer, has_template };
        Ok((!own.differences.is_empty()).then_some(own))
    }

    /// Whether texts become the same tokens with the files of both.
    #[must_use]
    pub fn agrees_with(&self, other: &Self) -> bool {
        let templates = |text: &TextFiles| (text.chat_template.clone(), text.tool_template.clone());
        self.differences == other.differences
            && templates(&self.files) == templates(&other.files)
            && self.files.tokenizer.get_vocab(true) == other.files.tokenizer.get_vocab(true)
    }

    /// Refuses files that [`Self::write`] would not pass on, such as links out of the folder, so that long work does not end
    /// with that.
    pub fn check(&self) -> Result<()> {
        self.own()?.iter().try_for_each(|path| companion::read(path, &self.folder).map(drop))
    }

    /// Puts these files into `target`, in the place of the model's, which are there already.
    pub fn write(&self, target: &Path) -> Result<()> {
        if self.has_tokenizer {
            for path in companions(target)?.iter().filter(|path| self.replaces(path)) {
                fs::remove_file(path).at(path)?;
            }
            // It is removed where nothing is left in it.
            let _ = fs::remove_dir(target.join(TEMPLATES));
            for path in self.own()? {
                companion::copy_file(&path, &self.folder, target)?;
            }
        }
        if !(self.has_tokenizer && self.has_template) {
            self.write_templates(target)?;
        }
        let told = [TEMPLATE, SPECIAL_TOKENS].map(|key| (key, self.files.told.get(key).cloned()));
        record(target, &told)
    }

    /// The files of the adapter that take the place of the model's, whole or in part.
    fn own(&self) -> Result<Vec<PathBuf>> {
        Ok(companions(&self.folder)?.into_iter().filter(|path| self.replaces(path)).collect())
    }

    /// Whether a file gives way to the adapter's. Templates and settings do so where the adapter has its own, generation
    /// settings never.
    fn replaces(&self, path: &Path) -> bool {
        match path.file_name().and_then(|name| name.to_str()).unwrap_or_default() {
            GENERATION => false,
            SETTINGS | SPECIAL => is_there(&self.folder.join(SETTINGS)),
            name if name.ends_with(".jinja") => self.has_template,
            _ => true,
        }
    }

    /// Writes the templates into their files, and into the settings where these have templates too.
    fn write_templates(&self, target: &Path) -> Result<()> {
        let Some(default) = &self.files.chat_template else { return Ok(()) };
        fs::write(target.join(JINJA), default).at(target)?;
        let further = target.join(TEMPLATES);
        let tools = further.join("tool_use.jinja");
        for path in [&further.join("default.jinja"), &tools].into_iter().filter(|path| is_there(path)) {
            fs::remove_file(path).at(path)?;
        }
        if let Some(template) = &self.files.tool_template {
            fs::create_dir_all(&further).at(&further)?;
            fs::write(&tools, template).at(&tools)?;
        }
        let path = target.join(SETTINGS);
        let mut settings = read_json_if_there(&path)?;
        let Some(written) = settings.get_mut("chat_template") else { return Ok(()) };
        *written = self.files.written_templates();
        write_atomic(&path, (serde_json::to_string_pretty(&settings)? + "\n").as_bytes())
    }
}

/// The text side of a model with the files of an adapter over it; `own` are the adapter's templates.
fn laid_over(
    model: &TextFiles,
    folder: &Path,
    has_tokenizer: bool,
    own: (Option<String>, Option<String>),
) -> Result<TextFiles> {
    let mut files = if has_tokenizer { TextFiles::from_folder(folder, &Value::Null)? } else { model.clone() };
    (files.chat_template, files.tool_template) = match own {
        (None, _) => (model.chat_template.clone(), model.tool_template.clone()),
        own => own,
    };
    let is_known = |token: &&String| files.tokenizer.token_to_id(token).is_some();
    let bos = model.bos_token.as_ref().filter(is_known).cloned();
    let eos = model.eos_token.as_ref().filter(is_known).cloned();
    files.bos_token = files.bos_token.or(bos);
    files.eos_token = files.eos_token.or(eos);
    files.eos_token_ids.extend(&model.eos_token_ids);
    files.told = model.told.clone();
    Ok(files.settled())
}

/// Says what differs between the text files of an adapter and those of its model, whose embedding has `rows`.
fn compared(own: &TextFiles, model: &TextFiles, rows: usize) -> Vec<String> {
    let mut differences = Vec::new();
    match &model.chat_template {
        None if own.chat_template.is_some() => differences.push("it has a chat template".to_string()),
        _ if (&own.chat_template, &own.tool_template) != (&model.chat_template, &model.tool_template) => {
            differences.push("its chat template is another".to_string());
        }
        _ => {}
    }
    let tokens =
        [("bos_token", &own.bos_token, &model.bos_token), ("eos_token", &own.eos_token, &model.eos_token)];
    for (name, own, model) in tokens {
        if own != model {
            let own = own.as_ref().map_or("not set".to_string(), |token| format!("`{token}`"));
            differences.push(format!("its `{name}` is {own}"));
        }
    }
    if own.add_bos_token != model.add_bos_token {
        let verb = if own.add_bos_token { "begins" } else { "does not begin" };
        differences.push(format!("its tokenizer {verb} texts with the `bos_token`"));
    }
    let lacking = lacking(all_tokens(&own.tokenizer), &model.tokenizer);
    differences.extend(named(&lacking, "the model's tokenizer lacks"));
    // Trainers add a token to pad with, which no text has, so that the adapter works all the same.
    let without_row: Vec<_> = lacking.into_iter().filter(|(_, id)| *id as usize >= rows).collect();
    differences
        .extend(named(&without_row, "the model's embedding has no row for, which texts must not have"));
    let added = model.tokenizer.get_added_tokens_decoder().into_iter();
    let added = added.map(|(id, token)| (token.content, id)).collect();
    differences.extend(named(&self::lacking(added, &own.tokenizer), "only the model's tokenizer has"));
    differences
}

fn all_tokens(tokenizer: &Tokenizer) -> Vec<(String, u32)> {
    tokenizer.get_vocab(true).into_iter().collect()
}

/// The tokens that a tokenizer does not have under their numbers, by number.
fn lacking(mut tokens: Vec<(String, u32)>, tokenizer: &Tokenizer) -> Vec<(String, u32)> {
    tokens.retain(|(token, id)| tokenizer.token_to_id(token) != Some(*id));
    tokens.sort_by(|(token, id), (other, theirs)| (id, token).cmp(&(theirs, other)));
    tokens
}

/// Counts tokens and names the first of them; `None` where there are none.
fn named(tokens: &[(String, u32)], whose: &str) -> Option<String> {
    let first: Vec<String> = tokens.iter().take(NAMED).map(|(token, _)| format!("`{token}`")).collect();
    let more = if tokens.len() > NAMED { ", .." } else { "" };
    let noun = if tokens.len() == 1 { "token" } else { "tokens" };
    (!tokens.is_empty()).then(|| format!("{} {noun} that {whose} ({}{more})", tokens.len(), first.join(", ")))
}

/// Whether two folders have the same text files with the same bytes. Generation settings are none.
fn are_same(one: &Path, other: &Path) -> Result<bool> {
    let read = |folder: &Path| -> Result<BTreeMap<PathBuf, Vec<u8>>> {
        let files = companions(folder)?.into_iter().filter(|path| !path.ends_with(GENERATION));
        let read = |path: PathBuf| {
            let bytes = read_regular(&path, LARGEST_TOKENIZER).at(&path)?;
            Ok((path.strip_prefix(folder).unwrap_or(&path).to_path_buf(), bytes))
        };
        files.map(read).collect()
    };
    Ok(read(one)? == read(other)?)
}
