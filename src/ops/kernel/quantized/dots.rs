//! Rows of blocks times a row of values, as in generating token by token: each part is dequantized in registers and used
//! there, so that little more than the blocks is read.

use half::bf16;

#[cfg(target_arch = "x86_64")]
use super::super::multiply::Path;
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

/// With values rounded to bf16.
pub(super) fn narrow<F: Format>(format: F, row: &[u8], x: &[bf16]) -> f32 {
    #[cfg(target_arch = "x86_64")]
    {
        if matches!(Path::best(), Path::Amx | Path::Avx512Bf16) {
            // SAFETY: the machine has the path, and with it these instructions.
            return unsafe { avx512::narrow::<F>(row, x) };
        }
    }
    rounded(format, row, x)
}

vectorized! {
    /// [`narrow`] anywhere.
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

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::{
        __m512bh, __m512i, _MM_HINT_T0, _mm_prefetch, _mm512_cvtne2ps_pbh, _mm512_dpbf16_ps, _mm512_loadu_ps,
        _mm512_loadu_si512, _mm512_reduce_add_ps, _mm512_setzero_ps,
    };

    use half::bf16;

    use super::super::{Format, PART, unpack};

    /// Bytes between what is read and what is asked for: the next page, where the processor does not look by itself.
    const AHEAD: usize = 4096;

    /// [`super::narrow`] with the instructions for it.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
    pub(super) fn narrow<F: Format>(row: &[u8], x: &[bf16]) -> f32 {
        let (mut sum, mut w) = (_mm512_setzero_ps(), [0f32; PART]);
        for (part, x) in x.as_chunks::<PART>().0.iter().enumerate() {
            // A hint, which is ignored where nothing is mapped.
            let ahead = part * F::BYTES / (F::VALUES / PART) + AHEAD;
            _mm_prefetch::<_MM_HINT_T0>(row.as_ptr().wrapping_add(ahead).cast());
            unpack::<F>(row, part, &mut w);
            // SAFETY: 32 values are read of each; any bits are a vector of bf16.
            let (x, low, high) = unsafe {
                let x: __m512i = _mm512_loadu_si512(x.as_ptr().cast());
                let (low, high) = (_mm512_loadu_ps(w.as_ptr()), _mm512_loadu_ps(w.as_ptr().add(16)));
                (std::mem::transmute::<__m512i, __m512bh>(x), low, high)
            };
            sum = _mm512_dpbf16_ps(sum, x, _mm512_cvtne2ps_pbh(high, low));
        }
        _mm512_reduce_add_ps(sum)
    }
}
