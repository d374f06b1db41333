//! Weights that two models have in common, once in memory: a teacher and the student that was made from it share embeddings,
//! attention and norms.

use std::collections::BTreeMap;

use candle_core::{DType, Device};

use super::attention::Attention;
use super::block::Block;
use super::decoder::Decoder;
use super::pretrained::Pretrained;
use crate::error::Result;
use crate::ops::{Parameter, Weight};

impl Decoder {
    /// As [`Decoder::open`], but for the tensors that `other`, the decoder of `of`, holds in the same type from the same
    /// bytes under the same name: those are its own. Training `other` copies what it trains and leaves them as they are.
    pub fn open_beside(
        pretrained: &Pretrained,
        dtype: DType,
        device: &Device,
        (other, of): (&Self, &Pretrained),
    ) -> Result<Self> {
        pretrained.check()?;
        let held = other.by_name();
        let config = pretrained.config();
        let decoder = Self::load(config, device, |name| {
            let dtype = if config.is_held_in_f32(name) { DType::F32 } else { dtype };
            match held.get(name).filter(|weight| weight.dtype() == dtype) {
                Some(weight) if pretrained.has_same_bytes(name, of)? => Ok(weight.clone()),
                _ => pretrained.weight(name, dtype, device),
            }
        })?;
        pretrained.checkpoint().release_files();
        of.checkpoint().release_files();
        Ok(decoder)
    }

    /// All weights and biases; with those of experts no dense model has a name in common.
    fn by_name(&self) -> BTreeMap<&str, Weight> {
        let parameters = self.blocks.iter().flat_map(plain).chain([&self.norm.weight]);
        let parameters = parameters.map(|parameter| (parameter.name(), Weight::Dense(parameter.clone())));
        let linears = self.linears().map(|linear| &linear.weight);
        let weights = linears.chain([self.embedding(), self.head()]);
        weights.map(|weight| (weight.name(), weight.clone())).chain(parameters).collect()
    }
}

/// Norms and biases.
fn plain(block: &Block) -> impl Iterator<Item = &Parameter> {
    let Attention { qk_norm, .. } = &block.attention;
    let head_norms = qk_norm.iter().flat_map(|(q, k)| [&q.weight, &k.weight]);
    let biases = block.linears().filter_map(|linear| linear.bias.as_ref());
    [&block.input_norm.weight, &block.post_norm.weight].into_iter().chain(head_norms).chain(biases)
}

impl Pretrained {
    /// Whether a tensor is stored in the same bytes as that of this name in `other`; quantized ones never are.
    pub fn has_same_bytes(&self, name: &str, other: &Self) -> Result<bool> {
        self.compare(name, other, |own, theirs| own == theirs)
    }

    /// The same as far as the first and last values tell, which training would have changed.
    fn seems_to_have_same_bytes(&self, name: &str, other: &Self) -> Result<bool> {
        /// A page, which is what the system reads at least.
        const SAMPLE: usize = 4096;

        self.compare(name, other, |own, theirs| {
            let (first, last) = (own.len().min(SAMPLE), own.len().saturating_sub(SAMPLE));
            own.len() == theirs.len() && own[..first] == theirs[..first] && own[last..] == theirs[last..]
        })
    }

    fn compare(&self, name: &str, other: &Self, same: impl Fn(&[u8], &[u8]) -> bool) -> Result<bool> {
        let (Ok(own), Ok(theirs)) = (self.info(name), other.info(name)) else { return Ok(false) };
        if own.shape != theirs.shape || own.dtype != theirs.dtype {
            return Ok(false);
        }
        let (Some(own), Some(theirs)) = (self.plain_bytes(name)?, other.plain_bytes(name)?) else {
            return Ok(false);
        };
        Ok(same(own, theirs))
    }

    /// Bytes that the weights of a teacher take when this model is in memory already, both computing in `dtype`. Compares
    /// the first and last values of what both have, and reads no others.
    pub fn bytes_beside(&self, model: &Self, dtype: DType) -> Result<u64> {
        let mut shared = 0;
        for (name, _) in self.config().tensors() {
            if self.seems_to_have_same_bytes(&name, model)? {
                shared += (self.info(&name)?.num_values() * dtype.size_in_bytes()) as u64;
            }
        }
        Ok(self.weight_bytes(dtype).saturating_sub(shared))
    }
}
