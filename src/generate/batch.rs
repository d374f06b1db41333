//! Answers to many prompts: several are generated together, so that the weights are read once for all of them. Each answer has
//! the bits that it has alone.

use std::collections::BTreeMap;
use std::time::Instant;

use super::{Chooser, Ended, Limits, Pace, Sampling, check_prompt, logits_after, on_the_pool};
use crate::error::Result;
use crate::model::{Cache, Decoder};

/// The answer to one of many prompts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Completion {
    /// Its tokens, without the one that ended it.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub ended: Ended,
}

/// An answer that is being generated.
struct Sequence<'l> {
    /// The number of its prompt.
    number: usize,
    cache: Cache,
    chooser: Chooser<'l>,
    /// The prompt, and the tokens of the answer that the model has seen.
    seen: Vec<u32>,
    answer: Vec<u32>,
}

impl Sequence<'_> {
    /// Takes the logits after what has been seen; tells why the answer ends, if it does.
    fn take(&mut self, logits: Vec<f32>) -> Option<Ended> {
        let (token, ended) = self.chooser.choose(logits, &self.seen);
        self.answer.extend(token);
        ended
    }

    fn answered(self, ended: Ended) -> Completion {
        Completion { tokens: self.answer, ended }
    }
}

/// Generates after each prompt, and gives the answers to `on_answer` in the order of the prompts, as soon as those before are
/// there. Returns how fast prompts were read, and how fast the tokens after the first ones came.
pub fn generate_all(
    model: &Decoder,
    prompts: &[Vec<u32>],
    limits: &Limits,
    sampling: Sampling,
    mut on_answer: impl FnMut(usize, Completion) -> Result<()>,
) -> Result<(Pace, Pace)> {
    prompts.iter().try_for_each(|prompt| check_prompt(model, prompt))?;
    let (mut reading, mut decoding) = (Pace::default(), Pace::default());
    let (mut done, mut given) = (BTreeMap::new(), 0);
    let (mut waiting, together) = (prompts.iter().enumerate(), model.rows_alike());
    let mut running: Vec<Sequence<'_>> = Vec::new();
    loop {
        while running.len() < together
            && let Some((number, prompt)) = waiting.next()
        {
            let (cache, chooser) = (model.new_cache(), Chooser::new(model, limits, sampling));
            let mut sequence = Sequence { number, cache, chooser, seen: prompt.clone(), answer: Vec::new() };
            let ended = if limits.max_new_tokens == 0 {
                Some(Ended::Limit)
            } else {
                let start = Instant::now();
                let logits = logits_after(model, prompt, &mut sequence.cache)?;
                let ended = sequence.take(logits);
                reading.tokens += prompt.len();
                reading.time += start.elapsed();
                ended
            };
            match ended {
                Some(ended) => {
                    done.insert(number, sequence.answered(ended));
                }
                None => running.push(sequence),
            }
        }
        while let Some(completion) = done.remove(&given) {
            on_answer(given, completion)?;
            given += 1;
        }
        if running.is_empty() {
            return Ok((reading, decoding));
        }
        let start = Instant::now();
        let logits = next_logits(model, &mut running)?;
        decoding.tokens += running.len();
        let mut going_on = Vec::with_capacity(running.len());
        for (mut sequence, logits) in running.into_iter().zip(logits) {
            match sequence.take(logits) {
                Some(ended) => {
                    done.insert(sequence.number, sequence.answered(ended));
                }
                None => going_on.push(sequence),
            }
        }
        running = going_on;
        decoding.time += start.elapsed();
    }
}

/// Shows the model the newest token of each answer, and returns the logits of the tokens after them.
fn next_logits(model: &Decoder, running: &mut [Sequence<'_>]) -> Result<Vec<Vec<f32>>> {
    let newest: Vec<u32> = running.iter().filter_map(|sequence| sequence.answer.last().copied()).collect();
    for (sequence, token) in running.iter_mut().zip(&newest) {
        sequence.seen.push(*token);
    }
    let mut caches: Vec<&mut Cache> = running.iter_mut().map(|sequence| &mut sequence.cache).collect();
    on_the_pool(|| {
        let hidden = model.forward_next(&newest, &mut caches)?.hidden; // [answers, hidden]
        Ok(model.logits(&hidden)?.to_vec2()?)
    })
}
