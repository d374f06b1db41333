//! Blocks of 32 values: `w = d q`, or `w = d q + m`, with f16 `d` and `m`. The nibbles of byte `j` belong to the values `j`
//! and `j + 16`; a fifth bit lies apart.

use super::{Format, PART, scale};

pub(super) struct Q4_0;
pub(super) struct Q4_1;
pub(super) struct Q5_0;
pub(super) struct Q5_1;
pub(super) struct Q8_0;

impl Format for Q4_0 {
    const VALUES: usize = 32;
    const BYTES: usize = 2 + 16;

    #[inline(always)]
    fn unpack(block: &[u8], _: usize) -> [f32; PART] {
        let d = scale(block, 0);
        nibbles(&block[2..18]).map(|q| (i32::from(q) - 8) as f32 * d)
    }
}

impl Format for Q4_1 {
    const VALUES: usize = 32;
    const BYTES: usize = 4 + 16;

    #[inline(always)]
    fn unpack(block: &[u8], _: usize) -> [f32; PART] {
        let (d, m) = (scale(block, 0), scale(block, 2));
        nibbles(&block[4..20]).map(|q| i32::from(q) as f32 * d + m)
    }
}

impl Format for Q5_0 {
    const VALUES: usize = 32;
    const BYTES: usize = 2 + 4 + 16;

    #[inline(always)]
    fn unpack(block: &[u8], _: usize) -> [f32; PART] {
        let d = scale(block, 0);
        with_fifth_bit(&block[6..22], &block[2..6]).map(|q| (q - 16) as f32 * d)
    }
}

impl Format for Q5_1 {
    const VALUES: usize = 32;
    const BYTES: usize = 4 + 4 + 16;

    #[inline(always)]
    fn unpack(block: &[u8], _: usize) -> [f32; PART] {
        let (d, m) = (scale(block, 0), scale(block, 2));
        with_fifth_bit(&block[8..24], &block[4..8]).map(|q| q as f32 * d + m)
    }
}

impl Format for Q8_0 {
    const VALUES: usize = 32;
    const BYTES: usize = 2 + 32;

    #[inline(always)]
    fn unpack(block: &[u8], _: usize) -> [f32; PART] {
        let d = scale(block, 0);
        std::array::from_fn(|j| f32::from(block[2 + j].cast_signed()) * d)
    }
}

/// The low nibbles of 16 bytes, then the high ones.
#[inline(always)]
fn nibbles(bytes: &[u8]) -> [u8; PART] {
    let mut out = [0; PART];
    for (j, byte) in bytes.iter().enumerate().take(16) {
        out[j] = byte & 15;
        out[j + 16] = byte >> 4;
    }
    out
}

/// The nibbles with bit `j` of `high` above value `j`.
#[inline(always)]
fn with_fifth_bit(low: &[u8], high: &[u8]) -> [i32; PART] {
    let high = u32::from_le_bytes([high[0], high[1], high[2], high[3]]);
    let low = nibbles(low);
    std::array::from_fn(|j| i32::from(low[j]) | ((high >> j & 1) << 4).cast_signed())
}
