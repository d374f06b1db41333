//! What a run keeps and how much it computes at once, chosen for the memory there is.

use std::cmp::Reverse;

use serde::Serialize;

use super::super::figures;
use super::super::prepared::Prepared;
use super::{Components, Moment, Needs, Way};
use crate::error::{Error, Result};
use crate::model::Recompute;
use crate::recipe::{Bytes, MemoryBudget, Plan, RecomputeChoice, Trained};
use crate::train;

/// Tokens that are computed at once where memory allows: more take more memory and are no faster.
const COMFORTABLE: usize = 1024;
/// Tokens below which a piece is slower than recomputation makes it.
const SMALL: usize = 256;

/// The memory of a run, and what was chosen for it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Memory {
    /// Bytes at the peak.
    pub peak_bytes: u64,
    /// The moment of the peak.
    pub moment: Moment,
    /// What the peak consists of.
    pub components: Components,
    /// Bytes that the peak may have.
    pub budget_bytes: u64,
    /// Whether the recipe says that budget; otherwise it is nine tenths of what the machine has free.
    pub budget_is_asked_for: bool,
    /// What is recomputed in the backward: `none` or `block`.
    pub recompute: Recompute,
    /// The most tokens that are computed at once.
    pub piece_tokens: usize,
    /// Whether the largest batch is computed in several pieces.
    pub several_pieces: bool,
    /// Bytes at the peak with nothing recomputed and as many tokens at once as are of use.
    pub unconstrained_bytes: u64,
}

impl Memory {
    /// For a run that begins now.
    #[must_use]
    pub fn of(plan: &Plan, prepared: &Prepared) -> Self {
        let needs = Needs::of(plan, prepared);
        let budget = match plan.train.memory_budget {
            MemoryBudget::Limit(Bytes(bytes)) => bytes,
            // A tenth stays for what else the machine does.
            MemoryBudget::Free => train::available_bytes() / 10 * 9,
        };
        let asked_for = plan.train.memory_budget != MemoryBudget::Free;
        Self::choose(&needs, plan.train.recompute, budget, asked_for)
    }

    /// The fastest way that fits into `budget`, or the smallest when none does.
    #[must_use]
    pub fn choose(needs: &Needs, choice: RecomputeChoice, budget: u64, asked_for: bool) -> Self {
        let ways = ways(choice, needs.largest_batch(), needs.longest());
        let measured: Vec<_> = ways.iter().map(|way| (*way, needs.peak(*way))).collect();
        let total = |(_, (components, _)): &(Way, (Components, Moment))| components.total();
        let fitting = measured.iter().find(|measured| total(measured) <= budget);
        let smallest = || measured.iter().rev().min_by_key(|measured| total(measured));
        let (way, (components, moment)) = fitting.or_else(smallest).copied().unwrap_or_else(|| {
            let way = Way { recompute: Recompute::Block, piece_tokens: needs.longest() };
            (way, needs.peak(way))
        });
        Self {
            peak_bytes: components.total(),
            moment,
            components,
            budget_bytes: budget,
            budget_is_asked_for: asked_for,
            recompute: way.recompute,
            piece_tokens: way.piece_tokens,
            several_pieces: needs.largest_batch() > way.piece_tokens,
            unconstrained_bytes: measured.first().map_or(0, total),
        }
    }

    /// How the run computes.
    #[must_use]
    pub fn way(&self) -> Way {
        Way { recompute: self.recompute, piece_tokens: self.piece_tokens }
    }

    /// Whether it is within the budget.
    #[must_use]
    pub fn fits(&self) -> bool {
        self.peak_bytes <= self.budget_bytes
    }

    /// What was chosen and why, in one line.
    pub(in crate::run) fn line(&self) -> String {
        let bytes = figures::bytes;
        let kept = match self.recompute {
            Recompute::Block => "layers computed again in the backward",
            Recompute::None => "nothing computed twice",
        };
        let mut line = format!(
            "memory: {} of {} {}; {kept}, up to {} tokens at once",
            bytes(self.peak_bytes),
            bytes(self.budget_bytes),
            if self.budget_is_asked_for { "allowed" } else { "free" },
            figures::count(self.piece_tokens as u64)
        );
        if self.unconstrained_bytes > self.budget_bytes {
            line += &format!(" (fastest with {})", bytes(self.unconstrained_bytes));
        }
        line
    }

