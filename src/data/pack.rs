//! Documents into rows of at most `capacity` tokens: best fit, longest first.
//!
//! Longest first needs fewer rows than best fit in arrival order, and the same lengths always give as many rows.
//! Equal lengths keep the order they came in, so that a shuffle before decides which documents meet; which row comes
//! when is for the caller to shuffle after.

use std::collections::BTreeMap;

/// Rows of indices into `lengths`, in the order they were opened. A length above the capacity is a row of its own.
pub(crate) fn pack(lengths: &[usize], capacity: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(lengths[i]));

    let mut rows: Vec<Vec<usize>> = Vec::new();
    let mut by_room: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for i in order {
        let best = by_room.range(lengths[i]..).next().map(|(&room, _)| room);
        let (room, row) = match best.and_then(|room| take(&mut by_room, room).map(|row| (room, row))) {
            Some(found) => found,
            None => {
                rows.push(Vec::new());
                (capacity, rows.len() - 1)
            }
        };
        rows[row].push(i);
        by_room.entry(room.saturating_sub(lengths[i])).or_default().push(row);
    }
    rows
}

fn take(by_room: &mut BTreeMap<usize, Vec<usize>>, room: usize) -> Option<usize> {
    let rows = by_room.get_mut(&room)?;
    let row = rows.pop();
    if rows.is_empty() {
        by_room.remove(&room);
    }
    row
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_row_is_filled_by_what_fits_best() {
        assert_eq!(pack(&[3, 6, 4, 7], 10), [vec![3, 0], vec![1, 2]]);
        assert_eq!(pack(&[12, 1], 10), [vec![0], vec![1]]);
        assert!(pack(&[], 10).is_empty());
    }

    proptest! {
        #[test]
        fn every_document_is_in_one_row_that_holds_it(lengths in prop::collection::vec(2usize..=64, 0..200)) {
            let rows = pack(&lengths, 64);
            let mut seen: Vec<usize> = rows.iter().flatten().copied().collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..lengths.len()).collect::<Vec<_>>());
            for row in &rows {
                prop_assert!(row.iter().map(|&i| lengths[i]).sum::<usize>() <= 64);
            }
            let total: usize = lengths.iter().sum();
            prop_assert!(rows.len() <= (2 * total).div_ceil(64) + 1);
        }
    }
}
