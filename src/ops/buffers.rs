//! An allocator for the large buffers of training: a step allocates and frees the same sizes again and again, and the
//! system's fresh pages cost more than the arithmetic in them. Buffers from 64 KiB on lie on huge pages and are kept when
//! they are freed, for the next one of their size; everything smaller goes to the allocator inside.
//!
//! ```
//! use std::alloc::System;
//!
//! use peft::ops::KeepBuffers;
//!
//! #[global_allocator]
//! static ALLOCATOR: KeepBuffers<System> = KeepBuffers::new(System);
//! ```
//!
//! Memory is taken from the system in large pieces, of which only touched pages count, and never given back: what is free
//! lies in ranges that join when neighbours are freed, and a buffer takes the first range that holds it. The pieces follow
//! one another in addresses that are reserved once, so that a range at the end grows into the next.

use std::alloc::{GlobalAlloc, Layout};
use std::sync::{Mutex, PoisonError};

#[cfg_attr(target_os = "linux", path = "buffers/linux.rs")]
#[cfg_attr(not(target_os = "linux"), path = "buffers/elsewhere.rs")]
mod pages;

/// Buffers from this size on are kept. Smaller ones are few, or come and go too often for one lock.
const LARGE: usize = 64 << 10;
/// Sizes are rounded up to a page.
const GRAIN: usize = 4 << 10;
/// A huge page: what pieces are aligned to.
const PAGE: usize = 2 << 20;
/// The system is asked for at least this many bytes at once.
const PIECE: usize = 256 << 20;
/// Piece size when address space is limited; a larger piece would take addresses that other buffers need.
const SMALL_PIECE: usize = 16 << 20;
/// Free ranges that are remembered at most; more are given back.
const SLOTS: usize = 2048;

/// Keeps freed large buffers; what is smaller goes to `A`.
#[derive(Debug)]
pub struct KeepBuffers<A> {
    small: A,
    kept: Mutex<Kept>,
    /// Called before an allocation fails.
    hook: Option<fn(Layout)>,
}

/// Lists the free ranges in a plain array, because the allocator cannot allocate.
#[derive(Debug)]
struct Kept {
    /// Address and size, in the order of addresses; no two touch.
    ranges: [(usize, usize); SLOTS],
    len: usize,
    /// This part of the newest piece has never been given out, so it is all zero.
    fresh: (usize, usize),
    /// Addresses behind `fresh` that are not used yet.
    reserved: (usize, usize),
    /// Bytes that are given out now, and the most that were so far.
    in_use: usize,
    most_in_use: usize,
}

impl<A> KeepBuffers<A> {
    /// Creates an allocator that leaves everything below 64 KiB to `small`.
    pub const fn new(small: A) -> Self {
        Self { small, kept: Mutex::new(Kept::EMPTY), hook: None }
    }

    /// Creates an allocator like [`Self::new`] that calls `hook` with the requested layout before an allocation fails.
    /// Programs that allocate through `Vec` or `Box` abort then, so the hook can say why. It cannot allocate.
    pub const fn with_hook(small: A, hook: fn(Layout)) -> Self {
        Self { small, kept: Mutex::new(Kept::EMPTY), hook: Some(hook) }
    }

    /// The most bytes that large buffers had together at any time, without what lay free between them.
    pub fn most_in_use(&self) -> u64 {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).most_in_use as u64
    }
}

impl Kept {
    const EMPTY: Self =
        Self { ranges: [(0, 0); SLOTS], len: 0, fresh: (0, 0), reserved: (0, 0), in_use: 0, most_in_use: 0 };

    /// A buffer of `size` bytes, and whether it is fresh; null when the system has no more. It is cut off the first range
    /// that holds it, so that what is free gathers at the end, where it can grow.
    fn take(&mut self, size: usize) -> (*mut u8, bool) {
        let fits = |&range: &usize| self.ranges[range].1 >= size;
        if let Some(first) = (0..self.len).find(fits) {
            let (address, found) = self.ranges[first];
            if found == size {
                self.remove(first);
            } else {
                self.ranges[first] = (address + size, found - size);
            }
            return (address as *mut u8, false);
        }
        let last = (0..self.len).find(|&range| self.ranges[range].0 + self.ranges[range].1 == self.fresh.0);
        let used = last.map_or(0, |last| self.ranges[last].1);
        if self.fresh.1 < size - used && !self.extend(size - used) {
            return self.take_of_new_piece(size);
        }
        if let Some(last) = last {
            self.remove(last);
        }
        let address = self.fresh.0 - used;
        self.fresh = (address + size, self.fresh.1 - (size - used));
        (address as *mut u8, used == 0)
    }

    fn take_of_new_piece(&mut self, size: usize) -> (*mut u8, bool) {
        // A limit on addresses is what refuses to reserve them.
        let least = if self.reserved.0 == 0 { SMALL_PIECE } else { PIECE };
        let mut piece = size.next_multiple_of(PAGE).max(least);
        let mut address = pages::map(piece) as usize;
        if address == 0 {
            // There may be room for this buffer and no more.
            piece = size.next_multiple_of(PAGE);
            address = pages::map(piece) as usize;
        }
        if address == 0 {
            return (std::ptr::null_mut(), false);
        }
        let (rest, left) = std::mem::replace(&mut self.fresh, (address + size, piece - size));
        self.put(rest, left);
        (address as *mut u8, true)
    }