    /// The components in a table of two columns.
    #[must_use]
    pub fn table(&self) -> String {
        let row = |name: &str, bytes: u64| format!("  {name:<26}{:>10}\n", figures::bytes(bytes));
        let mut table = format!("memory at the peak, {}:\n", self.moment.phrase());
        for (name, bytes) in self.components.named() {
            if bytes > 0 {
                table += &row(name, bytes);
            }
        }
        table + &row("in all", self.peak_bytes)
    }

    /// What to say about a budget that cannot be kept.
    pub(in crate::run) fn excess(&self, plan: &Plan) -> Option<(String, String)> {
        if self.fits() {
            return None;
        }
        let bytes = figures::bytes;
        let (peak, budget) = (bytes(self.peak_bytes), bytes(self.budget_bytes));
        let of = match self.budget_is_asked_for {
            true => format!("`train.memory_budget` allows {budget}"),
            false => format!("the machine has {budget} free"),
        };
        let how = match self.recompute {
            Recompute::Block => "with layers computed again and",
            Recompute::None => "with `train.recompute = \"none\"` and",
        };
        let tokens = figures::count(self.piece_tokens as u64);
        let text = format!("the run takes {peak} {how} {tokens} tokens at once, and {of}");
        Some((text, remedies(self, plan)))
    }

    /// Refuses a budget that was asked for and cannot be kept. Where it is only what the machine has free now, that may
    /// change, and pages of mapped weights are given back when others need them.
    pub(in crate::run) fn refuse_excess(&self, plan: &Plan) -> Result<()> {
        match self.excess(plan).filter(|_| self.budget_is_asked_for) {
            None => Ok(()),
            Some((text, hint)) => Err(Error::request(text).with_hint(hint)),
        }
    }
}

/// What to change, that which saves most first.
fn remedies(memory: &Memory, plan: &Plan) -> String {
    let Components { weights, optimizer, adapter, gradients, activations, layer, .. } = memory.components;
    let (of_piece, of_trained) = (activations + layer, optimizer + adapter + gradients);
    let again = match memory.recompute {
        Recompute::Block => "a smaller `data.max_length`",
        Recompute::None => "`train.recompute = \"block\"`",
    };
    let trained = match plan.trained {
        Trained::Full => "an `[adapter]` instead of `train.full`",
        Trained::Adapter(_) => "a smaller `adapter.rank` or fewer `adapter.targets`",
    };
    let smaller = "a smaller model, one in bf16 or a quantized one";
    let mut remedies = [
        (of_piece, format!("{again} (a piece takes {})", figures::bytes(of_piece))),
        (of_trained, format!("{trained} (what is trained takes {})", figures::bytes(of_trained))),
        (weights, format!("{smaller} (weights take {})", figures::bytes(weights))),
    ];
    remedies.sort_by_key(|(bytes, _)| Reverse(*bytes));
    let large = remedies.into_iter().filter(|(bytes, _)| *bytes > memory.peak_bytes / 20);
    let hint = format!("what helps: {}", large.map(|(_, text)| text).collect::<Vec<_>>().join("; "));
    match memory.budget_is_asked_for {
        false => hint,
        true => {
            let least = memory.peak_bytes.div_ceil(1 << 20);
            format!("allow it with `train.memory_budget = \"{least}MiB\"`; {hint}")
        }
    }
}

/// Every way that `choice` allows, the fastest first: all kept, with smaller and smaller pieces as long as these are fast;
/// then layers computed again; then the smallest pieces, which are single documents.
fn ways(choice: RecomputeChoice, largest_batch: usize, longest: usize) -> Vec<Way> {
    let most = COMFORTABLE.max(longest).min(largest_batch.max(1));
    let least = longest.clamp(1, most);
    let mut sizes: Vec<usize> =
        std::iter::successors(Some(most), |size| Some(size / 2)).take_while(|size| *size > least).collect();
    sizes.push(least);
    let (fast, slow): (Vec<usize>, Vec<usize>) = sizes.iter().partition(|size| **size >= SMALL.min(most));
    let with = |recompute: Recompute, sizes: &[usize]| -> Vec<Way> {
        sizes.iter().map(|&piece_tokens| Way { recompute, piece_tokens }).collect()
    };
    match choice {
        RecomputeChoice::None => with(Recompute::None, &sizes),
        RecomputeChoice::Block => with(Recompute::Block, &sizes),
        RecomputeChoice::Auto => [
            with(Recompute::None, &fast),
            with(Recompute::Block, &fast),
            with(Recompute::None, &slow),
            with(Recompute::Block, &slow),
        ]
        .concat(),
    }
}
