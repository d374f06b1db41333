//! How many tokens routers send to each expert, and a warning of experts that get none.

use std::collections::BTreeMap;

use crate::model::Routing;

/// Tokens of a text that were routed, and how many of them each expert of each layer got.
#[derive(Debug, Default)]
pub(super) struct Load {
    /// Tokens that each layer has routed.
    tokens: usize,
    counts: BTreeMap<usize, Vec<usize>>,
}

impl Load {
    /// Adds what the routers of all layers decided for one batch.
    pub(super) fn add(&mut self, routings: &[Routing]) {
        self.tokens += routings.first().map_or(0, |routing| routing.chosen.len() / routing.active.max(1));
        for routing in routings {
            let counts = self.counts.entry(routing.layer).or_insert_with(|| vec![0; routing.experts]);
            routing.chosen.iter().for_each(|expert| counts[*expert as usize] += 1);
        }
    }

    /// Tokens that each layer has routed.
    pub(super) fn tokens(&self) -> usize {
        self.tokens
    }

    /// The tokens that each expert got, by layer.
    pub(super) fn counts(&self) -> &BTreeMap<usize, Vec<usize>> {
        &self.counts
    }

    /// The experts that got no token, each with its layer.
    pub(super) fn idle(&self) -> Vec<(usize, usize)> {
        idle(self.counts.iter().map(|(layer, counts)| (*layer, counts.as_slice())))
    }
}

/// The experts whose count is zero, each with its layer.
pub(super) fn idle<'a>(layers: impl Iterator<Item = (usize, &'a [usize])>) -> Vec<(usize, usize)> {
    let of = |(layer, counts): (usize, &[usize])| -> Vec<(usize, usize)> {
        let without = counts.iter().enumerate().filter(|(_, count)| **count == 0);
        without.map(|(expert, _)| (layer, expert)).collect()
    };
    layers.flat_map(of).collect()
}

/// Names experts, with their layers, that routers send none of `text` to; `so` says what follows and what to do.
pub(super) fn idle_warning(idle: &[(usize, usize)], text: &str, so: &str) -> Option<String> {
    const NAMED: usize = 6;

    if idle.is_empty() {
        return None;
    }
    let named = idle.iter().take(NAMED).map(|(layer, expert)| format!("expert {expert} of layer {layer}"));
    let named = named.collect::<Vec<_>>().join(", ");
    let more = match idle.len().checked_sub(NAMED) {
        None | Some(0) => String::new(),
        Some(more) => format!(" and {more} more"),
    };
    Some(format!("{named}{more}: the router sends 0 of {text} there, {so}"))
}
