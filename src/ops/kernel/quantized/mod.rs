//! Rows of ggml's quantized blocks to f32, 32 values at a time: to the bit what candle and llama.cpp dequantize.
//!
//! A format is a block of bytes that stands for 32 values, or for 256 in eight parts of 32 with scales of their own. Any
//! part is cheap to begin with, because products pack weights in pieces. The loops are plain Rust, compiled once for each
//! set of instructions that is worth it and chosen when the program runs.

mod large;
mod small;

use std::sync::LazyLock;

use candle_core::quantized::GgmlDType;

use large::{Q2K, Q3K, Q4K, Q5K, Q6K};
use small::{Q4_0, Q4_1, Q5_0, Q5_1, Q8_0};

/// Values that are dequantized at once.
pub(crate) const PART: usize = 32;

/// A way to store values in blocks.
trait Format {
    const VALUES: usize;
    const BYTES: usize;
    /// The values of the block from `32 * part` on.
    fn unpack(block: &[u8], part: usize) -> [f32; PART];
}

/// One of ggml's formats that products can be computed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
}

/// Calls `$function::<F>($arguments)` with the format of `$kind`.
macro_rules! with_format {
    ($kind:expr, $function:ident ( $($argument:expr),* )) => {
        match $kind {
            Kind::Q4_0 => $function::<Q4_0>($($argument),*),
            Kind::Q4_1 => $function::<Q4_1>($($argument),*),
            Kind::Q5_0 => $function::<Q5_0>($($argument),*),
            Kind::Q5_1 => $function::<Q5_1>($($argument),*),
            Kind::Q8_0 => $function::<Q8_0>($($argument),*),
            Kind::Q2K => $function::<Q2K>($($argument),*),
            Kind::Q3K => $function::<Q3K>($($argument),*),
            Kind::Q4K => $function::<Q4K>($($argument),*),
            Kind::Q5K => $function::<Q5K>($($argument),*),
            Kind::Q6K => $function::<Q6K>($($argument),*),
        }
    };
}

impl Kind {
    /// `None` for types that no model file has weights in.
    pub(crate) fn of(dtype: GgmlDType) -> Option<Self> {
        Some(match dtype {
            GgmlDType::Q4_0 => Self::Q4_0,
            GgmlDType::Q4_1 => Self::Q4_1,
            GgmlDType::Q5_0 => Self::Q5_0,
            GgmlDType::Q5_1 => Self::Q5_1,
            GgmlDType::Q8_0 => Self::Q8_0,
            GgmlDType::Q2K => Self::Q2K,
            GgmlDType::Q3K => Self::Q3K,
            GgmlDType::Q4K => Self::Q4K,
            GgmlDType::Q5K => Self::Q5K,
            GgmlDType::Q6K => Self::Q6K,
            _ => return None,
        })
    }

    /// Values and bytes of a block.
    pub(crate) fn block(self) -> (usize, usize) {
        fn block<F: Format>() -> (usize, usize) {
            (F::VALUES, F::BYTES)
        }
        with_format!(self, block())
    }

    /// Writes the values of `row` from `column` on into `out`; `column` is a multiple of 32.
    pub(crate) fn fill(self, row: &[u8], column: usize, out: &mut [f32]) {
        assert!(column.is_multiple_of(PART), "column {column} is no multiple of {PART}");
        with_format!(self, fill(row, column, out));
    }
}

/// `x w` for two rows, summed in 32 lanes, which are the same on every machine.
pub(crate) fn dot(x: &[f32], w: &[f32]) -> f32 {
    match Level::best() {
        Level::Plain => dot_plain(x, w),
        // SAFETY: the machine has the instructions.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { dot_avx2(x, w) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { dot_avx512(x, w) },
    }
}

/// Sets of instructions that the loops are compiled for.
#[derive(Clone, Copy)]
enum Level {
    Plain,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Level {
    fn best() -> Self {
        static BEST: LazyLock<Level> = LazyLock::new(|| {
            #[cfg(target_arch = "x86_64")]
            {
                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                {
                    return Level::Avx512;
                }
                if is_x86_feature_detected!("avx2") {
                    return Level::Avx2;
                }
            }
            Level::Plain
        });
        *BEST
    }
}

fn fill<F: Format>(row: &[u8], column: usize, out: &mut [f32]) {
    match Level::best() {
        Level::Plain => fill_plain::<F>(row, column, out),
        // SAFETY: the machine has the instructions.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => unsafe { fill_avx2::<F>(row, column, out) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => unsafe { fill_avx512::<F>(row, column, out) },
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn fill_avx512<F: Format>(row: &[u8], column: usize, out: &mut [f32]) {
    fill_plain::<F>(row, column, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn fill_avx2<F: Format>(row: &[u8], column: usize, out: &mut [f32]) {
    fill_plain::<F>(row, column, out);
}

#[inline(always)]
fn fill_plain<F: Format>(row: &[u8], column: usize, out: &mut [f32]) {
    let parts = F::VALUES / PART;
    let unpack = |part: usize| {
        let block = &row[part / parts * F::BYTES..][..F::BYTES];
        F::unpack(block, part % parts)
    };
    let first = column / PART;
    let (whole, rest) = out.as_chunks_mut::<PART>();
    let end = first + whole.len();
    for (part, out) in (first..).zip(whole) {
        *out = unpack(part);
    }
    if !rest.is_empty() {
        rest.copy_from_slice(&unpack(end)[..rest.len()]);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn dot_avx512(x: &[f32], w: &[f32]) -> f32 {
    dot_plain(x, w)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn dot_avx2(x: &[f32], w: &[f32]) -> f32 {
    dot_plain(x, w)
}

#[inline(always)]
fn dot_plain(x: &[f32], w: &[f32]) -> f32 {
    let mut sums = [0f32; PART];
    let (x, x_rest) = x.as_chunks::<PART>();
    let (w, w_rest) = w.as_chunks::<PART>();
    for (x, w) in x.iter().zip(w) {
        for ((sum, x), w) in sums.iter_mut().zip(x).zip(w) {
            *sum += x * w;
        }
    }
    let rest: f32 = x_rest.iter().zip(w_rest).map(|(x, w)| x * w).sum();
    sums.iter().sum::<f32>() + rest
}

/// A scale: the f16 at `at`, which is finite, in a few operations without branches or calls.
#[inline(always)]
fn scale(block: &[u8], at: usize) -> f32 {
    let bits = u32::from(u16::from_le_bytes([block[at], block[at + 1]]));
    // Exponent and mantissa where f32 has them; the product corrects the exponent, of subnormal numbers too.
    let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((127 + 112) << 23);
    f32::from_bits(magnitude.to_bits() | (bits & 0x8000) << 16)
}

#[cfg(test)]
mod tests;
