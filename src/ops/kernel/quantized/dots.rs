//! Rows of blocks times a row of values, as in generating token by token: each part is dequantized in registers and used
//! there, so that little more than the blocks is read.

use half::bf16;

use super::super::vectorized;
use super::{Format, PART, unpack};

vectorized! {
    /// In f32, summed in 32 lanes.
    pub(super) fn wide<F: Format>(_format: F, row: &[u8], x: &[f32]) -> f32 {
        let (mut sums, mut w) = ([0f32; PART], [0f32; PART]);
        for (part, x) in x.as_chunks::<PART>().0.iter().enumerate() {
            unpack::<F>(row, part, &mut w);
            for ((sum, x), w) in sums.iter_mut().zip(x).zip(&w) {
                *sum += x * w;
            }
        }
        sums.iter().sum()
    }
}

vectorized! {
    /// With values rounded to bf16.
    pub(super) fn rounded<F: Format>(_format: F, row: &[u8], x: &[bf16]) -> f32 {
        let (mut sums, mut w) = ([0f32; PART], [0f32; PART]);
        for (part, x) in x.as_chunks::<PART>().0.iter().enumerate() {
            unpack::<F>(row, part, &mut w);
            for ((sum, x), w) in sums.iter_mut().zip(x).zip(&w) {
                // To nearest even; the values of blocks are finite.
                let bits = w.to_bits();
                let rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff_0000;
                *sum += f32::from_bits(u32::from(x.to_bits()) << 16) * f32::from_bits(rounded);
            }
        }
        sums.iter().sum()
    }
}
