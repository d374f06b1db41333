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
    /// Reads the files and makes sure that those of the merged model can be copied.
    pub(super) fn of(model: &Pretrained, adapters: &[Adapter]) -> Result<Self> {
        let mut texts = Vec::new();
        for adapter in adapters {
            texts.push((adapter.source.clone(), model.adapter_text(Path::new(&adapter.source))?));
        }
        let texts = Self(texts);
        texts.last().map_or(Ok(()), |(_, text)| text.check())?;
        Ok(texts)
    }

    /// The last adapter with which texts are made otherwise than with the base, and its files.
    fn last(&self) -> Option<(&str, &AdapterText)> {
        self.0.iter().rev().find_map(|(source, text)| Some((source.as_str(), differing(text)?)))
    }

    /// Puts the files into the folder of the merged model, over those of the base.
    pub(super) fn write(&self, folder: &Path) -> Result<()> {
        self.last().map_or(Ok(()), |(_, text)| text.write(folder))
    }

    /// Says whose files the merged model has, where they are not the base's, and which files are not used.
    pub(super) fn said(&self) -> Option<String> {
        let last = self.last().map(|(source, text)| {
            text.said(&format!(
                "the merged model has the tokenizer files of the adapter `{source}`, not the base's"
            ))
        });
        let unused = self.0.iter().filter_map(|(_, text)| text.as_ref().filter(|text| !text.differs()));
        let said: Vec<String> = last.into_iter().chain(unused.map(|text| text.said(""))).collect();
        (!said.is_empty()).then(|| said.join("; "))
    }

    /// Warnings of adapters that were trained on texts that were not made into tokens in the same way.
    pub(super) fn disagreements(&self, adapters: &[Adapter]) -> Result<Vec<String>> {
        let mut warnings = Vec::new();
        let mut differ = false;
        for pair in self.0.windows(2) {
            differ |= match (differing(&pair[0].1), differing(&pair[1].1)) {
                (Some(one), Some(other)) => !one.agrees_with(other)?,
                (one, other) => one.is_some() != other.is_some(),
            };
        }
        if let (Some((source, _)), true) = (self.last(), differ) {
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
        Ok(warnings)
    }
}

/// The files, where texts are made otherwise with them than with those of the base.
fn differing(text: &Option<AdapterText>) -> Option<&AdapterText> {
    text.as_ref().filter(|text| text.differs())
}