    /// Makes `fresh` hold `size` bytes, if the reserved addresses lie behind it.
    fn extend(&mut self, size: usize) -> bool {
        if self.fresh.0 == 0 {
            self.reserved = pages::reserve();
            self.fresh = (self.reserved.0, 0);
        }
        let more = (size - self.fresh.1).next_multiple_of(PAGE).max(PIECE);
        let (address, left) = self.reserved;
        if address == 0
            || self.fresh.0 + self.fresh.1 != address
            || left < more
            || !pages::open(address, more)
        {
            return false;
        }
        self.fresh.1 += more;
        self.reserved = (address + more, left - more);
        true
    }

    fn remove(&mut self, range: usize) {
        self.ranges.copy_within(range + 1..self.len, range);
        self.len -= 1;
    }

    fn put(&mut self, address: usize, size: usize) {
        if size == 0 {
            return;
        }
        let at = self.ranges[..self.len].partition_point(|range| range.0 < address);
        let before = at > 0 && self.ranges[at - 1].0 + self.ranges[at - 1].1 == address;
        let behind = at < self.len && address + size == self.ranges[at].0;
        match (before, behind) {
            (true, true) => {
                self.ranges[at - 1].1 += size + self.ranges[at].1;
                self.remove(at);
            }
            (true, false) => self.ranges[at - 1].1 += size,
            (false, true) => self.ranges[at] = (address, size + self.ranges[at].1),
            (false, false) if self.len == SLOTS => pages::unmap(address, size),
            (false, false) => {
                self.ranges.copy_within(at..self.len, at + 1);
                self.ranges[at] = (address, size);
                self.len += 1;
            }
        }
    }
}

fn is_large(layout: Layout) -> bool {
    cfg!(target_os = "linux") && layout.size() >= LARGE && layout.align() <= GRAIN
}

fn rounded(size: usize) -> usize {
    size.next_multiple_of(GRAIN)
}

impl<A> KeepBuffers<A> {
    fn large(&self, size: usize) -> (*mut u8, bool) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let (address, fresh) = kept.take(size);
        if !address.is_null() {
            kept.in_use += size;
            kept.most_in_use = kept.most_in_use.max(kept.in_use);
        }
        (address, fresh)
    }

    /// Calls the hook where `address` is null. The lock of the buffers is free here.
    fn or_hook(&self, address: *mut u8, layout: Layout) -> *mut u8 {
        if let (true, Some(hook)) = (address.is_null(), self.hook) {
            hook(layout);
        }
        address
    }
}

