//! Memory over the course of a step: see [`super`].

use super::Held;

/// What is held now, and when it was most.
#[derive(Default)]
pub(super) struct Ledger {
    pub(super) now: Held,
    pub(super) most: Held,
    /// Whether all gradients are there already.
    pub(super) several: bool,
}

impl Ledger {
    /// Changes what is held, and looks whether it is more than ever.
    pub(super) fn now(&mut self, change: impl FnOnce(&mut Held)) {
        change(&mut self.now);
        if self.now.total() > self.most.total() {
            self.most = self.now;
        }
    }

    /// Gradients of so many bytes, of which the largest has `largest`, arrive: added to what is there, they and the sum
    /// are new.
    pub(super) fn gradients(&mut self, bytes: u64, largest: u64, is_there: bool) {
        if self.several || is_there {
            self.now(|held| held.gradients += 2 * largest);
            self.now.gradients -= 2 * largest;
        } else {
            self.now(|held| held.gradients += bytes);
        }
    }
}
