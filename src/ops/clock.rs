//! Where a step's time goes: seconds spent in each kind of operation, for benchmarks.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// A kind of operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Products with weights, adapters fused in: forward and input gradients.
    Linear,
    /// The narrow products of adapters, and gradients of weights.
    LowRank,
    /// Scores, weights and their backward.
    Attention,
    /// RMSNorm, residual sums included.
    Norm,
    /// Gated units.
    Glu,
    /// Rotary position embedding.
    Rotary,
    /// Dropout of adapters' inputs.
    Dropout,
    /// Vocabulary projection, loss and their backward.
    CrossEntropy,
    /// Rows gathered by expert and put together again.
    Experts,
}

impl Op {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Linear,
        Self::LowRank,
        Self::Attention,
        Self::Norm,
        Self::Glu,
        Self::Rotary,
        Self::Dropout,
        Self::CrossEntropy,
        Self::Experts,
    ];

    /// Seconds spent in it by all threads that began one, since the process began.
    #[must_use]
    pub fn seconds(self) -> f64 {
        NANOSECONDS[self as usize].load(Ordering::Relaxed) as f64 * 1e-9
    }

    /// Counts the time until the value is dropped.
    pub(super) fn begin(self) -> Running {
        Running { op: self, start: Instant::now() }
    }
}

static NANOSECONDS: [AtomicU64; Op::ALL.len()] = [const { AtomicU64::new(0) }; Op::ALL.len()];

pub(super) struct Running {
    op: Op,
    start: Instant,
}

impl Drop for Running {
    fn drop(&mut self) {
        let spent = u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        NANOSECONDS[self.op as usize].fetch_add(spent, Ordering::Relaxed);
    }
}
