//! Pages from Linux.

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

/// Addresses that nothing else gets, as many as the machine has memory, aligned to `PAGE`; none where the system refuses.
pub(super) fn reserve() -> (usize, usize) {
    // SAFETY: asks for two numbers.
    let (pages, size) = unsafe { (libc::sysconf(libc::_SC_PHYS_PAGES), libc::sysconf(libc::_SC_PAGESIZE)) };
    let memory = usize::try_from(pages).unwrap_or(0).saturating_mul(usize::try_from(size).unwrap_or(0));
    let length = memory.next_multiple_of(PAGE);
    // SAFETY: a new mapping that cannot be read or written touches nothing that exists.
    let start = unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        libc::mmap(std::ptr::null_mut(), length + PAGE, libc::PROT_NONE, flags, -1, 0)
    };
    if memory == 0 || start == libc::MAP_FAILED {
        return (0, 0);
    }
    ((start as usize).next_multiple_of(PAGE), length)
}

/// Makes reserved addresses usable: zeros, on huge pages where the system has them.
pub(super) fn open(address: usize, size: usize) -> bool {
    // SAFETY: the range is reserved and nobody uses it. A refused advice leaves ordinary pages.
    unsafe {
        let start = address as *mut libc::c_void;
        let opened = libc::mprotect(start, size, libc::PROT_READ | libc::PROT_WRITE) == 0;
        if opened {
            libc::madvise(start, size, libc::MADV_HUGEPAGE);
        }
        opened
    }
}

/// Gives back a range that `map` gave and nobody uses.
pub(super) fn unmap(address: usize, size: usize) {
    if size > 0 {
        // SAFETY: the callers own the range. A failure leaves it mapped, which costs memory and nothing else.
        unsafe { libc::munmap(address as *mut libc::c_void, size) };
    }
}
