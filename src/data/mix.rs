//! Which documents an epoch sees: every source by its weight, and a held-out share that training never sees.

use std::collections::HashMap;

use sha2::{Digest, Sha256};

use super::batch::Row;
use super::chance;
use crate::error::{Error, Result};

/// The documents of one source, and how often each is seen per epoch.
#[derive(Debug, Clone, PartialEq)]
pub struct Part {
    /// Its documents, in the order of the file.
    pub rows: Vec<Row>,
    /// How often each is seen per epoch: positive and finite.
    pub weight: f64,
}

/// An epoch that sees a document more often than this is a slip of the pen.
const MOST: f64 = 1000.0;

/// Refuses a weight that is no weight.
pub(crate) fn check_weight(weight: f64) -> Result<f64> {
    if weight > 0.0 && weight <= MOST {
        return Ok(weight);
    }
    Err(Error::request(format!(
        "the weight of a data source is `{weight}`, expected a number above 0 and at most {MOST}"
    ))
    .with_hint("1 sees every document once per epoch; leave the source out to see none"))
}

/// The most epochs in which a source shows nothing at all.
const MOST_EPOCHS: f64 = 1000.0;

/// Refuses a weight that shows none of `documents` for so long that training would look for the next one without end.
pub(crate) fn check_seen(weight: f64, documents: usize) -> Result<()> {
    if documents == 0 || weight * documents as f64 >= 1.0 / MOST_EPOCHS {
        return Ok(());
    }
    Err(Error::request(format!(
        "the weight `{weight}` shows none of its {documents} documents in {MOST_EPOCHS} epochs"
    ))
    .with_hint("raise `weight`, or leave the source out"))
}

/// What epoch number `epoch` sees, as (part, row) pairs in a fixed order.
///
/// Weight `w` gives `floor(w)` copies of the part, and the fraction `f` that is left the next `f * n` places of an
/// endless row of permutations (number `k` is shuffled by seed, part and `k`): so epochs of weight 0.5 see one half,
/// then the other, and after any number of epochs no document is more than one behind another.
pub(crate) fn epoch(parts: &[Part], seed: u64, epoch: u64) -> Vec<(usize, usize)> {
    let mut seen = Vec::new();
    for (part, Part { rows, weight }) in parts.iter().enumerate() {
        for _ in 0..weight.floor() as u64 {
            seen.extend((0..rows.len()).map(|row| (part, row)));
        }
        let share = weight.fract() * rows.len() as f64;
        // Without the nudge 3 * 0.1 * 10 would stay below 3 in binary.
        let place = |epoch: u64| (epoch as f64 * share + 1e-6).floor() as u64;
        let mut number = None;
        let mut permutation: Vec<usize> = Vec::new();
        for place in place(epoch)..place(epoch + 1) {
            let n = rows.len() as u64;
            if number != Some(place / n) {
                number = Some(place / n);
                permutation = (0..rows.len()).collect();
                chance::shuffle(
                    &mut permutation,
                    &mut chance::generator("mix", &[seed, part as u64, place / n]),
                );
            }
            seen.push((part, permutation[(place % n) as usize]));
        }
    }
    seen
}

