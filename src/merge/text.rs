//! The tokenizer and chat template of a merged model: the base's, unless an adapter was trained with others.

use std::collections::BTreeSet;
use std::path::Path;

use crate::adapter::hf::Adapter;
use crate::error::Result;
use crate::model::Pretrained;
use crate::weights::{AdapterText, SPECIAL_TOKENS, TEMPLATE};

/// The text files of each adapter that differ from the base's, in the order of the adapters.
pub(super) struct MergedText(Vec<(String, Option<AdapterText>)>);

impl MergedText {
    /// Reads the files and makes sure that they can be copied.
    pub(super) fn of(model: &Pretrained, adapters: &[Adapter]) -> Result<Self> {
        let mut texts = Vec::new();
        for adapter in adapters {
            let text = model.adapter_text(Path::new(&adapter.source))?;
            if let Some(text) = &text {
                text.check()?;
            }
            texts.push((adapter.source.clone(), text));
        }
        Ok(Self(texts))
    }

    /// The last adapter with text files that differ from the base's, and these files.
    fn last(&self) -> Option<(&str, &AdapterText)> {
        self.0.iter().rev().find_map(|(source, text)| Some((source.as_str(), text.as_ref()?)))
    }

    /// Puts the files into the folder of the merged model, over those of the base.
    pub(super) fn write(&self, folder: &Path) -> Result<()> {
        self.last().map_or(Ok(()), |(_, text)| text.write(folder))
    }

    /// Says whose files the merged model has, where they are not the base's.
    pub(super) fn said(&self) -> Option<String> {
        let (source, text) = self.last()?;
        Some(format!(
            "the merged model has the tokenizer files of the adapter `{source}`, not the base's: {}",
            text.differences.join("; ")
        ))
    }

    /// Warnings of adapters that were trained on texts that were not made into tokens in the same way.
    pub(super) fn disagreements(&self, adapters: &[Adapter]) -> Vec<String> {
        let mut warnings = Vec::new();
        let differ = |pair: &[(String, Option<AdapterText>)]| match (&pair[0].1, &pair[1].1) {
            (Some(one), Some(other)) => !one.agrees_with(other),
            (one, other) => one.is_some() != other.is_some(),
        };
        if let (Some((source, _)), true) = (self.last(), self.0.windows(2).any(differ)) {
            warnings.push(format!(
                "the adapters do not agree about tokenizer and chat template, so they were trained on texts encoded otherwise, \
                 and the merged model has those of `{source}`"
            ));
        }
        for key in [TEMPLATE, SPECIAL_TOKENS] {
            let said: BTreeSet<_> = adapters.iter().map(|adapter| adapter.metadata.get(key)).collect();
            if said.len() > 1 {
                warnings.push(format!(
                    "the adapters do not agree about `{key}` in their metadata: they were trained on texts encoded otherwise, \
                     and the merged model keeps what the last one that has it says"
                ));
            }
        }
        warnings
    }
}
