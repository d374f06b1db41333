//! What a model is told about its text: by the recipe, else by the record of its adapter, else by its own record.

use std::collections::BTreeMap;

use serde::de::DeserializeOwned;

use super::artifact::LAYOUT;
use super::plan::DataPlan;
use super::prepared::text_of;
use super::template::TemplateVariables;
use crate::data::{Layout, SpecialTokens, Text};
use crate::error::{Error, Result};
use crate::model::Pretrained;
use crate::weights::{SPECIAL_TOKENS, TEMPLATE};

/// What chat templates are told, and what control tokens in texts are.
#[derive(Debug, Clone)]
pub(super) struct Told {
    pub(super) template: TemplateVariables,
    pub(super) special_tokens: SpecialTokens,
    /// Whether the model's own record says what control tokens are.
    is_recorded: bool,
}

impl Told {
    /// For training: what the recipe leaves out, the record of the model says.
    pub(super) fn by_recipe(data: &DataPlan, base: &Pretrained) -> Result<Self> {
        let records = base.text()?.told;
        let mut template: TemplateVariables =
            recorded(&records, TEMPLATE).map_err(in_settings)?.unwrap_or_default();
        template.others.extend(data.template.others.clone());
        template.date = data.template.date.or(template.date);
        let own = recorded(&records, SPECIAL_TOKENS).map_err(in_settings)?;
        let special_tokens = data.special_tokens.or(own).unwrap_or_default();
        Ok(Self { template: dated(template), special_tokens, is_recorded: own.is_some() })
    }

    /// For a model that answers: what the record of its adapter says, else its own `records`, else `template`.
    pub(super) fn by_records(
        mut records: BTreeMap<String, String>,
        adapter: Option<&BTreeMap<String, String>>,
        template: TemplateVariables,
    ) -> Result<Self> {
        let is_recorded = records.contains_key(SPECIAL_TOKENS);
        for key in [TEMPLATE, SPECIAL_TOKENS] {
            if let Some(record) = adapter.and_then(|adapter| adapter.get(key)) {
                records.insert(key.to_string(), record.clone());
            }
        }
        let template = recorded(&records, TEMPLATE).map_err(in_settings)?.unwrap_or(template);
        let special_tokens = recorded(&records, SPECIAL_TOKENS).map_err(in_settings)?.unwrap_or_default();
        Ok(Self { template: dated(template), special_tokens, is_recorded })
    }

    /// Tokenizer and chat template of a model, which are told this.
    pub(super) fn text(&self, base: &Pretrained) -> Result<Text> {
        text_of(base, &self.template, self.special_tokens)
    }

    /// The record for what is trained: `None` where nothing has to be said.
    pub(super) fn records(&self, text: &Text) -> Result<[(&'static str, Option<String>); 2]> {
        let template = match self.template.told(text) {
            Some(_) => Some(serde_json::to_string(&self.template)?),
            None => None,
        };
        let says_more = self.is_recorded || self.special_tokens != SpecialTokens::default();
        let special_tokens =
            if says_more { Some(serde_json::to_string(&self.special_tokens)?) } else { None };
        Ok([(TEMPLATE, template), (SPECIAL_TOKENS, special_tokens)])
    }
}

/// Today is settled once: a run that goes on past midnight was not told another date.
fn dated(template: TemplateVariables) -> TemplateVariables {
    TemplateVariables { date: Some(template.day()), ..template }
}

fn in_settings(error: Error) -> Error {
    Error::At { path: "tokenizer_config.json".into(), source: Box::new(error) }
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
