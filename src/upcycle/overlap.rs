//! Measures how much of a text appears in another, because losses on fitted text say little about other text.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};

/// Tokens in a row that, found in the other text, are no coincidence: phrases of one kind of text are shorter.
const RUN: usize = 32;

/// Counts the windows of `text` that appear mostly in `other`: most of their runs, or all of a shorter window.
pub(super) fn repeated<'a>(
    text: impl Iterator<Item = &'a [u32]>,
    other: impl Iterator<Item = &'a [u32]>,
) -> usize {
    let known: HashSet<u64> =
        other.flat_map(|window| window.windows(RUN.min(window.len().max(1))).map(digest)).collect();
    let is_repeated = |window: &&[u32]| {
        let runs = window.chunks_exact(RUN.min(window.len().max(1)));
        let (all, found) = runs
            .fold((0, 0), |(all, found), run| (all + 1, found + usize::from(known.contains(&digest(run)))));
        2 * found > all
    };
    text.filter(is_repeated).count()
}

fn digest(run: &[u32]) -> u64 {
    let mut hasher = DefaultHasher::new();
    run.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Windows of rising tokens, of which the first token and the end are given.
    fn text(windows: &[(u32, u32)]) -> Vec<Vec<u32>> {
        windows.iter().map(|(from, to)| (*from..*to).collect()).collect()
    }

    fn counted(text: &[Vec<u32>], other: &[Vec<u32>]) -> usize {
        repeated(text.iter().map(Vec::as_slice), other.iter().map(Vec::as_slice))
    }

    #[test]
    fn a_window_is_repeated_when_most_of_it_is_found_at_any_place() {
        let fitted = text(&[(0, 500), (1000, 1010)]);
        assert_eq!(counted(&text(&[(0, 500)]), &fitted), 1, "the same");
        assert_eq!(counted(&text(&[(77, 400)]), &fitted), 1, "a part of it");
        assert_eq!(counted(&text(&[(300, 600)]), &fitted), 1, "the larger half");
        assert_eq!(counted(&text(&[(400, 800)]), &fitted), 0, "the smaller half");
        assert_eq!(
            counted(&text(&[(1000, 1010), (1000, 1009), (2000, 2500)]), &fitted),
            1,
            "a short one, all of it"
        );
        assert_eq!(counted(&[], &fitted) + counted(&fitted, &[]), 0);
    }
}
