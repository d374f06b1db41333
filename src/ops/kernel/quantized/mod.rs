//! Rows of ggml's quantized blocks to f32, 32 values at a time: to the bit what candle and llama.cpp dequantize.
//!
//! A format is a block of bytes that stands for 32 values, or for 256 in eight parts of 32 with scales of their own. Any
//! part is cheap to begin with, because products pack weights in pieces. The loops are plain Rust, compiled once for each
//! set of instructions that is worth it and chosen when the program runs.

mod dots;
mod large;
mod small;
#[cfg(target_arch = "x86_64")]
mod words;

use candle_core::quantized::GgmlDType;
use half::bf16;

#[cfg(target_arch = "x86_64")]
use super::multiply::Path;
use super::vectorized;
use dots::{rounded, wide};
use large::{Q2K, Q3K, Q4K, Q5K, Q6K};
use small::{Q4_0, Q4_1, Q5_0, Q5_1, Q8_0};
#[cfg(target_arch = "x86_64")]
use words::Words;

/// Values that are dequantized at once.
pub(crate) const PART: usize = 32;

/// A way to store values in blocks.
trait Format {
    const VALUES: usize;
    const BYTES: usize;
    /// Writes the values of the block from `32 * part` on.
    fn unpack(block: &[u8], part: usize, out: &mut [f32; PART]);
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

/// Calls `$function(format, $arguments)` with the format of `$kind`.
macro_rules! with_format {
    ($kind:expr, $function:ident ( $($argument:expr),* )) => {
        match $kind {
            Kind::Q4_0 => $function(Q4_0 $(, $argument)*),
            Kind::Q4_1 => $function(Q4_1 $(, $argument)*),
            Kind::Q5_0 => $function(Q5_0 $(, $argument)*),
            Kind::Q5_1 => $function(Q5_1 $(, $argument)*),
            Kind::Q8_0 => $function(Q8_0 $(, $argument)*),
            Kind::Q2K => $function(Q2K $(, $argument)*),
            Kind::Q3K => $function(Q3K $(, $argument)*),
            Kind::Q4K => $function(Q4K $(, $argument)*),
            Kind::Q5K => $function(Q5K $(, $argument)*),
            Kind::Q6K => $function(Q6K $(, $argument)*),
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
        fn block<F: Format>(_: F) -> (usize, usize) {
            (F::VALUES, F::BYTES)
        }
        with_format!(self, block())
    }

    /// Writes the values of `row` from `column` on into `out`; `column` is a multiple of 32.
    pub(crate) fn fill(self, row: &[u8], column: usize, out: &mut [f32]) {
        assert!(column.is_multiple_of(PART), "column {column} is no multiple of {PART}");
        with_format!(self, fill(row, column, out));
    }

    /// `x w` with the values `w` of `row`.
    pub(crate) fn dot(self, row: &[u8], x: &[f32]) -> f32 {
        with_format!(self, wide(row, x))
    }

    /// Multiplies a row of blocks with a row of bf16 and sums in f32. Weights are rounded to bf16 only where the machine
    /// does not multiply them as integers.
    pub(crate) fn dot_narrow(self, row: &[u8], x: &Row) -> f32 {
        match x {
            Row::Plain(x) => with_format!(self, rounded(row, x)),
            // SAFETY: rows are words where the machine has the path, and with it these instructions.
            #[cfg(target_arch = "x86_64")]
            Row::Words(x) => unsafe { words::dot(self, row, x) },
        }
    }
}

/// A row of bf16 that is multiplied with many rows of blocks.
pub(crate) enum Row {
    Plain(Vec<bf16>),
    /// The row holds integers where the path has instructions for them and no value is too large.
    #[cfg(target_arch = "x86_64")]
    Words(Words),
}

impl Row {
    pub(crate) fn new(values: &[bf16]) -> Self {
        #[cfg(target_arch = "x86_64")]
        if Path::best() != Path::Portable
            && let Some(words) = Words::of(values)
        {
            return Self::Words(words);
        }
        Self::Plain(values.to_vec())
    }
}

vectorized! {
    fn fill<F: Format>(_format: F, row: &[u8], column: usize, out: &mut [f32]) {
        let first = column / PART;
        let (whole, rest) = out.as_chunks_mut::<PART>();
        let end = first + whole.len();
        for (part, out) in (first..).zip(whole) {
            unpack::<F>(row, part, out);
        }
        if !rest.is_empty() {
            let mut values = [0.0; PART];
            unpack::<F>(row, end, &mut values);
            rest.copy_from_slice(&values[..rest.len()]);
        }
    }
}

/// The values of a row from `32 * part` on. A function, because a closure that is called twice would be compiled by itself,
/// for the machine that every program runs on.
#[inline(always)]
fn unpack<F: Format>(row: &[u8], part: usize, out: &mut [f32; PART]) {
    let parts = F::VALUES / PART;
    let block = &row[part / parts * F::BYTES..][..F::BYTES];
    F::unpack(block, part % parts, out);
}

/// `N` bytes of a block.
#[inline(always)]
fn bytes<const N: usize>(block: &[u8], at: usize) -> &[u8; N] {
    block[at..].first_chunk().expect("a part lies inside its block")
}

/// The eight scales and the eight minima of a block of six bits each, byte by byte: those of the last four parts lie in
/// two pieces.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn scales_and_minima(packed: &[u8; 12]) -> (u64, u64) {
    let word = |at: usize| u32::from_le_bytes(*bytes(packed, at));
    let (a, b, c) = (word(0), word(4), word(8));
    let pair = |first: u32, last: u32| u64::from(first) | u64::from(last) << 32;
    (
        pair(a & 0x3f3f_3f3f, c & 0x0f0f_0f0f | (a >> 6 & 0x0303_0303) << 4),
        pair(b & 0x3f3f_3f3f, c >> 4 & 0x0f0f_0f0f | (b >> 6 & 0x0303_0303) << 4),
    )
}

/// A scale: the f16 at `at`, which is finite. Without calls or branches, and without subnormal numbers of f32, which
/// processors are slow with.
#[inline(always)]
fn scale(block: &[u8], at: usize) -> f32 {
    const BIAS: u32 = 127 - 15;
    let bits = u32::from(u16::from_le_bytes(*bytes(block, at)));
    // Exponent and mantissa where f32 has them.
    let magnitude = (bits & 0x7fff) << 13;
    let normal = f32::from_bits(magnitude + (BIAS << 23));
    // Of a subnormal number the mantissa has no leading one: one is added and taken away again.
    let subnormal = f32::from_bits(magnitude + ((BIAS + 1) << 23)) - f32::from_bits((BIAS + 1) << 23);
    let magnitude = if bits & 0x7c00 == 0 { subnormal } else { normal };
    // Hidden, because the compiler would take 16 blocks at once and gather their bytes, or mix these operations with those
    // on the values, either of which is far slower.
    std::hint::black_box(f32::from_bits(magnitude.to_bits() | (bits & 0x8000) << 16))
}

#[cfg(test)]
mod tests;
