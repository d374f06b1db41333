//! Rows over threads. Chunks have a fixed size and partial sums are added in their order, so results do not depend on
//! the number of threads.

use std::cell::Cell;
use std::mem::MaybeUninit;

use rayon::prelude::*;

use super::multiply::Target;

/// Rows per task: enough work to be worth a task, and the unit in which reductions are split.
const ROWS: usize = 64;

thread_local! {
    static ALONE: Cell<bool> = const { Cell::new(false) };
}

/// Lets the calling thread compute by itself what `f` would share with others: for a task that is one of many, whose values
/// then stay in this core's cache. What it takes over while it waits for something else goes the same way: that changes the time
/// alone.
pub(crate) fn alone<R>(f: impl FnOnce() -> R) -> R {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            ALONE.set(self.0);
        }
    }
    let _restore = Restore(ALONE.replace(true));
    f()
}

/// Whether this thread computes [`alone`].
pub(crate) fn is_alone() -> bool {
    ALONE.get()
}

/// Whether there is anything to do for rows of `width` values. Panics where the rows are not whole: those who fill
/// a buffer rely on every value being in a row.
fn has_rows(values: usize, width: usize) -> bool {
    assert!(values == 0 || values.is_multiple_of(width), "{values} values in rows of {width}");
    values > 0
}

/// Calls `f(index, row)` for every row of `width` values in `out`, on all threads, unless this one computes [`alone`].
pub(crate) fn for_rows<T: Send>(out: &mut [T], width: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    if !has_rows(out.len(), width) {
        return;
    }
    if out.len() <= width * ROWS || is_alone() {
        return out.chunks_mut(width).enumerate().for_each(|(i, row)| f(i, row));
    }
    out.par_chunks_mut(width * ROWS).enumerate().for_each(|(chunk, rows)| {
        for (i, row) in rows.chunks_mut(width).enumerate() {
            f(chunk * ROWS + i, row);
        }
    });
}

/// Asks for the first `count` values, which are read soon and which the processor does not see coming, as rows that lie
/// apart. Where it has no such hint it does nothing.
#[inline(always)]
pub(crate) fn ask_for<T>(values: &[T], count: usize) {
    for line in values[..count.min(values.len())].chunks(64 / size_of::<T>()) {
        ask(line.as_ptr());
    }
}

