//! Tokenizer and chat template that lie beside an adapter. An adapter is trained on texts as these make them, so they take the
//! place of the model's own, as they do for whoever loads them with transformers.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::companion::{self, TEMPLATES, companions};
use super::text::{GENERATION, JINJA, SETTINGS, SPECIAL, TextFiles, special_token, templates};
use super::text_differences::{NAMED, compared, parts_of};
use super::told::{SPECIAL_TOKENS, TEMPLATE, record};
use super::{Checkpoint, LARGEST_TOKENIZER, read_json_if_there, write_atomic};
use crate::error::{Context, Error, Result, is_there, read_regular};

const TOKENIZER: &str = "tokenizer.json";

/// Text files beside an adapter that are not those of its model.
#[derive(Debug, Clone)]
pub struct AdapterText {
    /// The text side of the model with this adapter.
    pub files: TextFiles,
    /// What differs from the model, as parts of a sentence.
    differences: Vec<String>,
    /// Which of the files are not used, as parts of a sentence.
    unused: Vec<String>,
    folder: PathBuf,
    has_tokenizer: bool,
    has_template: bool,
    /// Whether its settings have other special tokens than the model, which are used with the model's tokenizer.
    takes_tokens: bool,
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
        let settings = read_json_if_there(&folder.join(SETTINGS))?;
        let own = templates(folder, &settings)?;
        let (has_tokenizer, has_template) = (is_there(&folder.join(TOKENIZER)), own.0.is_some());
        let model_has_tokenizer = model.folder().is_none_or(|base| is_there(&base.join(TOKENIZER)));
        let mut takes_tokens = false;
        let (files, differences, unused) = match (model_has_tokenizer, has_tokenizer) {
            (true, _) => {
                let theirs = model.text()?;
                let mut unused = Vec::new();
                let files = if has_tokenizer {
                    TextFiles::from_folder(folder, &Value::Null)?
                } else {
                    unused.extend(unused_files(folder, model.folder())?);
                    unused.extend(unused_beginning(&settings, &theirs, model.folder())?);
                    let files = with_settings(&theirs, folder, &settings, &mut unused)?;
                    let tokens = |text: &TextFiles| (text.bos_token.clone(), text.eos_token.clone());
                    takes_tokens = tokens(&files) != tokens(&theirs);
                    files
                };
                let files = laid_over(&theirs, files, own);
                let differences = compared(&files, &theirs, rows, model.is_gguf())?;
                (files, differences, unused)
            }
            (false, true) => {
                let files = TextFiles::from_folder(folder, &model.config_json()?)?;
                (files, vec![format!("the model has no `{TOKENIZER}`")], Vec::new())
            }
            (false, false) => return Ok(None),
        };
        let folder = folder.to_path_buf();
        let own = Self { files, differences, unused, folder, has_tokenizer, has_template, takes_tokens };
        Ok((own.differs() || !own.unused.is_empty()).then_some(own))
    }

    /// Whether texts become tokens, or tokens texts, otherwise than with the files of the model.
    #[must_use]
    pub fn differs(&self) -> bool {
        !self.differences.is_empty()
    }

    /// Says what differs, after `used`, which says whose files are used for that; and which files are not used.
    #[must_use]
    pub fn said(&self, used: &str) -> String {
        let folder = self.folder.display();
        let partly = format!("not all tokenizer files beside the adapter `{folder}` are used");
        let begin = if self.differs() { used } else { &partly };
        let parts: Vec<&str> = self.differences.iter().chain(&self.unused).map(String::as_str).collect();
        format!("{begin}: {}", parts.join("; "))
    }

    /// Whether texts become the same tokens with the files of both.
    pub fn agrees_with(&self, other: &Self) -> Result<bool> {
        let templates = |text: &TextFiles| (text.chat_template.clone(), text.tool_template.clone());
        Ok(self.differences == other.differences
            && templates(&self.files) == templates(&other.files)
            && parts_of(&self.files.tokenizer)? == parts_of(&other.files.tokenizer)?)
    }

    /// Refuses files that [`Self::write`] would not pass on, such as links out of the folder, so that long work does not end
    /// with that.
    pub fn check(&self) -> Result<()> {
        self.sources()?.iter().try_for_each(|path| companion::read(path, &self.folder).map(drop))
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
        if !(self.has_tokenizer && is_there(&self.folder.join(SETTINGS))) {
            self.change_settings(target)?;
        }
        let told = [TEMPLATE, SPECIAL_TOKENS].map(|key| (key, self.files.told.get(key).cloned()));
        record(target, &told)
    }

    /// The files of which [`Self::write`] writes anything.
    fn sources(&self) -> Result<Vec<PathBuf>> {
        if self.has_tokenizer {
            return self.own();
        }
        let further = self.folder.join(TEMPLATES);
        let default =
            [further.join("default.jinja"), self.folder.join(JINJA)].into_iter().find(|path| is_there(path));
        let has_file = default.is_some();
        let mut sources = Vec::from_iter(default);
        sources.extend(has_file.then(|| further.join("tool_use.jinja")));
        if self.takes_tokens || (self.has_template && !has_file) {
            sources.extend([SETTINGS, SPECIAL].map(|name| self.folder.join(name)));
        }
        sources.retain(|path| is_there(path));
        Ok(sources)
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
        Ok(())
    }

    /// Changes the settings of the model in `target`, which are kept: they name special tokens and may have a template.
    fn change_settings(&self, target: &Path) -> Result<()> {
        let paths = [SETTINGS, SPECIAL].map(|name| target.join(name));
        let [settings, special] = [read_json_if_there(&paths[0])?, read_json_if_there(&paths[1])?];
        let tokens = [&self.files.bos_token, &self.files.eos_token];
        let mut changed = Vec::new();
        for (name, token) in SPECIAL_NAMES.into_iter().zip(tokens) {
            if special_token(target, [&settings, &special], name)? != *token {
                changed.push((name, Value::from(token.clone())));
            }
        }
        for (path, before) in paths.iter().zip([settings, special]) {
            let is_settings = path.ends_with(SETTINGS);
            let mut after = match before.clone() {
                Value::Null => Map::new(),
                Value::Object(before) => before,
                _ => return Err(Error::invalid("is no JSON object")).at(path),
            };
            if let (Some(_), Some(written)) = (&self.files.chat_template, after.get_mut("chat_template")) {
                *written = self.files.written_templates();
            }
            for (name, token) in &changed {
                if is_settings || after.contains_key(*name) {
                    after.insert((*name).to_string(), token.clone());
                }
            }
            let after = Value::Object(after);
            if after != before && !(before.is_null() && after == Value::Object(Map::new())) {
                write_atomic(path, (serde_json::to_string_pretty(&after)? + "\n").as_bytes())?;
            }
        }
        Ok(())
    }
}

