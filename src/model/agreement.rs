//! The tensors of a model's files, held against those that its configuration names.

use std::collections::BTreeSet;

use super::buffers::{counted, is_buffer, is_harmless, listed};
use super::config::HEAD;
use super::family::layer_of;
use super::pretrained::Pretrained;
use crate::error::{Context, Error, Result};
use crate::weights::StoredType;

impl Pretrained {
    /// Every tensor of the configuration is on disk in its shape and in a type that can be read, and nothing is there
    /// that would be left out. Names all that is wrong at once; reads no values.
    pub fn check(&self) -> Result<()> {
        let wanted = self.config().tensors();
        let (mut missing, mut shapes, mut types) = (Vec::new(), Vec::new(), Vec::new());
        for (name, shape) in &wanted {
            let Some(info) = self.find(name) else {
                missing.push(format!("`{}`", self.stored_name(name)));
                continue;
            };
            if info.shape != *shape {
                shapes.push(format!("`{name}` should be {shape:?} and is {:?}", info.shape));
            }
            if let StoredType::Other(_) = info.dtype {
                types.push(format!("`{name}` is {}", info.dtype));
            }
        }
        let known: BTreeSet<&str> = wanted.iter().map(|(name, _)| name.as_str()).collect();
        let is_aside = |name: &str| {
            self.config().is_spare(name)
                || is_harmless(name)
                || self.find(name).is_some_and(|info| is_buffer(info.dtype))
        };
        let unexpected = self.names().filter(|name| !known.contains(name) && !is_aside(name));
        let unexpected: Vec<String> = unexpected.map(|name| format!("`{name}`")).collect();
        let lacks_head = missing.len() == 1 && self.find(HEAD).is_none() && known.contains(HEAD);
        let hint = if !types.is_empty() {
            "weights are read as f32, f16 or bf16: save the model in one of these (f8 values need scales that are applied \
             first), or give a .gguf file"
        } else if lacks_head && shapes.is_empty() && unexpected.is_empty() {
            "set `\"tie_word_embeddings\": true` in `config.json` if the embedding is the head too (false is what counts where \
             it is left out); else fetch the model again with its head"
        } else {
            "the weights and the configuration are of different models"
        };
        let tensors = [
            ("missing", missing),
            ("of another shape than the configuration says", shapes),
            ("stored in a type that weights cannot have", types),
            ("unknown to the configuration", unexpected),
        ];
        let problems: Vec<String> = tensors
            .into_iter()
            .filter(|(_, tensors)| !tensors.is_empty())
            .map(|(what, tensors)| format!("{} {what}: {}", counted(tensors.len()), listed(&tensors)))
            .collect();
        if problems.is_empty() {
            return Ok(());
        }
        let problems: Vec<String> = self.other_depth().into_iter().chain(problems).collect();
        Err(Error::invalid(problems.join("; ")).with_hint(hint)).at(self.checkpoint().path())
    }

    /// The number of layers in the configuration and in the files, where they differ.
    fn other_depth(&self) -> Option<String> {
        let (said, spare) = (self.config().layers.len(), self.config().spare_layers);
        let last = self.names().filter_map(layer_of).max()?;
        if (said..=said + spare).contains(&(last + 1)) {
            return None;
        }
        Some(format!("the configuration has {said} layers, and the files have layers 0 to {last}"))
    }
}
