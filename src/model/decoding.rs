//! The forward of generation: tokens that follow those in a cache.

use super::cache::Cache;
use super::decoder::{Decoder, Output};
use crate::error::{Error, Result};
use crate::ops::{Documents, rows_alike};

impl Decoder {
    /// An empty cache for [`Decoder::forward_cached`].
    #[must_use]
    pub fn new_cache(&self) -> Cache {
        Cache::new(self.blocks.len())
    }

    /// Hidden states of the tokens that follow those in `cache`, which they are added to.
    pub fn forward_cached(&self, tokens: &[u32], cache: &mut Cache) -> Result<Output> {
        let documents = Documents::single(tokens.len(), cache.len);
        let output = self.run(tokens, &documents, &mut [&mut *cache])?;
        cache.len += tokens.len();
        Ok(output)
    }

    /// Hidden states of one token more of each document in `caches`. The weights are read once for all of them. A row has the
    /// bits that it has alone, if there are no more documents than [`Decoder::rows_alike`].
    pub fn forward_next(&self, tokens: &[u32], caches: &mut [&mut Cache]) -> Result<Output> {
        if tokens.len() != caches.len() {
            let (tokens, caches) = (tokens.len(), caches.len());
            return Err(Error::invalid(format!("{tokens} next tokens for {caches} documents")));
        }
        let documents = Documents::next_of_each(caches.iter().map(|cache| cache.len).collect());
        let output = self.run(tokens, &documents, caches)?;
        caches.iter_mut().for_each(|cache| cache.len += 1);
        Ok(output)
    }

    /// The most rows that the model computes together so that each has the bits that it has alone: kernels for more rows sum
    /// in another order.
    #[must_use]
    pub fn rows_alike(&self) -> usize {
        let linears = self.linears().map(|linear| rows_alike(&linear.weight, linear.low_rank.is_some()));
        linears.chain([rows_alike(self.head(), false)]).min().unwrap_or(1)
    }
}