/// The text side of a model with the special tokens of an adapter that has no tokenizer. Those that the model's tokenizer
/// lacks are named in `unused`.
fn with_settings(
    model: &TextFiles,
    folder: &Path,
    settings: &Value,
    unused: &mut Vec<String>,
) -> Result<TextFiles> {
    let mut files = model.clone();
    let special = read_json_if_there(&folder.join(SPECIAL))?;
    for (name, token) in SPECIAL_NAMES.into_iter().zip([&mut files.bos_token, &mut files.eos_token]) {
        let Some(own) =
            special_token(folder, [settings, &special], name)?.filter(|own| token.as_ref() != Some(own))
        else {
            continue;
        };
        if files.tokenizer.token_to_id(&own).is_some() {
            *token = Some(own);
        } else {
            unused.push(format!(
                "its `{name}` is `{own}`, which is not used, as the model's tokenizer lacks it"
            ));
        }
    }
    let eos = files.eos_token.as_deref().and_then(|token| files.tokenizer.token_to_id(token));
    files.eos_token_ids.extend(eos);
    Ok(files)
}

/// The names of special tokens in settings that decide how texts are encoded.
const SPECIAL_NAMES: [&str; 2] = ["bos_token", "eos_token"];

/// Names the files of an adapter without a tokenizer that nothing reads, where the model does not have the same.
fn unused_files(folder: &Path, base: Option<&Path>) -> Result<Option<String>> {
    let mut names = BTreeSet::new();
    for path in companions(folder)? {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let is_read = [SETTINGS, SPECIAL, GENERATION].contains(&name)
            || name.ends_with(".jinja")
            // That of a processor of pictures or sound, which nothing reads beside a model either.
            || name.starts_with("chat_template");
        let bytes = |path: &Path| read_regular(path, LARGEST_TOKENIZER).ok();
        let is_models =
            || base.is_some_and(|base| bytes(&path).is_some_and(|own| bytes(&base.join(name)) == Some(own)));
        if !is_read && !is_models() {
            names.insert(format!("`{name}`"));
        }
    }
    let first: Vec<String> = names.iter().take(NAMED).cloned().collect();
    let more = if names.len() > NAMED { ", .." } else { "" };
    let verb = if names.len() == 1 { "is" } else { "are" };
    let said = format!("its {}{more} {verb} not used, as it has no `{TOKENIZER}`", first.join(", "));
    Ok((!names.is_empty()).then_some(said))
}

/// Says of an `add_bos_token` in the settings of an adapter without a tokenizer that it is not used: as with models, the
/// tokenizer itself decides.
fn unused_beginning(settings: &Value, model: &TextFiles, base: Option<&Path>) -> Result<Option<String>> {
    const NAME: &str = "add_bos_token";

    let Some(own) = settings.get(NAME).and_then(Value::as_bool) else { return Ok(None) };
    let theirs = match base {
        Some(base) => read_json_if_there(&base.join(SETTINGS))?.get(NAME).and_then(Value::as_bool),
        None => None,
    };
    if own == model.add_bos_token || theirs == Some(own) {
        return Ok(None);
    }
    let verb = if own { "does not begin" } else { "begins" };
    Ok(Some(format!(
        "its `{NAME}` is {own}, which is not used, as the model's tokenizer {verb} texts with the `bos_token`"
    )))
}

/// The files of an adapter, with those of its model in the place of what it does not have; `own` are its templates.
fn laid_over(model: &TextFiles, mut files: TextFiles, own: (Option<String>, Option<String>)) -> TextFiles {
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
    (files.told, files.told_by) = (model.told.clone(), model.told_by.clone());
    files.settled()
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
