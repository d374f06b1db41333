//! Generation: tokens after a prompt, one at a time, with keys and values kept between them.

mod sampling;

pub use sampling::Sampling;

use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::model::{Cache, Decoder};

use sampling::Sampler;

/// Tokens of a prompt that are computed at once: activations of more would only take memory.
const PIECE: usize = 1024;

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

/// What came of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outcome {
    /// Why it ended.
    pub ended: Ended,
    /// The prompt, as far as it had not been seen before, up to the first token.
    pub prompt: Pace,
    /// The tokens after the first one.
    pub decoding: Pace,
}

/// Tokens, and the time that they took.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Pace {
    /// How many the model has seen.
    pub tokens: usize,
    /// By the clock.
    pub time: Duration,
}

impl Pace {
    /// Tokens per second; zero of none.
    #[must_use]
    pub fn per_second(&self) -> f64 {
        self.tokens as f64 / self.time.as_secs_f64().max(1e-9)
    }
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
    ) -> Result<Outcome> {
        let most = self.model.config().max_position_embeddings;
        if prompt.is_empty() {
            return Err(
                Error::request("the prompt has no tokens").with_hint("write something with `--prompt`")
            );
        }
        if prompt.len() >= most {
            let len = prompt.len();
            return Err(Error::request(format!("the prompt has {len} tokens, and the model sees {most}"))
                .with_hint(
                    "the model needs room for the answer too: take a shorter prompt, or look whether \
                     `max_position_embeddings` in its `config.json` is right",
                ));
        }
        let same = prompt.iter().zip(&self.seen).take_while(|(new, seen)| new == seen).count();
        // The last one is always computed: what follows it is asked for.
        self.seen.truncate(same.min(prompt.len() - 1));
        self.cache.truncate(self.seen.len());
        let mut sampler = Sampler::new(sampling);
        let mut next = prompt[self.seen.len()..].to_vec();
        let mut outcome = Outcome { ended: Ended::Limit, prompt: Pace::default(), decoding: Pace::default() };
        for step in 0..limits.max_new_tokens {
            let start = Instant::now();
            let logits = self.logits(&next)?;
            let pace = if step == 0 { &mut outcome.prompt } else { &mut outcome.decoding };
            pace.tokens += next.len();
            self.seen.append(&mut next);
            let token = sampler.next(logits, &self.seen);
            pace.time += start.elapsed();
            if limits.stop.contains(&token) {
                outcome.ended = Ended::Stop;
                break;
            }
            if !on_token(token)? {
                outcome.ended = Ended::Caller;
                break;
            }
            if self.seen.len() + 1 >= most {
                outcome.ended = Ended::Context;
                break;
            }
            next = vec![token];
        }
        Ok(outcome)
    }

    /// Those of the token after `next`, which follow what has been seen.
    fn logits(&mut self, next: &[u32]) -> Result<Vec<f32>> {
        // On a thread of the pool: hundreds of small products for a token would each wait until one has taken it over.
        let logits = rayon::scope(|_| -> Result<Vec<f32>> {
            let (before, last) = next.split_at((next.len() - 1) / PIECE * PIECE);
            for piece in before.chunks(PIECE) {
                self.model.forward_cached(piece, &mut self.cache)?;
            }
            let hidden = self.model.forward_cached(last, &mut self.cache)?.hidden;
            let last = hidden.narrow(0, hidden.dim(0)? - 1, 1)?; // [1, hidden]
            Ok(self.model.logits(&last)?.squeeze(0)?.to_vec1()?)
        })?;
        // All of them are looked at, which is faster than to stop at the first.
        if logits.iter().fold(false, |any, logit| any | logit.is_nan()) {
            return Err(Error::invalid("the model's logits are NaN"));
        }
        Ok(logits)
    }
}
