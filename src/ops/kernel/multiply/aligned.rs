//! Buffers for packed values.

use half::bf16;

/// A buffer that begins at a multiple of 64 bytes.
pub(super) struct Aligned<T> {
    lines: Vec<Line>,
    element: std::marker::PhantomData<T>,
}

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

impl<T> Default for Aligned<T> {
    fn default() -> Self {
        Self { lines: Vec::new(), element: std::marker::PhantomData }
    }
}

/// A type of which any bits are a value.
pub(super) trait Plain {}
impl Plain for bf16 {}
impl Plain for f32 {}

impl<T: Plain> Aligned<T> {
    /// The first `len` values, whatever they are.
    pub(super) fn at_least(&mut self, len: usize) -> &mut [T] {
        const { assert!(size_of::<Line>().is_multiple_of(size_of::<T>())) };
        // Divided before it is compared: a product could wrap.
        let lines = len.div_ceil(size_of::<Line>() / size_of::<T>());
        if self.lines.len() < lines {
            self.lines.resize(lines, Line([0; 64]));
        }
        // SAFETY: so many lines are there and written, each aligned for `T`, and any bits are a value of `T`.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), len) }
    }
}
