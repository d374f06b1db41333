//! Elsewhere buffers of all sizes go to the allocator inside.

pub(super) fn map(_: usize) -> *mut u8 {
    std::ptr::null_mut()
}

pub(super) fn reserve() -> (usize, usize) {
    (0, 0)
}

pub(super) fn open(_: usize, _: usize) -> bool {
    false
}

pub(super) fn unmap(_: usize, _: usize) {}