/// Asks for the line of the cache that holds a place. The place need not exist: it is not read.
#[inline(always)]
pub(crate) fn ask<T>(place: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every machine of this architecture has the hint, which changes nothing but the time.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(place.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = place;
}

/// A vector of `len` values for `write` to fill in, which gets them with any content: large results need not be zeroed first.
pub(crate) fn written<T: Target>(len: usize, write: impl FnOnce(&mut [T])) -> Vec<T> {
    let mut values = Vec::with_capacity(len);
    settle(&mut values.spare_capacity_mut()[..len]);
    // SAFETY: so many values have room, and each holds bits that are settled; any bits are an f32 or a bf16.
    unsafe { values.set_len(len) };
    write(&mut values);
    values
}

/// Gives memory that nobody has written whatever content it happens to have, so that it may be read.
#[cfg(all(any(target_arch = "x86_64", target_arch = "aarch64"), not(any(test, miri))))]
fn settle<T: Target>(memory: &mut [MaybeUninit<T>]) {
    // SAFETY: no instruction is run. The compiler does not look inside, so it has to assume that the assembly has stored
    // values in the memory whose address it was given; the machine itself knows no uninitialised memory.
    unsafe {
        std::arch::asm!("/* {0} */", in(reg) memory.as_mut_ptr(), options(nostack, preserves_flags));
    }
}

/// In tests and under Miri every value is NaN at first, so that one that is never written is found.
#[cfg(not(all(any(target_arch = "x86_64", target_arch = "aarch64"), not(any(test, miri)))))]
fn settle<T: Target>(memory: &mut [MaybeUninit<T>]) {
    memory.fill(MaybeUninit::new(T::narrow(f32::NAN)));
}

/// As [`for_rows`] for two buffers of the same shape.
pub(crate) fn for_row_pairs<T: Send>(
    first: &mut [T],
    second: &mut [T],
    width: usize,
    f: impl Fn(usize, &mut [T], &mut [T]) + Sync,
) {
    assert_eq!(first.len(), second.len(), "two buffers of one shape");
    if !has_rows(first.len(), width) {
        return;
    }
    let pairs = first.par_chunks_mut(width * ROWS).zip(second.par_chunks_mut(width * ROWS));
    pairs.enumerate().for_each(|(chunk, (first, second))| {
        for (i, (a, b)) in first.chunks_mut(width).zip(second.chunks_mut(width)).enumerate() {
            f(chunk * ROWS + i, a, b);
        }
    });
}

/// As [`for_rows`] for three buffers of the same shape.
pub(crate) fn for_row_triples<T: Send>(
    [first, second, third]: [&mut [T]; 3],
    width: usize,
    f: impl Fn(usize, [&mut [T]; 3]) + Sync,
) {
    assert!(first.len() == second.len() && second.len() == third.len(), "three buffers of one shape");
    if !has_rows(first.len(), width) {
        return;
    }
    let chunk = width * ROWS;
    let of_chunk = |chunk: usize, [first, second, third]: [&mut [T]; 3]| {
        let rows = first.chunks_mut(width).zip(second.chunks_mut(width)).zip(third.chunks_mut(width));
        for (i, ((a, b), c)) in rows.enumerate() {
            f(chunk * ROWS + i, [a, b, c]);
        }
    };
    if is_alone() {
        return of_chunk(0, [first, second, third]);
    }
    let triples =
        first.par_chunks_mut(chunk).zip(second.par_chunks_mut(chunk)).zip(third.par_chunks_mut(chunk));
    triples.enumerate().for_each(|(chunk, ((a, b), c))| of_chunk(chunk, [a, b, c]));
}

/// The sum over rows of what `f(index, sum)` adds into `sum` (`width` values): chunk by chunk, then in order.
pub(crate) fn chunked_sum(rows: usize, width: usize, f: impl Fn(usize, &mut [f32]) + Sync) -> Vec<f32> {
    let partial: Vec<Vec<f32>> = (0..rows.div_ceil(ROWS))
        .into_par_iter()
        .map(|chunk| {
            let mut sum = vec![0.0; width];
            for row in chunk * ROWS..rows.min((chunk + 1) * ROWS) {
                f(row, &mut sum);
            }
            sum
        })
        .collect();
    let mut total = vec![0.0; width];
    for sum in partial {
        for (all, part) in total.iter_mut().zip(sum) {
            *all += part;
        }
    }
    total
}

/// A buffer that several tasks write to, each its own part.
#[derive(Clone, Copy)]
pub(crate) struct Disjoint<T> {
    start: *mut T,
    len: usize,
}

// SAFETY: a `Disjoint` hands out parts only through `part`, whose caller promises that no two overlap.
unsafe impl<T: Send> Send for Disjoint<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Disjoint<T> {}

impl<T> Disjoint<T> {
    pub(crate) fn new(values: &mut [T]) -> Self {
        Self { start: values.as_mut_ptr(), len: values.len() }
    }

    /// `len` values from `start` on.
    ///
    /// # Safety
    /// The buffer is still alive, and no other part in use at the same time overlaps this one.
    #[expect(clippy::mut_from_ref, reason = "the caller promises that parts do not overlap")]
    pub(crate) unsafe fn part(&self, start: usize, len: usize) -> &mut [T] {
        // Without a sum, which could wrap.
        assert!(
            start <= self.len && len <= self.len - start,
            "part {start}+{len} of a buffer of {}",
            self.len
        );
        // SAFETY: in bounds by the assertion; alive and not overlapping by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }

    /// Where value `index` lies; writing there is for who might have it as a [`part`](Self::part).
    pub(crate) fn address(&self, index: usize) -> *mut T {
        assert!(index < self.len, "value {index} of a buffer of {}", self.len);
        self.start.wrapping_add(index)
    }
}

#[cfg(test)]
mod tests {
    use std::panic::catch_unwind;

    use super::*;

    #[test]
    fn a_part_outside_of_its_buffer_is_refused_where_a_sum_would_wrap() {
        let mut values = [1.0f32; 8];
        let all = Disjoint::new(&mut values);
        // SAFETY: no other part is in use.
        let part = |start, len| unsafe { all.part(start, len).len() };
        assert_eq!([part(0, 8), part(8, 0), part(3, 5)], [8, 0, 5]);
        for (start, len) in [(0, 9), (9, 0), (usize::MAX, 2), (8, usize::MAX - 7), (4, usize::MAX - 3)] {
            // SAFETY: as above.
            let refused = catch_unwind(|| unsafe { Disjoint { ..all }.part(start, len).len() });
            assert!(refused.is_err(), "{start}+{len}");
        }
    }

    #[test]
    fn every_value_that_a_row_covers_is_written_and_others_show() {
        let whole: Vec<f32> = written(6, |values| for_rows(values, 3, |row, values| values.fill(row as f32)));
        assert_eq!(whole, [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]);
        let holed: Vec<half::bf16> = written(3, |values| values[1] = half::bf16::ONE);
        assert!(holed[0].is_nan() && holed[1] == half::bf16::ONE && holed[2].is_nan());
    }

    #[test]
    fn rows_that_are_not_whole_are_refused() {
        for (len, width) in [(7, 3), (2, 0)] {
            let refused = catch_unwind(|| for_rows(&mut vec![0f32; len], width, |_, _| ()));
            assert!(refused.is_err(), "{len} values in rows of {width}");
        }
        for_rows(&mut [0f32; 0], 0, |_, _| panic!("there is no row"));
    }
}
