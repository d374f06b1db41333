//! Blocks of 32 values: `w = d q`, or `w = d q + m`, with f16 `d` and `m`. The nibbles of byte `j` belong to the values `j`
//! and `j + 16`; a fifth bit lies apart.

use super::{Format, PART, bytes, scale};

#[derive(Clone, Copy)]
pub(super) struct Q4_0;
#[derive(Clone, Copy)]
pub(super) struct Q4_1;
#[derive(Clone, Copy)]
pub(super) struct Q5_0;
#[derive(Clone, Copy)]
pub(super) struct Q5_1;
#[derive(Clone, Copy)]
pub(super) struct Q8_0;

impl Format for Q4_0 {
    const VALUES: usize = 32;
    const BYTES: usize = 2 + 16;

    #[inline(always)]
    fn unpack(block: &[u8], _: usize, out: &mut [f32; PART]) {
        let d = scale(block, 0);
        nibbles(bytes(block, 2), out, |_, q| (q as f32 - 8.0) * d);
    }
}

impl Format for Q4_1 {
    const VALUES: usize = 32;
    const BYTES: usize = 4 + 16;

    #[inline(always)]
    fn unpack(block: &[u8], _: usize, out: &mut [f32; PART]) {
        let (d, m) = (scale(block, 0), scale(block, 2));
        nibbles(bytes(block, 4), out, |_, q| q as f32 * d + m);
    }
}

impl Format for Q5_0 {
    const VALUES: usize = 32;
    const BYTES: usize = 2 + 4 + 16;

    #[inline(always)]
    fn unpack(block: &[u8], _: usize, out: &mut [f32; PART]) {
        let d = scale(block, 0);
        let high = i32::from_le_bytes(*bytes(block, 2));
        nibbles(bytes(block, 6), out, |j, q| ((q | (high >> j & 1) << 4) as f32 - 16.0) * d);
    }
}

impl Format for Q5_1 {
    const VALUES: usize = 32;
    const BYTES: usize = 4 + 4 + 16;

    #[inline(always)]
    fn unpack(block: &[u8], _: usize, out: &mut [f32; PART]) {
        let (d, m) = (scale(block, 0), scale(block, 2));
        let high = i32::from_le_bytes(*bytes(block, 4));
        nibbles(bytes(block, 8), out, |j, q| (q | (high >> j & 1) << 4) as f32 * d + m);
    }
}

impl Format for Q8_0 {
    const VALUES: usize = 32;
    const BYTES: usize = 2 + 32;

    #[inline(always)]
    fn unpack(block: &[u8], _: usize, out: &mut [f32; PART]) {
        let d = scale(block, 0);
        let qs: &[u8; PART] = bytes(block, 2);
        for j in 0..PART {
            out[j] = f32::from(qs[j].cast_signed()) * d;
        }
    }
}

/// `out[j] = f(j, q)` with `q` the low nibbles of the bytes, then the high ones.
#[inline(always)]
fn nibbles(qs: &[u8; 16], out: &mut [f32; PART], f: impl Fn(usize, i32) -> f32) {
    for j in 0..16 {
        out[j] = f(j, i32::from(qs[j]) & 15);
    }
    for j in 0..16 {
        out[j + 16] = f(j + 16, i32::from(qs[j]) >> 4);
    }
}