// SAFETY: small layouts are handed to `A` as they are. A large one gets a range that is cut
// off, under the lock, from what was freed or is fresh; it begins at a multiple of 4 KiB, is at least as long as asked for, and
// has one owner.
unsafe impl<A: GlobalAlloc> GlobalAlloc for KeepBuffers<A> {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if is_large(layout) {
            return self.or_hook(self.large(rounded(layout.size())).0, layout);
        }
        // SAFETY: the caller's promises are those of `A`.
        self.or_hook(unsafe { self.small.alloc(layout) }, layout)
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if is_large(layout) {
            let (address, fresh) = self.large(rounded(layout.size()));
            if !fresh && !address.is_null() {
                // SAFETY: the buffer is that long and has no other owner.
                unsafe { address.write_bytes(0, layout.size()) };
            }
            return self.or_hook(address, layout);
        }
        // SAFETY: as in `alloc`.
        self.or_hook(unsafe { self.small.alloc_zeroed(layout) }, layout)
    }

    unsafe fn dealloc(&self, address: *mut u8, layout: Layout) {
        if is_large(layout) {
            let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            kept.in_use -= rounded(layout.size());
            kept.put(address as usize, rounded(layout.size()));
            return;
        }
        // SAFETY: a small layout was allocated by `A`.
        unsafe { self.small.dealloc(address, layout) }
    }

    unsafe fn realloc(&self, address: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: the caller promises that `size`, rounded up to the alignment, does not overflow.
        let new = unsafe { Layout::from_size_align_unchecked(size, layout.align()) };
        if !is_large(layout) && !is_large(new) {
            // SAFETY: both sizes belong to `A`.
            return self.or_hook(unsafe { self.small.realloc(address, layout, size) }, new);
        }
        if is_large(layout) && is_large(new) && rounded(layout.size()) == rounded(size) {
            return address;
        }
        // SAFETY: old and new are distinct, and each is as long as its layout says.
        unsafe {
            let moved = self.alloc(new);
            if !moved.is_null() {
                moved.copy_from_nonoverlapping(address, layout.size().min(size));
                self.dealloc(address, layout);
            }
            moved
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use std::alloc::System;

    use super::*;

    fn layout(size: usize) -> Layout {
        Layout::from_size_align(size, 64).expect("64 is a power of two")
    }

    #[test]
    fn a_freed_buffer_is_given_out_again_and_zeroed_when_asked() {
        let allocator = KeepBuffers::new(System);
        let size = 5 << 20;
        // SAFETY: every pointer is used within its layout and freed once.
        unsafe {
            let first = allocator.alloc(layout(size));
            assert_eq!(first as usize % GRAIN, 0);
            first.write_bytes(7, size);
            allocator.dealloc(first, layout(size));
            let second = allocator.alloc_zeroed(layout(size - 100));
            assert_eq!(first, second);
            assert!(std::slice::from_raw_parts(second, size - 100).iter().all(|byte| *byte == 0));
            allocator.dealloc(second, layout(size - 100));
        }
    }

    #[test]
    fn two_owners_never_share_and_growing_keeps_what_was_written() {
        let allocator = KeepBuffers::new(System);
        // SAFETY: as above.
        unsafe {
            let (one, two) = (allocator.alloc(layout(2 << 20)), allocator.alloc(layout(2 << 20)));
            assert_ne!(one, two);
            one.write_bytes(1, 2 << 20);
            let grown = allocator.realloc(one, layout(2 << 20), 9 << 20);
            assert!(std::slice::from_raw_parts(grown, 2 << 20).iter().all(|byte| *byte == 1));
            let small = allocator.realloc(grown, layout(9 << 20), 100);
            assert!(std::slice::from_raw_parts(small, 100).iter().all(|byte| *byte == 1));
            allocator.dealloc(small, layout(100));
            allocator.dealloc(two, layout(2 << 20));
        }
    }

    #[test]
    fn freed_neighbours_join_and_hold_a_larger_buffer() {
        let allocator = KeepBuffers::new(System);
        let mib = |count: usize| layout(count << 20);
        // SAFETY: as above.
        unsafe {
            let buffers = [0, 1, 2, 3].map(|_| allocator.alloc(mib(4)));
            for freed in [2, 0, 1] {
                allocator.dealloc(buffers[freed], mib(4));
            }
            let larger = allocator.alloc(mib(12));
            assert_eq!(larger, buffers[0]);
            let smaller = allocator.alloc(mib(1));
            allocator.dealloc(larger, mib(12));
            assert_eq!(allocator.alloc(mib(2)), larger);
            allocator.dealloc(smaller, mib(1));
            assert_eq!(allocator.kept.lock().unwrap().len, 2);
        }
    }

    #[test]
    fn what_cannot_be_had_is_null_told_to_the_hook_and_not_counted() {
        use std::sync::atomic::{AtomicUsize, Ordering};

        static TOLD: AtomicUsize = AtomicUsize::new(0);
        struct Nothing;
        // SAFETY: it never gives anything.
        unsafe impl GlobalAlloc for Nothing {
            unsafe fn alloc(&self, _: Layout) -> *mut u8 {
                std::ptr::null_mut()
            }
            unsafe fn dealloc(&self, _: *mut u8, _: Layout) {}
        }
        let allocator =
            KeepBuffers::with_hook(Nothing, |layout| _ = TOLD.fetch_add(layout.size(), Ordering::Relaxed));
        let told = || TOLD.swap(0, Ordering::Relaxed);
        // SAFETY: what is given is used within its layout and freed once.
        unsafe {
            for size in [100, 1 << 60] {
                assert!(allocator.alloc(layout(size)).is_null());
                assert_eq!(told(), size);
                assert!(allocator.alloc_zeroed(layout(size)).is_null());
                assert_eq!(told(), size);
            }
            assert_eq!(allocator.most_in_use(), 0);
            let buffer = allocator.alloc(layout(1 << 20));
            buffer.write(7);
            for size in [100, 1 << 60] {
                assert!(allocator.realloc(buffer, layout(1 << 20), size).is_null());
                assert_eq!(told(), size);
            }
            assert_eq!((buffer.read(), told()), (7, 0));
            allocator.dealloc(buffer, layout(1 << 20));
            assert_eq!(allocator.kept.lock().unwrap().in_use, 0);
        }
    }

    #[test]
    fn many_buffers_of_all_sizes_never_overlap() {
        let allocator = KeepBuffers::new(System);
        let mut live: Vec<(*mut u8, usize, u8)> = Vec::new();
        let mut state = 7u64;
        for round in 0..3000u32 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let size = LARGE + (state >> 40) as usize % (300 << 10);
            // SAFETY: as above.
            unsafe {
                if live.len() > 40 {
                    let (address, size, mark) = live.swap_remove((state >> 33) as usize % live.len());
                    let bytes = std::slice::from_raw_parts(address, size);
                    assert!(bytes.iter().all(|byte| *byte == mark));
                    allocator.dealloc(address, layout(size));
                }
                let address = allocator.alloc(layout(size));
                address.write_bytes(round as u8, size);
                live.push((address, size, round as u8));
            }
        }
    }
}
