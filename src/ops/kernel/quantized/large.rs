//! Blocks of 256 values, the K-quants: eight parts of 32, which have one scale each or one for each 16 values. The scales
//! are small integers that f16 values of the whole block scale in turn.

use super::{Format, PART, bytes, scale};

#[derive(Clone, Copy)]
pub(super) struct Q2K;
#[derive(Clone, Copy)]
pub(super) struct Q3K;
#[derive(Clone, Copy)]
pub(super) struct Q4K;
#[derive(Clone, Copy)]
pub(super) struct Q5K;
#[derive(Clone, Copy)]
pub(super) struct Q6K;

/// `scales [16] (4 bits scale, 4 bits minimum), qs [64], d, dmin`: `w = d scale q - dmin minimum`.
impl Format for Q2K {
    const VALUES: usize = 256;
    const BYTES: usize = 16 + 64 + 4;

    #[inline(always)]
    fn unpack(block: &[u8], part: usize, out: &mut [f32; PART]) {
        let (d, min) = (scale(block, 80), scale(block, 82));
        let qs: &[u8; PART] = bytes(block, 16 + part / 4 * 32);
        let shift = 2 * (part % 4);
        let scales = [block[2 * part], block[2 * part + 1]];
        let factors = scales.map(|s| d * f32::from(s & 15));
        let minima = scales.map(|s| min * f32::from(s >> 4));
        for j in 0..PART {
            out[j] = factors[j / 16] * ((i32::from(qs[j]) >> shift) & 3) as f32 - minima[j / 16];
        }
    }
}

/// `hmask [32], qs [64], scales [12] (16 of 6 bits), d`: `w = d (scale - 32) q`, `q` of two bits and, where the mask has
/// no bit, 4 less.
impl Format for Q3K {
    const VALUES: usize = 256;
    const BYTES: usize = 32 + 64 + 12 + 2;

    #[inline(always)]
    fn unpack(block: &[u8], part: usize, out: &mut [f32; PART]) {
        let d = scale(block, 108);
        let (mask, qs): (&[u8; PART], &[u8; PART]) = (bytes(block, 0), bytes(block, 32 + part / 4 * 32));
        let shift = 2 * (part % 4);
        // Scale `i`: four bits in byte `i % 8`, the low ones for the first eight; two in byte `8 + i % 4`.
        let six = |i: usize| {
            let low = block[96 + i % 8] >> (4 * (i / 8)) & 15;
            let high = block[104 + i % 4] >> (2 * (i / 4)) & 3;
            f32::from(low | high << 4) - 32.0
        };
        let factors = [d * six(2 * part), d * six(2 * part + 1)];
        for j in 0..PART {
            let low = (i32::from(qs[j]) >> shift) & 3;
            let high = (i32::from(mask[j]) >> part) & 1;
            out[j] = factors[j / 16] * ((low + 4 * high) as f32 - 4.0);
        }
    }
}

/// `d, dmin, scales [12], qs [128]`: `w = d scale q - dmin minimum`.
impl Format for Q4K {
    const VALUES: usize = 256;
    const BYTES: usize = 4 + 12 + 128;

    #[inline(always)]
    fn unpack(block: &[u8], part: usize, out: &mut [f32; PART]) {
        let (factor, minimum) = scale_and_minimum(block, part);
        let qs: &[u8; PART] = bytes(block, 16 + part / 2 * 32);
        let shift = 4 * (part % 2);
        for j in 0..PART {
            out[j] = factor * ((i32::from(qs[j]) >> shift) & 15) as f32 - minimum;
        }
    }
}

/// As [`Q4K`], with a fifth bit: `d, dmin, scales [12], qh [32], qs [128]`.
impl Format for Q5K {
    const VALUES: usize = 256;
    const BYTES: usize = 4 + 12 + 32 + 128;

    #[inline(always)]
    fn unpack(block: &[u8], part: usize, out: &mut [f32; PART]) {
        let (factor, minimum) = scale_and_minimum(block, part);
        let (high, qs): (&[u8; PART], &[u8; PART]) = (bytes(block, 16), bytes(block, 48 + part / 2 * 32));
        let shift = 4 * (part % 2);
        for j in 0..PART {
            let q = (i32::from(qs[j]) >> shift) & 15 | ((i32::from(high[j]) >> part) & 1) << 4;
            out[j] = factor * q as f32 - minimum;
        }
    }
}

/// `ql [128], qh [64], scales [16], d`: `w = d scale (q - 32)`, `q` of four bits and two.
impl Format for Q6K {
    const VALUES: usize = 256;
    const BYTES: usize = 128 + 64 + 16 + 2;

    #[inline(always)]
    fn unpack(block: &[u8], part: usize, out: &mut [f32; PART]) {
        let d = scale(block, 208);
        let (half, quarter) = (part / 4, part % 4);
        let low: &[u8; PART] = bytes(block, half * 64 + quarter % 2 * 32);
        let high: &[u8; PART] = bytes(block, 128 + half * 32);
        let (low_shift, high_shift) = (quarter / 2 * 4, 2 * quarter);
        let scales = &block[192 + 2 * part..][..2];
        let factors = [0, 1].map(|i| d * f32::from(scales[i].cast_signed()));
        for j in 0..PART {
            let q = (i32::from(low[j]) >> low_shift) & 15 | ((i32::from(high[j]) >> high_shift) & 3) << 4;
            out[j] = factors[j / 16] * (q as f32 - 32.0);
        }
    }
}

/// Scale and minimum of a part: six bits each, those of the first four parts in bytes of their own, whose upper two bits
/// belong to the last four.
#[inline(always)]
fn scale_and_minimum(block: &[u8], part: usize) -> (f32, f32) {
    let scales = &block[4..16];
    let (factor, minimum) = if part < 4 {
        (scales[part] & 63, scales[part + 4] & 63)
    } else {
        let both = scales[part + 4];
        (both & 15 | scales[part - 4] >> 6 << 4, both >> 4 | scales[part] >> 6 << 4)
    };
    (scale(block, 0) * f32::from(factor), scale(block, 2) * f32::from(minimum))
}
