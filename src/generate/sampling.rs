//! From logits to a token: repetition penalty, temperature, top-k, top-p, in the order of transformers.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// How a token is chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Logits are divided by it; 0 takes the most probable token.
    pub temperature: f64,
    /// Only so many of the most probable tokens are left, and those as probable as the last of them; `None`: all.
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
        // 53 bits, as a double has them.
        let draw = (self.random.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        drawn(&logits, &self.sampling, draw)
    }
}

fn penalize(logits: &mut [f32], seen: &[u32], penalty: f32) {
    if penalty == 1.0 {
        return;
    }
    let mut is_done = vec![false; logits.len()];
    for token in seen {
        let Some(logit) = logits.get_mut(*token as usize) else { continue };
        if !std::mem::replace(&mut is_done[*token as usize], true) {
            *logit = if *logit < 0.0 { *logit * penalty } else { *logit / penalty };
        }
    }
}

fn most_probable(logits: &[f32]) -> u32 {
    /// As many side by side as the compiler makes vectors of.
    const LANES: usize = 64;

    let larger = |x: f32, y: f32| if y > x { y } else { x };
    let (whole, rest) = logits.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in whole {
        for (lane, logit) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, *logit);
        }
    }
    let highest = lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, larger);
    logits.iter().position(|logit| *logit == highest).unwrap_or(0) as u32
}

/// The token that `draw`, a share of one, falls on among what is left after top-k and top-p, most probable first.
fn drawn(logits: &[f32], sampling: &Sampling, draw: f64) -> u32 {
    let mut ranking = Ranking::new(logits, sampling);
    let mut mass = ranking.total;
    if sampling.top_p < 1.0 {
        // What is left is the shortest beginning that reaches that share.
        mass = 0.0;
        let mut rank = 0;
        while let Some((_, probability)) = ranking.at(rank) {
            mass += probability;
            rank += 1;
            if mass >= sampling.top_p * ranking.total {
                break;
            }
        }
        ranking.order.truncate(rank);
    }
    let (mut left, mut last) = (draw * mass, 0);
    for rank in 0.. {
        let Some((token, probability)) = ranking.at(rank) else { break };
        (left, last) = (left - probability, token);
        if left < 0.0 {
            break;
        }
    }
    last
}

/// Tokens from the most probable on, sorted as far as anybody asks: a vocabulary is large, and few tokens of it are probable.
struct Ranking<'a> {
    logits: &'a [f32],
    order: Vec<u32>,
    sorted: usize,
    highest: f64,
    temperature: f64,
    /// The sum of all probabilities, which are not scaled to add up to one.
    total: f64,
}

impl<'a> Ranking<'a> {
    fn new(logits: &'a [f32], sampling: &Sampling) -> Self {
        let order: Vec<u32> = (0..logits.len() as u32).collect();
        let temperature = sampling.temperature;
        let mut ranking = Self { logits, order, sorted: 0, highest: 0.0, temperature, total: 0.0 };
        if let Some(most) = sampling.top_k.filter(|most| *most < logits.len()) {
            let most = most.max(1);
            ranking.sort_up_to(most);
            let least = logits[ranking.order[most - 1] as usize];
            let mut behind = ranking.order.split_off(most);
            behind.retain(|token| logits[*token as usize] == least);
            ranking.order.append(&mut behind);
        }
        ranking.highest = f64::from(logits[most_probable(logits) as usize]);
        ranking.total = ranking.order.iter().map(|token| ranking.probability(*token)).sum();
        ranking
    }

    fn probability(&self, token: u32) -> f64 {
        ((f64::from(self.logits[token as usize]) - self.highest) / self.temperature).exp()
    }

    /// The token at a rank and its probability.
    fn at(&mut self, rank: usize) -> Option<(u32, f64)> {
        if rank >= self.sorted {
            self.sort_up_to((8 * rank).max(64));
        }
        self.order.get(rank).map(|token| (*token, self.probability(*token)))
    }

    /// Tokens in front of `end` are sorted; `end` may lie behind the last.
    fn sort_up_to(&mut self, end: usize) {
        let end = end.min(self.order.len());
        if end <= self.sorted {
            return;
        }
        let by_logit = |x: &u32, y: &u32| {
            let [x_logit, y_logit] = [x, y].map(|token| self.logits[*token as usize]);
            y_logit.total_cmp(&x_logit).then_with(|| x.cmp(y))
        };
        let behind = &mut self.order[self.sorted..];
        let count = end - self.sorted;
        if count < behind.len() {
            behind.select_nth_unstable_by(count - 1, by_logit);
        }
        behind[..count].sort_unstable_by(by_logit);
        self.sorted = end;
    }
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

