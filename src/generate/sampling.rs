//! From logits to a token: repetition penalty, temperature, top-k, top-p, in the order of transformers.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// How a token is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Logits are divided by it; 0 takes the most probable token.
    pub temperature: f64,
    /// Only so many of the most probable tokens are left; `None`: all.
    pub top_k: Option<usize>,
    /// Only the most probable tokens that together reach this probability are left; 1: all.
    pub top_p: f64,
    /// Logits of tokens seen already are divided by it where positive and multiplied where negative; 1 leaves them.
    pub repetition_penalty: f64,
    /// Decides the draws.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: None, top_p: 1.0, repetition_penalty: 1.0, seed: 42 }
    }
}

/// Draws tokens one after the other.
#[derive(Debug)]
pub(super) struct Sampler {
    sampling: Sampling,
    random: ChaCha8Rng,
}

impl Sampler {
    pub(super) fn new(sampling: Sampling) -> Self {
        Self { sampling, random: ChaCha8Rng::seed_from_u64(sampling.seed) }
    }

    /// The next token after `seen`.
    pub(super) fn next(&mut self, mut logits: Vec<f32>, seen: &[u32]) -> u32 {
        penalize(&mut logits, seen, self.sampling.repetition_penalty as f32);
        if self.sampling.temperature <= 0.0 {
            return most_probable(&logits);
        }
        let candidates = candidates(&logits, &self.sampling);
        // 53 bits, as a double has them.
        let draw = (self.random.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let total: f64 = candidates.iter().map(|(_, p)| p).sum();
        let mut left = draw * total;
        for (token, probability) in &candidates {
            left -= probability;
            if left < 0.0 {
                return *token;
            }
        }
        candidates.last().map_or(0, |(token, _)| *token)
    }
}

fn penalize(logits: &mut [f32], seen: &[u32], penalty: f32) {
    if penalty == 1.0 {
        return;
    }
    let mut seen = seen.to_vec();
    seen.sort_unstable();
    seen.dedup();
    for token in seen {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit = if *logit < 0.0 { *logit * penalty } else { *logit / penalty };
        }
    }
}

fn most_probable(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (token, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = token;
        }
    }
    best as u32
}

/// What is left after top-k and top-p, most probable first, with probabilities that do not add up to one.
fn candidates(logits: &[f32], sampling: &Sampling) -> Vec<(u32, f64)> {
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let by_logit =
        |x: &u32, y: &u32| logits[*y as usize].total_cmp(&logits[*x as usize]).then_with(|| x.cmp(y));
    let most = sampling.top_k.unwrap_or(order.len()).clamp(1, order.len());
    if most < order.len() {
        order.select_nth_unstable_by(most - 1, by_logit);
        order.truncate(most);
    }
    order.sort_unstable_by(by_logit);
    let highest = f64::from(logits[order[0] as usize]);
    let mut kept: Vec<(u32, f64)> = order
        .into_iter()
        .map(|token| (token, ((f64::from(logits[token as usize]) - highest) / sampling.temperature).exp()))
        .collect();
    let total: f64 = kept.iter().map(|(_, p)| p).sum();
    let mut reached = 0.0;
    let enough = kept.iter().position(|(_, p)| {
        reached += p / total;
        reached >= sampling.top_p
    });
    if let Some(last) = enough {
        kept.truncate(last + 1);
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draws(sampling: Sampling, logits: &[f32], seen: &[u32]) -> Vec<u32> {
        let mut sampler = Sampler::new(sampling);
        (0..2000).map(|_| sampler.next(logits.to_vec(), seen)).collect()
    }

    #[test]
    fn temperature_zero_takes_the_most_probable_and_the_first_of_equals() {
        assert_eq!(draws(Sampling::default(), &[0.0, 2.0, 2.0], &[])[0], 1);
    }

    #[test]
    fn draws_follow_the_probabilities_and_the_seed() {
        let sampling = Sampling { temperature: 1.0, ..Sampling::default() };
        let logits = [0.0, 3f32.ln()];
        let drawn = draws(sampling, &logits, &[]);
        let share = drawn.iter().filter(|t| **t == 1).count() as f64 / drawn.len() as f64;
        assert!((share - 0.75).abs() < 0.03, "{share}");
        assert_eq!(drawn, draws(sampling, &logits, &[]));
        assert_ne!(drawn, draws(Sampling { seed: 1, ..sampling }, &logits, &[]));
    }

    #[test]
    fn top_k_and_top_p_cut_the_tail() {
        let logits = [0.5f32.ln(), 0.3f32.ln(), 0.2f32.ln()];
        let hot = Sampling { temperature: 1.0, ..Sampling::default() };
        let highest = |sampling| draws(sampling, &logits, &[]).into_iter().max().unwrap();
        assert_eq!(highest(hot), 2);
        assert_eq!(highest(Sampling { top_k: Some(2), ..hot }), 1);
        assert_eq!(highest(Sampling { top_p: 0.75, ..hot }), 1);
        assert_eq!(highest(Sampling { top_p: 0.4, ..hot }), 0);
    }

    #[test]
    fn the_penalty_makes_seen_tokens_less_probable_whatever_their_sign() {
        let sampling = Sampling { repetition_penalty: 2.0, ..Sampling::default() };
        assert_eq!(draws(sampling, &[1.5, 1.0], &[0, 0])[0], 1);
        assert_eq!(draws(sampling, &[-1.0, -1.5], &[0])[0], 1);
    }
}
