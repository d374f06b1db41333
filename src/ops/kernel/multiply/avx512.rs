//! The inner product in AVX-512: 8 lines by up to 48, so 24 sums in registers beside 3 of the right side; the left side
//! is broadcast from memory, pair by pair. 11 loads feed 24 products, which two loads a cycle keep up with even where two
//! products start in each.
//!
//! `vdpbf16ps` counts denormal inputs and results as zero and rounds to nearest even after each product of a pair.

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_load_ps, _mm512_load_si512, _mm512_set1_epi32,
    _mm512_setzero_ps, _mm512_setzero_si512, _mm512_store_ps,
};
use std::mem::transmute;

use super::block::{Block, Inner, Previous};
use super::target::Target;

/// Lines of the left side at once.
const LINES: usize = 8;

pub(super) struct Avx512;

impl Inner for Avx512 {
    const STRIPS: usize = 3;
    const PARTS: usize = 1;

    unsafe fn begin() {}

    unsafe fn end() {}

    unsafe fn block<T: Target>(
        call: &Block<'_>,
        lines: usize,
        strips: usize,
        _previous: Option<&Previous>,
    ) -> usize {
        for line in (0..lines).step_by(LINES) {
            // SAFETY: as this function; `line` is below `lines`, which segments and sums cover rounded up to 16.
            unsafe {
                match strips {
                    1 => lines_by::<1>(call, line),
                    2 => lines_by::<2>(call, line),
                    _ => lines_by::<3>(call, line),
                }
            }
        }
        0
    }
}

/// # Safety
/// As [`Inner::block`], for `LINES` lines from `line` on and `N` strips.
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn lines_by<const N: usize>(call: &Block<'_>, line: usize) {
    let Block { segments, right, sums, accumulate } = *call;
    const WIDTH: usize = Avx512::STRIPS * 16;
    let mut sum: [[__m512; N]; LINES] = [[_mm512_setzero_ps(); N]; LINES];
    // SAFETY: the caller's promise covers all `LINES x N` vectors of sums, each at a multiple of 64 bytes.
    let sums = unsafe { sums.add(line * WIDTH) };
    if accumulate {
        for (i, row) in sum.iter_mut().enumerate() {
            for (j, sum) in row.iter_mut().enumerate() {
                // SAFETY: as above.
                *sum = unsafe { _mm512_load_ps(sums.add(i * WIDTH + j * 16)) };
            }
        }
    }
    let mut right = right;
    for segment in segments.iter().take_while(|segment| segment.steps > 0) {
        let stride = segment.stride;
        // SAFETY: `line` is a line of the segment.
        let mut left = unsafe { segment.left.add(line * stride) };
        for _ in 0..segment.steps {
            for pair in 0..16 {
                let mut b = [_mm512_setzero_si512(); N];
                for (j, b) in b.iter_mut().enumerate() {
                    // SAFETY: a step of each strip is 16 vectors, strips one after the other.
                    *b = unsafe { _mm512_load_si512(right.add(j * 1024 + pair * 64).cast()) };
                }
                for (i, row) in sum.iter_mut().enumerate() {
                    // SAFETY: a step of each line is 16 pairs of 4 bytes; they need no alignment.
                    let a = unsafe { left.add(i * stride + pair * 4).cast::<i32>().read_unaligned() };
                    let a = _mm512_set1_epi32(a);
                    for (sum, b) in row.iter_mut().zip(b) {
                        *sum = _mm512_dpbf16_ps(*sum, as_bf16(a), as_bf16(b));
                    }
                }
            }
            // SAFETY: at most one past the last step.
            (left, right) = unsafe { (left.add(segment.step), right.add(Avx512::STRIPS * 1024)) };
        }
    }
    for (i, row) in sum.iter().enumerate() {
        for (j, sum) in row.iter().enumerate() {
            // SAFETY: as above.
            unsafe { _mm512_store_ps(sums.add(i * WIDTH + j * 16), *sum) };
        }
    }
}

pub(super) fn as_bf16(bits: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits without invalid values.
    unsafe { transmute(bits) }
}
