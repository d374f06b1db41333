//! Assigns neurons to experts of equal size. The sum of gains becomes as large as a fast search can make it.

use std::cmp::Ordering;

/// Finds the expert of each neuron from `gains [neurons, experts]`; every expert gets `neurons / experts` neurons.
///
/// Neurons first take their best free expert, beginning with those that would lose most by another one. Then each two
/// experts exchange neurons as long as the sum of gains grows. The exchange between two experts is the best one possible.
pub(super) fn balanced(gains: &[f32], experts: usize) -> Vec<usize> {
    let neurons = gains.len() / experts;
    let of = |neuron: usize| &gains[neuron * experts..][..experts];
    let mut order: Vec<usize> = (0..neurons).collect();
    let regrets: Vec<f32> = order.iter().map(|neuron| regret(of(*neuron))).collect();
    order.sort_by(|x, y| regrets[*y].total_cmp(&regrets[*x]).then(x.cmp(y)));
    let mut room = vec![neurons / experts; experts];
    let mut experts_of = vec![0; neurons];
    for neuron in order {
        let free = (0..experts).filter(|expert| room[*expert] > 0);
        let best = free.max_by(|x, y| of(neuron)[*x].total_cmp(&of(neuron)[*y]).then(y.cmp(x)));
        if let Some(best) = best {
            room[best] -= 1;
            experts_of[neuron] = best;
        }
    }
    exchange(gains, experts, &mut experts_of);
    experts_of
}

fn regret(gains: &[f32]) -> f32 {
    let (mut best, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
    for gain in gains {
        if *gain > best {
            (best, second) = (*gain, best);
        } else if *gain > second {
            second = *gain;
        }
    }
    if second.is_finite() { best - second } else { 0.0 }
}

/// The most sweeps over all pairs of experts. The search has always ended long before.
const SWEEPS: usize = 16;

fn exchange(gains: &[f32], experts: usize, experts_of: &mut [usize]) {
    let mut members: Vec<Vec<usize>> = vec![Vec::new(); experts];
    for (neuron, expert) in experts_of.iter().enumerate() {
        members[*expert].push(neuron);
    }
    for _ in 0..SWEEPS {
        let mut changed = false;
        for one in 0..experts {
            for other in one + 1..experts {
                let gain = |neuron: usize, from: usize, to: usize| {
                    gains[neuron * experts + to] - gains[neuron * experts + from]
                };
                let ranked = |neurons: &[usize], from: usize, to: usize| {
                    let mut places: Vec<(f32, usize)> =
                        neurons.iter().enumerate().map(|(at, n)| (gain(*n, from, to), at)).collect();
                    places.sort_by(|x, y| match y.0.total_cmp(&x.0) {
                        Ordering::Equal => x.1.cmp(&y.1),
                        order => order,
                    });
                    places
                };
                let (ours, theirs) = (ranked(&members[one], one, other), ranked(&members[other], other, one));
                for ((ours, at), (theirs, there)) in ours.into_iter().zip(theirs) {
                    // Rounding must not let two neurons change places for ever.
                    if ours + theirs <= 1e-6 * (ours.abs() + theirs.abs()) {
                        break;
                    }
                    let (left, right) = (members[one][at], members[other][there]);
                    (members[one][at], members[other][there]) = (right, left);
                    changed = true;
                }
            }
        }
        if !changed {
            break;
        }
    }
    for (expert, neurons) in members.iter().enumerate() {
        neurons.iter().for_each(|neuron| experts_of[*neuron] = expert);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn each_gets_its_best_where_there_is_room() {
        assert_eq!(balanced(&[1.0, 0.0, 5.0, 4.0, 0.0, 1.0, 2.0, 1.5], 2), [0, 0, 1, 1]);
    }

    proptest! {
        #[test]
        fn experts_are_of_one_size_and_no_exchange_helps(
            experts in 2usize..5,
            width in 1usize..6,
            values in prop::collection::vec(0f32..1.0, 120),
        ) {
            let neurons = experts * width;
            let gains = &values[..neurons * experts];
            let found = balanced(gains, experts);
            for expert in 0..experts {
                prop_assert_eq!(found.iter().filter(|of| **of == expert).count(), width);
            }
            for x in 0..neurons {
                for y in 0..neurons {
                    let now = gains[x * experts + found[x]] + gains[y * experts + found[y]];
                    let then = gains[x * experts + found[y]] + gains[y * experts + found[x]];
                    prop_assert!(then <= now + 1e-4);
                }
            }
        }
    }
}
