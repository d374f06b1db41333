//! Limits a configuration to what the names and shapes of the tensors in its files allow. A configuration that asks for
//! more is refused before anything is allocated.

use std::collections::BTreeSet;

use crate::error::{Error, Result};
use crate::model::config::DecoderConfig;
use crate::weights::TensorInfo;

/// Layers of a configuration without files; the deepest model has some hundreds.
const MOST_LAYERS: usize = 1 << 14;
/// Experts in all layers of a configuration without files; the largest model has some ten thousand.
const MOST_EXPERTS: usize = 1 << 20;

const OTHER_MODEL: &str = "the weights and the configuration are of different models";

/// Limits the layers and experts that a configuration may have.
#[derive(Debug, Clone, Copy)]
pub(in crate::model) struct Capacity {
    /// A model has at most so many layers, since every layer has a tensor.
    layers: usize,
    /// A layer has at most so many experts.
    experts: usize,
    /// All layers together have at most so many experts, since every expert has a value.
    all_experts: usize,
    /// Says what the files contain; it is `None` for a configuration without files.
    found: Option<Found>,
}

/// Says what the names and shapes of tensors show.
#[derive(Debug, Clone, Copy)]
struct Found {
    tensors: usize,
    /// The number of the last layer.
    last_layer: Option<usize>,
    experts: usize,
}

impl Capacity {
    /// Holds the limits for a configuration without files.
    pub(in crate::model) const MOST: Self =
        Self { layers: MOST_LAYERS, experts: MOST_EXPERTS, all_experts: MOST_EXPERTS, found: None };

    /// Computes the limits for files with these tensors, which have the names of Hugging Face or of GGUF.
    pub(in crate::model) fn of<'t>(tensors: impl Iterator<Item = &'t TensorInfo>) -> Self {
        let (mut count, mut values, mut last_layer) = (0usize, 0usize, None);
        let mut numbers = BTreeSet::new();
        let mut stacked = 0;
        for info in tensors {
            count += 1;
            values = values.saturating_add(info.num_values());
            last_layer = last_layer.max(layer_of(&info.name));
            numbers.extend(number_after(&info.name, ".experts."));
            if let [first, _, _] = info.shape[..]
                && info.num_values() > 0
            {
                stacked = stacked.max(first);
            }
        }
        // Numbers are what names say; there cannot be more experts than names.
        let named = numbers.last().map_or(0, |last| last.saturating_add(1)).min(count);
        let found = Found { tensors: count, last_layer, experts: named.max(stacked) };
        // A few more than there are pass here, and what is missing of them is listed later.
        let experts = stacked.max(count);
        Self { layers: count, experts, all_experts: values.max(count), found: Some(found) }
    }

    /// Refuses a number of layers that the configuration states under `key`.
    pub(super) fn refuse_layers(&self, key: &str, layers: usize) -> Result<()> {
        if layers <= self.layers {
            return Ok(());
        }
        Err(match self.found {
            None => Error::invalid(format!("`{key}` is {layers}, expected at most {}", self.layers)),
            Some(Found { tensors, last_layer, .. }) => {
                let of_layers = match last_layer {
                    Some(last) => format!("of layers 0 to {last}"),
                    None => "none of a layer".to_string(),
                };
                Error::invalid(format!(
                    "`{key}` is {layers}, and the files have {tensors} tensors, {of_layers}"
                ))
                .with_hint(OTHER_MODEL)
            }
        })
    }

    /// Refuses a number of experts of each layer that the configuration states under `key`.
    pub(super) fn refuse_experts(&self, key: &str, experts: usize) -> Result<()> {
        if experts <= self.experts {
            return Ok(());
        }
        Err(match self.found {
            None => Error::invalid(format!("`{key}` is {experts}, expected at most {}", self.experts)),
            Some(Found { experts: found, .. }) => {
                Error::invalid(format!("`{key}` is {experts}, and the files have tensors of {found} experts"))
                    .with_hint(OTHER_MODEL)
            }
        })
    }

    /// Refuses experts that all layers together have too many of.
    pub(super) fn refuse_all_experts(&self, config: &DecoderConfig) -> Result<()> {
        let experts = config.sparse_layers().try_fold(0usize, |sum, (_, moe)| sum.checked_add(moe.experts));
        if experts.is_some_and(|experts| experts <= self.all_experts) {
            return Ok(());
        }
        let experts = experts.map_or("more than can be counted".to_string(), |experts| experts.to_string());
        Err(Error::invalid(format!(
            "the layers have {experts} experts in all, expected at most {}",
            self.all_experts
        )))
    }
}

/// The number of the layer that a tensor belongs to, by its name.
pub(in crate::model) fn layer_of(name: &str) -> Option<usize> {
    let rest = name.strip_prefix("blk.");
    let number = rest.and_then(|rest| rest.split('.').next()?.parse().ok());
    number.or_else(|| number_after(name, "layers."))
}

/// The number that follows `part` in a name.
fn number_after(name: &str, part: &str) -> Option<usize> {
    let (_, rest) = name.split_once(part)?;
    rest.split('.').next()?.parse().ok()
}
