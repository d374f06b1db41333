//! Keys and values of the tokens seen so far, for generation.

use super::attention::KeyValues;

/// One document's keys and values in every layer.
#[derive(Debug, Clone)]
pub struct Cache {
    pub(super) layers: Vec<KeyValues>,
    pub(super) len: usize,
}

impl Cache {
    pub(super) fn new(num_layers: usize) -> Self {
        Self { layers: vec![None; num_layers], len: 0 }
    }

    /// Tokens seen so far.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing has been seen yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}