/// Takes about `share` of the distinct documents out of `parts`: at least one, never all, and none if there is only
/// one. Documents with equal tokens and labels stay together.
///
/// Who is held out is decided by SHA-256 of seed and document, so adding data moves few documents across.
pub(crate) fn hold_out(parts: &mut [Part], share: f64, seed: u64) -> Vec<Row> {
    let mut ranks: HashMap<[u8; 32], usize> = HashMap::new();
    let rank = |row: &Row| -> [u8; 32] {
        let mut hash = Sha256::new();
        hash.update(b"peft/hold-out\0");
        hash.update(seed.to_le_bytes());
        hash.update(row.digest());
        hash.finalize().into()
    };
    for row in parts.iter().flat_map(|part| &part.rows) {
        *ranks.entry(rank(row)).or_default() += 1;
    }
    if share <= 0.0 || ranks.len() < 2 {
        return Vec::new();
    }

    let total: usize = ranks.values().sum();
    let wanted = ((total as f64 * share).round() as usize).max(1);
    let mut sorted: Vec<([u8; 32], usize)> = ranks.into_iter().collect();
    sorted.sort_unstable();
    sorted.pop();
    let mut taken = 0;
    let chosen: std::collections::HashSet<[u8; 32]> = sorted
        .into_iter()
        .take_while(|(_, count)| {
            let more = taken < wanted;
            taken += count;
            more
        })
        .map(|(rank, _)| rank)
        .collect();

    let mut held_out = Vec::new();
    for part in parts {
        let (out, kept) =
            std::mem::take(&mut part.rows).into_iter().partition(|row| chosen.contains(&rank(row)));
        held_out.extend::<Vec<Row>>(out);
        part.rows = kept;
    }
    held_out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn part(n: u64, weight: f64) -> Part {
        let row =
            |document| Row { tokens: vec![1, document as u32], supervised: vec![false, true], document };
        Part { rows: (0..n).map(row).collect(), weight }
    }

    fn times(parts: &[Part], epochs: std::ops::Range<u64>) -> Vec<usize> {
        let mut times = vec![0; parts[0].rows.len()];
        for number in epochs {
            epoch(parts, 7, number).iter().for_each(|&(_, row)| times[row] += 1);
        }
        times
    }

    #[test]
    fn whole_weights_are_copies() {
        assert_eq!(times(&[part(5, 2.0)], 0..1), [2; 5]);
    }

    #[test]
    fn halves_differ_and_complete_each_other() {
        let parts = [part(10, 0.5)];
        assert_eq!(epoch(&parts, 7, 0).len(), 5);
        assert_ne!(epoch(&parts, 7, 0), epoch(&parts, 7, 1));
        assert_eq!(times(&parts, 0..2), [1; 10]);
        assert_eq!(times(&[part(10, 1.3)], 0..10), [13; 10]);
    }

    #[test]
    fn small_shares_of_small_sources_are_seen_at_last() {
        assert_eq!(times(&[part(3, 0.1)], 0..10), [1; 3]);
    }

    #[test]
    fn weights_are_positive_numbers() {
        assert!(check_weight(0.5).is_ok());
        assert!(check_seen(1e-6, 1000).is_ok() && check_seen(1e-6, 0).is_ok());
        assert_eq!(check_seen(1e-6, 999).unwrap_err().exit_code(), 2);
        for weight in [0.0, -1.0, 1e9, f64::NAN, f64::INFINITY] {
            assert_eq!(check_weight(weight).unwrap_err().exit_code(), 2);
        }
    }

    #[test]
    fn one_document_is_not_split() {
        let mut parts = [part(1, 1.0)];
        assert!(hold_out(&mut parts, 0.5, 7).is_empty());
        assert_eq!(parts[0].rows.len(), 1);
    }

    proptest! {
        #[test]
        fn no_document_lies_on_both_sides(n in 2u64..60, copies in 1usize..4, share in 0.01f64..0.99, seed: u64) {
            let mut parts = [part(n, 1.0), part(n / 2, 2.0)];
            let once = parts[0].rows.clone();
            for _ in 1..copies {
                parts[0].rows.extend(once.clone());
            }
            let total = parts.iter().map(|part| part.rows.len()).sum::<usize>();
            let held_out = hold_out(&mut parts, share, seed);
            let kept: Vec<&Row> = parts.iter().flat_map(|part| &part.rows).collect();
            prop_assert!(!held_out.is_empty() && !kept.is_empty());
            prop_assert_eq!(held_out.len() + kept.len(), total);
            prop_assert!(held_out.iter().all(|row| kept.iter().all(|other| other.tokens != row.tokens)));
        }
    }
}
