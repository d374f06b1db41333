//! How routers spread the tokens over their experts, and the biases that follow it.

use std::collections::BTreeMap;

use serde::Serialize;

use super::router::Routing;

/// How a layer's tokens are spread over its experts.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Spread {
    /// The layer.
    pub layer: usize,
    /// The share of all choices that each expert got.
    pub load: Vec<f64>,
    /// The entropy of these shares by that of equal ones, from 0 to 1.
    pub entropy: f64,
    /// The largest share by the mean.
    pub max_over_mean: f64,
    /// Experts with less than a tenth of an equal share.
    pub dead: usize,
    /// The share of choices that found no room at their expert.
    pub dropped: f64,
}

impl Spread {
    /// That of `counts`, the choices of each expert.
    #[must_use]
    pub fn of(layer: usize, counts: &[u64], dropped: u64) -> Self {
        let all = counts.iter().sum::<u64>().max(1) as f64;
        let experts = counts.len().max(1) as f64;
        let load: Vec<f64> = counts.iter().map(|count| *count as f64 / all).collect();
        let entropy: f64 = load.iter().filter(|share| **share > 0.0).map(|share| -share * share.ln()).sum();
        Self {
            layer,
            entropy: if experts > 1.0 { entropy / experts.ln() } else { 1.0 },
            max_over_mean: load.iter().copied().fold(0.0, f64::max) * experts,
            dead: load.iter().filter(|share| **share < 0.1 / experts).count(),
            dropped: dropped as f64 / all,
            load,
        }
    }
}

/// The choices of each expert in each sparse layer, and how many were dropped.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tally {
    layers: BTreeMap<usize, (Vec<u64>, u64)>,
}

impl Tally {
    /// Adds what routers decided.
    pub fn add(&mut self, routing: &[Routing]) {
        for layer in routing {
            let (counts, dropped) =
                self.layers.entry(layer.layer).or_insert_with(|| (vec![0; layer.experts], 0));
            for expert in &layer.chosen {
                counts[*expert as usize] += 1;
            }
            *dropped += layer.num_dropped();
        }
    }

    /// Of each layer.
    #[must_use]
    pub fn spreads(&self) -> Vec<Spread> {
        self.layers.iter().map(|(layer, (counts, dropped))| Spread::of(*layer, counts, *dropped)).collect()
    }
}

/// Selection biases after a step of loss-free balancing (Wang et al. 2024): those of experts with less than an equal share
/// go up by `rate`, those with more go down.
#[must_use]
pub fn balanced(biases: &[f32], load: &[f64], rate: f64) -> Vec<f32> {
    let equal = 1.0 / load.len().max(1) as f64;
    let step = |share: f64| {
        if share < equal {
            rate
        } else if share > equal {
            -rate
        } else {
            0.0
        }
    };
    biases.iter().zip(load).map(|(bias, share)| bias + step(*share) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_counts_and_a_bias_follows_it() {
        let spread = Spread::of(3, &[6, 2, 0, 0], 2);
        assert_eq!((spread.max_over_mean, spread.dead, spread.dropped), (3.0, 2, 0.25));
        assert!(
            (spread.entropy - (0.75f64 * (4.0f64 / 3.0).ln() + 0.25 * 4f64.ln()) / 4f64.ln()).abs() < 1e-12
        );
        assert_eq!(Spread::of(0, &[5, 5], 0).entropy, 1.0);
        assert_eq!(balanced(&[0.0, 0.5, 0.0, 0.0], &spread.load, 0.125), [-0.125, 0.5, 0.125, 0.125]);
    }
}
