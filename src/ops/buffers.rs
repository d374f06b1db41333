//! An allocator for the large buffers of training: a step allocates and frees the same sizes again and again, and the
//! system's fresh pages cost more than the arithmetic in them. Buffers from 1 MiB on lie on huge pages and are kept when
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
//! A new mapping is made only after as many bytes of kept buffers were given back as it needs, so that what is kept does
//! not raise the peak by more than the sizes differ.

use std::alloc::{GlobalAlloc, Layout};
use std::sync::{Mutex, PoisonError};

/// Buffers from this size on are kept.
const LARGE: usize = 1 << 20;
/// A huge page: what large buffers are aligned to and rounded up to.
const PAGE: usize = 2 << 20;
/// Freed buffers that are remembered at most; more are given back.
const SLOTS: usize = 512;

/// Keeps freed large buffers; what is smaller goes to `A`.
#[derive(Debug)]
pub struct KeepBuffers<A> {
    small: A,
    kept: Mutex<Kept>,
}

/// Freed buffers, oldest first: address and rounded size. A plain array, for the allocator cannot allocate.
#[derive(Debug)]
struct Kept {
    buffers: [(usize, usize); SLOTS],
    len: usize,
}

impl<A> KeepBuffers<A> {
    /// With `small` for everything below 1 MiB.
    pub const fn new(small: A) -> Self {
        Self { small, kept: Mutex::new(Kept { buffers: [(0, 0); SLOTS], len: 0 }) }
    }
}

impl Kept {
    /// The kept buffer that fits `size` best and wastes at most a quarter of it.
    fn take(&mut self, size: usize) -> Option<(usize, usize)> {
        let fits = |kept: usize| kept >= size && kept - size <= size / 4;
        let best = (0..self.len).filter(|&i| fits(self.buffers[i].1)).min_by_key(|&i| self.buffers[i].1)?;
        Some(self.remove(best))
    }

    fn remove(&mut self, index: usize) -> (usize, usize) {
        let buffer = self.buffers[index];
        self.buffers.copy_within(index + 1..self.len, index);
        self.len -= 1;
        buffer
    }

    fn put(&mut self, buffer: (usize, usize)) {
        if self.len == SLOTS {
            let (address, size) = self.remove(0);
            pages::unmap(address, size);
        }
        self.buffers[self.len] = buffer;
        self.len += 1;
    }

    /// Gives back the oldest buffers until `size` bytes are free again, or none is left.
    fn give_back(&mut self, size: usize) {
        let mut given = 0;
        while given < size && self.len > 0 {
            let (address, bytes) = self.remove(0);
            pages::unmap(address, bytes);
            given += bytes;
        }
    }
}

fn is_large(layout: Layout) -> bool {
    cfg!(target_os = "linux") && layout.size() >= LARGE && layout.align() <= PAGE
}

fn rounded(size: usize) -> usize {
    size.next_multiple_of(PAGE)
}

impl<A> KeepBuffers<A> {
    /// A buffer of at least `size` bytes, and whether it is fresh and so all zero.
    fn large(&self, size: usize) -> (*mut u8, bool) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((address, found)) = kept.take(size) {
            // Deallocation knows the size that was asked for only: what is too much is cut off.
            if found > size {
                pages::unmap(address + size, found - size);
            }
            return (address as *mut u8, false);
        }
        kept.give_back(size);
        drop(kept);
        (pages::map(size), true)
    }
}

// SAFETY: small layouts are handed to `A` as they are. A large one gets a mapping of its own, or one that was freed and
// is taken off the list under the lock; both are aligned to 2 MiB, at least as long as asked for, and given to one owner.
unsafe impl<A: GlobalAlloc> GlobalAlloc for KeepBuffers<A> {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if is_large(layout) {
            return self.large(rounded(layout.size())).0;
        }
        // SAFETY: the caller's promises are those of `A`.
        unsafe { self.small.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if is_large(layout) {
            let (address, fresh) = self.large(rounded(layout.size()));
            if !fresh && !address.is_null() {
                // SAFETY: the buffer is that long and has no other owner.
                unsafe { address.write_bytes(0, layout.size()) };
            }
            return address;
        }
        // SAFETY: as in `alloc`.
        unsafe { self.small.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, address: *mut u8, layout: Layout) {
        if is_large(layout) {
            let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            kept.put((address as usize, rounded(layout.size())));
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
            return unsafe { self.small.realloc(address, layout, size) };
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

#[cfg(target_os = "linux")]
mod pages {
    use super::PAGE;

    /// `size` bytes (a multiple of `PAGE`) of zeros, aligned to `PAGE`, on huge pages where the system has them.
    pub(super) fn map(size: usize) -> *mut u8 {
        let longer = size + PAGE;
        // SAFETY: an anonymous private mapping touches nothing that exists.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                longer,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return std::ptr::null_mut();
        }
        let start = start as usize;
        let aligned = start.next_multiple_of(PAGE);
        unmap(start, aligned - start);
        unmap(aligned + size, start + longer - aligned - size);
        // SAFETY: the range was just mapped. A refusal leaves ordinary pages, which are as good but slower.
        unsafe { libc::madvise(aligned as *mut libc::c_void, size, libc::MADV_HUGEPAGE) };
        aligned as *mut u8
    }

    /// Gives back a range that `map` gave and nobody uses.
    pub(super) fn unmap(address: usize, size: usize) {
        if size > 0 {
            // SAFETY: the callers own the range. A failure leaves it mapped, which costs memory and nothing else.
            unsafe { libc::munmap(address as *mut libc::c_void, size) };
        }
    }
}

#[cfg(not(target_os = "linux"))]
mod pages {
    pub(super) fn map(_: usize) -> *mut u8 {
        std::ptr::null_mut()
    }

    pub(super) fn unmap(_: usize, _: usize) {}
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
            assert_eq!(first as usize % PAGE, 0);
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
    fn a_new_size_gives_back_what_is_kept() {
        let allocator = KeepBuffers::new(System);
        // SAFETY: as above.
        unsafe {
            let first = allocator.alloc(layout(4 << 20));
            allocator.dealloc(first, layout(4 << 20));
            assert_eq!(allocator.kept.lock().unwrap().len, 1);
            let larger = allocator.alloc(layout(64 << 20));
            assert_eq!(allocator.kept.lock().unwrap().len, 0);
            allocator.dealloc(larger, layout(64 << 20));
        }
    }
}
