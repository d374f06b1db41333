//! Generation: tokens after a prompt, one at a time, with keys and values kept between them.

mod sampling;

pub use sampling::Sampling;

use crate::error::{Error, Result};
use crate::model::{Cache, Decoder};

use sampling::Sampler;

/// A conversation with a model: what it has seen stays in the cache.
#[derive(Debug)]
pub struct Session<'a> {
    model: &'a Decoder,
    cache: Cache,
    /// The tokens in the cache.
    seen: Vec<u32>,
}

/// When generation ends.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Limits {
    /// The most tokens to generate.
    pub max_new_tokens: usize,
    /// Tokens that end it; they are not given out.
    pub stop: Vec<u32>,
}

/// Why generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// The model said one of the tokens that end it.
    Stop,
    /// Whoever took the tokens wanted no more.
    Caller,
    /// [`Limits::max_new_tokens`] are there.
    Limit,
    /// The model sees no more tokens.
    Context,
}

impl<'a> Session<'a> {
    /// A session that has seen nothing.
    #[must_use]
    pub fn new(model: &'a Decoder) -> Self {
        Self { model, cache: model.new_cache(), seen: Vec::new() }
    }

    /// Generates after `prompt`, which is everything from the beginning; what the session has seen of it already is
    /// not computed again. Each token goes to `on_token` as soon as it is known; `false` from there ends it.
    pub fn generate(
        &mut self,
        prompt: &[u32],
        limits: &Limits,
        sampling: Sampling,
        mut on_token: impl FnMut(u32) -> Result<bool>,
    ) -> Result<Ended> {
        let most = self.model.config().max_position_embeddings;
        if prompt.is_empty() {
            return Err(
                Error::request("the prompt has no tokens").with_hint("write something with `--prompt`")
            );
        }
        if prompt.len() >= most {
            let len = prompt.len();
            return Err(Error::request(format!("the prompt has {len} tokens, and the model sees {most}")));
        }
        if prompt.len() <= self.seen.len() || !prompt.starts_with(&self.seen) {
            self.cache = self.model.new_cache();
            self.seen.clear();
        }
        let mut sampler = Sampler::new(sampling);
        let mut next = prompt[self.seen.len()..].to_vec();
        for _ in 0..limits.max_new_tokens {
            let hidden = self.model.forward_cached(&next, &mut self.cache)?.hidden;
            self.seen.append(&mut next);
            let last = hidden.narrow(0, hidden.dim(0)? - 1, 1)?; // [1, hidden]
            let logits = self.model.logits(&last)?.squeeze(0)?.to_vec1::<f32>()?;
            if logits.iter().any(|logit| logit.is_nan()) {
                return Err(Error::invalid("the model's logits are NaN"));
            }
            let token = sampler.next(logits, &self.seen);
            if limits.stop.contains(&token) {
                return Ok(Ended::Stop);
            }
            if !on_token(token)? {
                return Ok(Ended::Caller);
            }
            if self.seen.len() + 1 >= most {
                return Ok(Ended::Context);
            }
            next = vec![token];
        }
        Ok(Ended::Limit)
    }
}
