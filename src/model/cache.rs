//! Keys and values of the tokens seen so far, for generation. Buffers have room behind what is there, so that a token more
//! copies nothing of what came before it.

use candle_core::Tensor;

use crate::error::Result;

/// One document's keys and values in every layer.
#[derive(Debug)]
pub struct Cache {
    pub(super) layers: Vec<KeyValues>,
    pub(super) len: usize,
}

impl Cache {
    pub(super) fn new(num_layers: usize) -> Self {
        Self { layers: (0..num_layers).map(|_| KeyValues::default()).collect(), len: 0 }
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

    /// Forgets all but the first `len` tokens.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn truncate(&mut self, len: usize) {
        assert!(len <= self.len, "{len} of {} tokens", self.len);
        self.len = len;
        for layer in &mut self.layers {
            layer.len = len;
        }
    }
}

/// Rotated keys and values of one layer. Not `Clone`: a copy would share the buffers and write into the same rows.
#[derive(Debug, Default)]
pub(super) struct KeyValues {
    /// `[room, kv_heads * head_dim]` each, of which `len` rows are there.
    buffers: Option<(Tensor, Tensor)>,
    len: usize,
}

impl KeyValues {
    /// Appends rows of keys and of values: all that are there now, where they lie.
    pub(super) fn append(&mut self, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
        let len = self.len + k.dim(0)?;
        let buffers = match self.buffers.take() {
            Some((keys, values)) if len <= keys.dim(0)? => (keys, values),
            old => {
                let (old_keys, old_values) = old.unzip();
                (self.grown(old_keys, k, len)?, self.grown(old_values, v, len)?)
            }
        };
        let (keys, values) = self.buffers.insert(buffers);
        keys.slice_set(k, 0, self.len)?;
        values.slice_set(v, 0, self.len)?;
        self.len = len;
        Ok((keys.narrow(0, 0, len)?, values.narrow(0, 0, len)?))
    }

    /// A buffer for at least `len` rows like those of `new`, beginning with what is in the old one. Room doubles, so that a row
    /// is copied once or twice in all.
    fn grown(&self, old: Option<Tensor>, new: &Tensor, len: usize) -> Result<Tensor> {
        let grown = Tensor::zeros((len.next_power_of_two(), new.dim(1)?), new.dtype(), new.device())?;
        if let Some(old) = old {
            grown.slice_set(&old.narrow(0, 0, self.len)?, 0, 0)?;
        }
        Ok(grown)
    }
}
