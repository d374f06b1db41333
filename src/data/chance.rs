//! Seeded chance: ChaCha20 keyed by SHA-256, so that an order can be reproduced from its description alone.
//!
//! The key is `sha256("peft/" + purpose + "\0" + each number as 8 little-endian bytes)`. A permutation is
//! Fisher-Yates from the last place down, place `i` drawing `floor(u64 * (i + 1) / 2^64)`; both are written out here
//! because the same functions of the `rand` crates may change between versions.

use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use sha2::{Digest, Sha256};

/// A generator for one purpose and the numbers that name its instance (seed, epoch, …).
pub(crate) fn generator(purpose: &str, numbers: &[u64]) -> ChaCha20Rng {
    let mut hash = Sha256::new();
    hash.update(b"peft/");
    hash.update(purpose.as_bytes());
    hash.update([0]);
    for number in numbers {
        hash.update(number.to_le_bytes());
    }
    ChaCha20Rng::from_seed(hash.finalize().into())
}

/// Puts `items` into a random order.
pub(crate) fn shuffle<T>(items: &mut [T], generator: &mut impl Rng) {
    for last in (1..items.len()).rev() {
        let drawn = (u128::from(generator.next_u64()) * (last as u128 + 1)) >> 64;
        items.swap(last, drawn as usize);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_order_is_fixed_by_its_description() {
        let mut items: Vec<u32> = (0..8).collect();
        shuffle(&mut items, &mut generator("order", &[42, 0]));
        // The same from ChaCha20 and SHA-256 in Python; a change breaks every run that is to be resumed.
        assert_eq!(items, [7, 6, 4, 0, 3, 5, 2, 1]);
    }

    #[test]
    fn every_place_is_equally_likely() {
        let mut seen = [[0u32; 4]; 4];
        for seed in 0..4000 {
            let mut items = [0usize, 1, 2, 3];
            shuffle(&mut items, &mut generator("order", &[seed]));
            items.iter().enumerate().for_each(|(place, &item)| seen[place][item] += 1);
        }
        assert!(seen.iter().flatten().all(|&count| (850..1150).contains(&count)), "{seen:?}");
    }
}
