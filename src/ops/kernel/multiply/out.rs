//! Where a product goes, and who computes it.

use std::marker::PhantomData;
use std::ops::Range;

use rayon::prelude::*;

use super::super::rows::{Disjoint, is_alone};

/// The place of a result: its first value, and how far rows begin from each other.
pub(crate) struct Out<'a, T> {
    values: Disjoint<T>,
    stride: usize,
    borrowed: PhantomData<&'a mut [T]>,
}

impl<'a, T> Out<'a, T> {
    /// The first row begins at the first of `values`.
    pub(crate) fn rows(values: &'a mut [T], stride: usize) -> Self {
        Self { values: Disjoint::new(values), stride, borrowed: PhantomData }
    }

    /// Panics unless a result of `m` by `n` has room. After it `row * stride + column` cannot wrap for any of its values.
    pub(super) fn check(&self, m: usize, n: usize) {
        if m > 0 && n > 0 {
            assert!(m == 1 || n <= self.stride, "rows of {n} values, {} apart", self.stride);
            assert!(self.stride <= isize::MAX as usize / size_of::<T>(), "rows {} apart", self.stride);
            // Checked, because a product that wraps would name a value inside the buffer.
            let last = (m - 1).checked_mul(self.stride).and_then(|start| start.checked_add(n - 1));
            let last = last.unwrap_or_else(|| panic!("a {m}x{n} result with rows {} apart", self.stride));
            self.values.address(last);
        }
    }

    /// Part of a row.
    ///
    /// # Safety
    /// The result has this part, as [`check`](Self::check) has found, and nobody else uses it.
    #[expect(clippy::mut_from_ref, reason = "the caller promises that parts do not overlap")]
    pub(super) unsafe fn part(&self, row: usize, columns: Range<usize>) -> &mut [T] {
        // SAFETY: the values are borrowed for the result, and the caller promises that they are in use once. `Disjoint::part`
        // holds what is asked for to the buffer.
        unsafe { self.values.part(row * self.stride + columns.start, columns.len()) }
    }

    /// Where a value of the result lies; panics outside the buffer.
    pub(super) fn address(&self, row: usize, column: usize) -> *mut T {
        self.values.address(row * self.stride + column)
    }

    /// Distance of two rows.
    pub(super) fn stride(&self) -> usize {
        self.stride
    }
}

/// The threads that compute a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Crew {
    /// All of rayon's, unless the calling one computes [`alone`](super::super::rows::alone).
    All,
    /// The calling one, which never waits for others.
    Caller,
}

impl Crew {
    pub(super) fn size(self) -> usize {
        match self {
            Self::All if is_alone() => 1,
            Self::All => rayon::current_num_threads(),
            Self::Caller => 1,
        }
    }

    /// Does tasks `0..count`.
    pub(super) fn share(self, count: usize, task: impl Fn(usize) + Sync + Send) {
        // One task is not worth waking anybody.
        if self.size() == 1 || count <= 1 {
            (0..count).for_each(task);
        } else {
            (0..count).into_par_iter().for_each(task);
        }
    }
}
