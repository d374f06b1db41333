//! What a model is told about its text: by the recipe, else by the record of its adapter, else by its own record.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::data::{Layout, SpecialTokens, TemplateParts, Text};
use crate::error::{Context, Error, Result};
use crate::model::Pretrained;
use crate::recipe::{DataPlan, Date, TemplateVariables};
use crate::weights::{SPECIAL_TOKENS, TEMPLATE, TextFiles};

/// Where the tensors' file of an adapter says how its training data was laid out.
pub(super) const LAYOUT: &str = "peft_rs_layout";

/// What chat templates are told, and what control tokens in texts are.
#[derive(Debug, Clone)]
pub(super) struct Told {
    /// Today is settled once: a run that goes on past midnight was not told another date.
    pub(super) date: Date,
    /// Further variables of chat templates.
    others: Map<String, Value>,
    special_tokens: SpecialTokens,
    /// Whether the model's own record says what control tokens are.
    is_recorded: bool,
}

impl Told {
    fn new(template: TemplateVariables, special_tokens: SpecialTokens, is_recorded: bool) -> Self {
        let TemplateVariables { date, others } = template;
        Self { date: date.unwrap_or_else(Date::today), others, special_tokens, is_recorded }
    }

    /// For training: what the recipe leaves out, the record of the model says.
    pub(super) fn by_recipe(data: &DataPlan, base: &Pretrained) -> Result<Self> {
        let TextFiles { told: records, told_by, .. } = base.text()?;
        let mut template: TemplateVariables = recorded(&records, TEMPLATE).at(&told_by)?.unwrap_or_default();
        template.others.extend(data.template.others.clone());
        template.date = data.template.date.or(template.date);
        let own = recorded(&records, SPECIAL_TOKENS).at(&told_by)?;
        let special_tokens = data.special_tokens.or(own).unwrap_or_default();
        Ok(Self::new(template, special_tokens, own.is_some()))
    }

    /// For a model that answers: what the record of its adapter says, else that of its text files, else `template`.
    pub(super) fn by_records(
        files: &TextFiles,
        adapter: Option<&BTreeMap<String, String>>,
        template: TemplateVariables,
    ) -> Result<Self> {
        let mut records = files.told.clone();
        let is_recorded = records.contains_key(SPECIAL_TOKENS);
        for key in [TEMPLATE, SPECIAL_TOKENS] {
            // What the adapter says was read with it and is no error here.
            if let Some(record) = adapter.and_then(|adapter| adapter.get(key)) {
                records.insert(key.to_string(), record.clone());
            }
        }
        let template = recorded(&records, TEMPLATE).at(&files.told_by)?.unwrap_or(template);
        let special_tokens = recorded(&records, SPECIAL_TOKENS).at(&files.told_by)?.unwrap_or_default();
        Ok(Self::new(template, special_tokens, is_recorded))
    }

    /// Tokenizer and chat template of a model, which are told this.
    pub(super) fn text(&self, base: &Pretrained) -> Result<Text> {
        self.text_with(base.text()?, base).at(base.name())
    }

    /// Makes tokenizer and chat template of text files, which may be those of an adapter, and of what the template is told.
    pub(super) fn text_with(&self, files: TextFiles, base: &Pretrained) -> Result<Text> {
        let parts = TemplateParts {
            chat_template: files.chat_template,
            tool_template: files.tool_template,
            bos_token: files.bos_token,
            eos_token: files.eos_token,
            eos_token_ids: files.eos_token_ids,
            add_bos: Some(files.add_bos_token),
            now: Some(self.date.seconds()),
            variables: self.others.clone(),
            special_tokens: self.special_tokens,
            vocabulary: Some(base.config().vocab_size),
        };
        Text::new(files.tokenizer, parts)
    }

    /// Lists the variables that the chat template reads, with their values; `None` where it reads none.
    pub(super) fn read_by(&self, text: &Text) -> Option<String> {
        let date = text.template_asks_for("strftime_now").then(|| format!("date = {}", self.date));
        let others = self.others.iter().filter(|(name, _)| text.template_asks_for(name));
        let told: Vec<String> =
            date.into_iter().chain(others.map(|(name, value)| format!("{name} = {value}"))).collect();
        (!told.is_empty()).then(|| told.join(", "))
    }

    /// The record for what is trained: `None` where nothing has to be said.
    pub(super) fn records(&self, text: &Text) -> Result<[(&'static str, Option<String>); 2]> {
        let template = TemplateVariables { date: Some(self.date), others: self.others.clone() };
        let template = match self.read_by(text) {
            Some(_) => Some(serde_json::to_string(&template)?),
            None => None,
        };
        let says_more = self.is_recorded || self.special_tokens != SpecialTokens::default();
        let special_tokens =
            if says_more { Some(serde_json::to_string(&self.special_tokens)?) } else { None };
        Ok([(TEMPLATE, template), (SPECIAL_TOKENS, special_tokens)])
    }
}

/// Tokenizer and chat template of a model, with what the template is told and what control tokens in the data are. Without
/// a date templates get today's.
pub fn text_of(base: &Pretrained, told: &TemplateVariables, special_tokens: SpecialTokens) -> Result<Text> {
    Told::new(told.clone(), special_tokens, false).text(base)
}

/// Fails where the metadata of an adapter say what cannot be read.
pub(super) fn check_records(metadata: &BTreeMap<String, String>) -> Result<()> {
    let in_metadata = |error| Error::At {
        path: "the metadata of adapter_model.safetensors".into(),
        source: Box::new(error),
    };
    layout(metadata).map_err(in_metadata)?;
    recorded::<TemplateVariables>(metadata, TEMPLATE).map_err(in_metadata)?;
    recorded::<SpecialTokens>(metadata, SPECIAL_TOKENS).map_err(in_metadata)?;
    Ok(())
}

/// Reads how the training data of an adapter was laid out; `None` where its metadata do not say.
pub(super) fn layout(metadata: &BTreeMap<String, String>) -> Result<Option<Layout>> {
    let Some(name) = metadata.get(LAYOUT) else { return Ok(None) };
    Layout::parse(name).map(Some).ok_or_else(|| {
        let known: Vec<String> = Layout::ALL.iter().map(|layout| format!("`{}`", layout.name())).collect();
        Error::invalid(format!("`{LAYOUT}` is `{name}`, expected one of {}", known.join(", ")))
            .with_hint("remove the key, or take the file as it was written by the training")
    })
}

/// What a record says under a key.
fn recorded<T: DeserializeOwned>(records: &BTreeMap<String, String>, key: &str) -> Result<Option<T>> {
    let Some(written) = records.get(key) else { return Ok(None) };
    serde_json::from_str(written).map(Some).map_err(|error| {
        Error::invalid(format!("`{key}` is `{written}`, which cannot be read: {error}"))
            .with_hint("remove the key, or take the file as it was written by the training")
    })
}