    /// What transformers 5.23 leaves and how probable it is, with each warper where its value is not neutral:
    ///
    /// ```python
    /// x = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([[0, 4, 0]]), logits)
    /// x = TopPLogitsWarper(top_p)(None, TopKLogitsWarper(k)(None, TemperatureLogitsWarper(t)(None, x)))
    /// x.softmax(-1)
    /// ```
    #[test]
    fn shares_of_tokens_are_those_of_transformers() {
        const DRAWS: usize = 20_000;

        let logits = [2.0, 1.0, 1.0, 0.5, -0.25, -1.0, 0.75, 1.0];
        for (repetition_penalty, temperature, top_k, top_p, expected) in [
            (1.0, 1.0, None, 1.0, [0.36121, 0.13288, 0.13288, 0.0806, 0.03807, 0.01798, 0.10349, 0.13288]),
            (1.5, 0.7, None, 1.0, [0.26846, 0.16675, 0.16675, 0.08163, 0.02339, 0.00958, 0.11667, 0.16675]),
            (1.0, 1.0, Some(2), 1.0, [0.47537, 0.17488, 0.17488, 0.0, 0.0, 0.0, 0.0, 0.17488]),
            (1.0, 1.3, Some(5), 0.85, [0.41839, 0.19387, 0.19387, 0.0, 0.0, 0.0, 0.0, 0.19387]),
            (1.3, 0.8, Some(6), 0.9, [0.3444, 0.17569, 0.17569, 0.0, 0.0, 0.0, 0.12854, 0.17569]),
            (1.0, 1.0, None, 0.3, [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]),
        ] {
            let sampling = Sampling { temperature, top_k, top_p, repetition_penalty, seed: 0 };
            let mut penalized = logits.to_vec();
            penalize(&mut penalized, &[0, 4, 0], repetition_penalty as f32);
            let mut counts = [0; 8];
            for i in 0..DRAWS {
                counts[drawn(&penalized, &sampling, (i as f64 + 0.5) / DRAWS as f64) as usize] += 1;
            }
            for (count, expected) in counts.into_iter().zip(expected) {
                let share = f64::from(count) / DRAWS as f64;
                assert!((share - expected).abs() < 2.0 / DRAWS as f64, "{sampling:?}: {counts:?}");
            }
        }
    }

    /// Everything sorted, everything divided by the sum: as one would write it down.
    fn drawn_from_all(logits: &[f32], sampling: &Sampling, draw: f64) -> u32 {
        let mut all: Vec<(u32, f64)> = logits
            .iter()
            .enumerate()
            .map(|(i, l)| (i as u32, f64::from(*l) / sampling.temperature))
            .collect();
        all.sort_by(|x, y| y.1.total_cmp(&x.1));
        all.truncate(sampling.top_k.unwrap_or(all.len()));
        let highest = all[0].1;
        all.iter_mut().for_each(|(_, p)| *p = (*p - highest).exp());
        let total: f64 = all.iter().map(|(_, p)| p).sum();
        let mut reached = 0.0;
        let kept = all.iter().take_while(|(_, p)| {
            let is_kept = reached < sampling.top_p * total;
            reached += p;
            is_kept
        });
        let kept: Vec<_> = kept.copied().collect();
        let mut left = draw * kept.iter().map(|(_, p)| p).sum::<f64>();
        for (token, p) in &kept {
            left -= p;
            if left < 0.0 {
                return *token;
            }
        }
        kept[kept.len() - 1].0
    }

    #[test]
    fn draws_from_a_large_vocabulary_are_those_of_the_sorted_whole() {
        let mut random = ChaCha8Rng::seed_from_u64(5);
        let mut uniform = || (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        for round in 0..200 {
            let spread = [0.1, 2.0, 12.0][round % 3];
            let logits: Vec<f32> = (0..3000).map(|_| (spread * uniform()) as f32).collect();
            let top_k = [None, Some(1), Some(700)][round / 3 % 3];
            let top_p = [1.0, 0.9, 0.2][round / 9 % 3];
            let sampling = Sampling { temperature: 0.7, top_k, top_p, ..Sampling::default() };
            let draw = uniform();
            assert_eq!(
                drawn(&logits, &sampling, draw),
                drawn_from_all(&logits, &sampling, draw),
                "{sampling:?}"
            );
        }
    }

    #[test]
    fn the_penalty_makes_seen_tokens_less_probable_whatever_their_sign() {
        let sampling = Sampling { repetition_penalty: 2.0, ..Sampling::default() };
        assert_eq!(draws(sampling, &[1.5, 1.0], &[0, 0])[0], 1);
        assert_eq!(draws(sampling, &[-1.0, -1.5], &[0])[0], 1);
    }
}
