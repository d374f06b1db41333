//! Generation: tokens after a prompt, one at a time, with keys and values kept between them.

mod batch;
mod sampling;
mod talk;

pub use batch::{Completion, generate_all};
pub use sampling::Sampling;
pub use talk::{Fitted, Talk};

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

/// How a generation ended, and how fast it was.
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
        check_prompt(self.model, prompt)?;
        let same = prompt.iter().zip(&self.seen).take_while(|(new, seen)| new == seen).count();
        // The last one is always computed: what follows it is asked for.
        self.seen.truncate(same.min(prompt.len() - 1));
        self.cache.truncate(self.seen.len());
        let mut chooser = Chooser::new(self.model, limits, sampling);
        let mut next = prompt[self.seen.len()..].to_vec();
        let mut outcome = Outcome { ended: Ended::Limit, prompt: Pace::default(), decoding: Pace::default() };
        for step in 0..limits.max_new_tokens {
            let start = Instant::now();
            let logits = logits_after(self.model, &next, &mut self.cache)?;
            let pace = if step == 0 { &mut outcome.prompt } else { &mut outcome.decoding };
            pace.tokens += next.len();
            self.seen.append(&mut next);
            let (token, ended) = chooser.choose(logits, &self.seen);
            pace.time += start.elapsed();
            if let Some(token) = token {
                if !on_token(token)? {
                    outcome.ended = Ended::Caller;
                    break;
                }
                next = vec![token];
            }
            if let Some(ended) = ended {
                outcome.ended = ended;
                break;
            }
        }
        Ok(outcome)
    }
}

/// Refuses a prompt that has no tokens, or leaves no room for an answer.
pub fn check_prompt(model: &Decoder, prompt: &[u32]) -> Result<()> {
    let most = model.config().max_position_embeddings;
    if prompt.is_empty() {
        return Err(Error::request("the prompt has no tokens").with_hint("write something with `--prompt`"));
    }
    if prompt.len() >= most {
        let len = prompt.len();
        return Err(Error::request(format!("the prompt has {len} tokens, and the model sees {most}"))
            .with_hint(
                "the model needs room for the answer too: take a shorter prompt, or look whether \
                 `max_position_embeddings` in its `config.json` is right",
            ));
    }
    Ok(())
}

/// Chooses the tokens of one answer, and knows when it ends.
#[derive(Debug)]
struct Chooser<'l> {
    sampler: Sampler,
    limits: &'l Limits,
    /// Tokens that the model sees.
    most: usize,
    chosen: usize,
}

impl<'l> Chooser<'l> {
    fn new(model: &Decoder, limits: &'l Limits, sampling: Sampling) -> Self {
        let most = model.config().max_position_embeddings;
        Self { sampler: Sampler::new(sampling), limits, most, chosen: 0 }
    }

    /// The token after `seen`, unless it is one that ends the answer, and why the answer ends, if it does.
    fn choose(&mut self, logits: Vec<f32>, seen: &[u32]) -> (Option<u32>, Option<Ended>) {
        let token = self.sampler.next(logits, seen);
        if self.limits.stop.contains(&token) {
            return (None, Some(Ended::Stop));
        }
        self.chosen += 1;
        let ended = if seen.len() + 1 >= self.most {
            Some(Ended::Context)
        } else {
            (self.chosen >= self.limits.max_new_tokens).then_some(Ended::Limit)
        };
        (Some(token), ended)
    }
}

/// The logits of the token after `next`, which follow what is in the cache.
fn logits_after(model: &Decoder, next: &[u32], cache: &mut Cache) -> Result<Vec<f32>> {
    let mut all = on_the_pool(|| {
        let (before, last) = next.split_at((next.len() - 1) / PIECE * PIECE);
        for piece in before.chunks(PIECE) {
            model.forward_cached(piece, cache)?;
        }
        let hidden = model.forward_cached(last, cache)?.hidden;
        let last = hidden.narrow(0, hidden.dim(0)? - 1, 1)?; // [1, hidden]
        Ok(model.logits(&last)?.to_vec2()?)
    })?;
    Ok(all.pop().unwrap_or_default())
}

/// Computes logits on a thread of the pool: hundreds of small products for a token would each wait until one has taken it over.
/// Refuses NaN.
fn on_the_pool(compute: impl FnOnce() -> Result<Vec<Vec<f32>>> + Send) -> Result<Vec<Vec<f32>>> {
    let logits = rayon::scope(|_| compute())?;
    // All of them are looked at, which is faster than to stop at the first.
    if logits.iter().flatten().fold(false, |any, logit| any | logit.is_nan()) {
        return Err(Error::invalid("the model's logits are NaN"));
    }
    Ok(logits)
}
