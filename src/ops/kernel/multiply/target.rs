//! The type that a product is written in, rounded once from f32.

use half::bf16;

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::{
    __m256bh, __m256i, __m512, __m512bh, __m512i, __mmask16, _mm256_mask_storeu_epi16,
    _mm256_maskz_loadu_epi16, _mm512_castsi512_ps, _mm512_cvtepu16_epi32, _mm512_cvtne2ps_pbh,
    _mm512_cvtneps_pbh, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_mask_storeu_ps, _mm512_maskz_loadu_ps,
    _mm512_mul_ps, _mm512_set1_ps, _mm512_slli_epi32, _mm512_storeu_ps, _mm512_storeu_si512,
};

use super::source::Source;

/// A type of results: f32 or bf16.
pub(crate) trait Target: Copy + Send + Sync {
    fn widen(self) -> f32;
    fn narrow(value: f32) -> Self;
    /// The same place, if this is f32.
    fn as_f32(place: *mut Self) -> Option<*mut f32>;
    /// As one side of a product.
    fn source(values: &[Self]) -> Source<'_>;

    /// The values that `mask` names, from `from` on.
    ///
    /// # Safety
    /// They can be read, and the machine has avx512f, avx512bw, avx512vl.
    #[cfg(target_arch = "x86_64")]
    unsafe fn load(from: *const Self, mask: __mmask16) -> __m512;

    /// # Safety
    /// The values that `mask` names can be written, and the machine has avx512f, avx512bw, avx512vl, avx512bf16.
    #[cfg(target_arch = "x86_64")]
    unsafe fn store(to: *mut Self, mask: __mmask16, values: __m512);

    /// # Safety
    /// 32 values can be written, and the machine has avx512f, avx512bf16.
    #[cfg(target_arch = "x86_64")]
    unsafe fn store_two(to: *mut Self, first: __m512, second: __m512);
}

impl Target for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn narrow(value: f32) -> Self {
        value
    }

    fn as_f32(place: *mut Self) -> Option<*mut f32> {
        Some(place)
    }

    fn source(values: &[Self]) -> Source<'_> {
        Source::F32(values)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load(from: *const Self, mask: __mmask16) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_maskz_loadu_ps(mask, from) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn store(to: *mut Self, mask: __mmask16, values: __m512) {
        // SAFETY: the caller's promise.
        unsafe { _mm512_mask_storeu_ps(to, mask, values) }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn store_two(to: *mut Self, first: __m512, second: __m512) {
        // SAFETY: the caller's promise.
        unsafe {
            _mm512_storeu_ps(to, first);
            _mm512_storeu_ps(to.add(16), second);
        }
    }
}

impl Target for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn narrow(value: f32) -> Self {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
        // A NaN whose payload sits in the low half must not round to infinity.
        let nan = (bits >> 16) | 0x40;
        Self::from_bits(if value.is_nan() { nan } else { rounded } as u16)
    }

    fn as_f32(_: *mut Self) -> Option<*mut f32> {
        None
    }

    fn source(values: &[Self]) -> Source<'_> {
        Source::Bf16(values)
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn load(from: *const Self, mask: __mmask16) -> __m512 {
        // SAFETY: the caller's promise.
        let bits = unsafe { _mm256_maskz_loadu_epi16(mask, from.cast()) };
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn store(to: *mut Self, mask: __mmask16, values: __m512) {
        let rounded = _mm512_cvtneps_pbh(values);
        // SAFETY: both types are 256 bits without invalid values; the rest is the caller's promise.
        unsafe {
            _mm256_mask_storeu_epi16(to.cast(), mask, std::mem::transmute::<__m256bh, __m256i>(rounded))
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    unsafe fn store_two(to: *mut Self, first: __m512, second: __m512) {
        let rounded = _mm512_cvtne2ps_pbh(second, first);
        // SAFETY: both types are 512 bits without invalid values; the rest is the caller's promise.
        unsafe { _mm512_storeu_si512(to.cast(), std::mem::transmute::<__m512bh, __m512i>(rounded)) }
    }
}

/// Rounds values to bf16, which stay f32. Inlined, so that it has the vectors of whoever calls it.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(super) fn round_to_bf16(values: &mut [f32]) {
    for value in values {
        *value = bf16::narrow(*value).widen();
    }
}

/// `row = beta row + alpha sums`, for as many sums as the row has values; `beta` 0 does not read the row.
///
/// # Safety
/// The machine has what [`Target::store`] asks for.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) unsafe fn finish<T: Target>(row: &mut [T], sums: &[f32], alpha: f32, beta: f32) {
    assert!(sums.len() >= row.len().next_multiple_of(16));
    let (scale, keep) = (_mm512_set1_ps(alpha), _mm512_set1_ps(beta));
    for at in (0..row.len()).step_by(16) {
        let mask = match row.len() - at {
            left @ 1..16 => (1 << left) - 1,
            _ => !0,
        };
        // SAFETY: the mask names values of the row; the sums reach to the next multiple of 16.
        unsafe {
            let to = row.as_mut_ptr().add(at);
            let mut values = _mm512_mul_ps(_mm512_loadu_ps(sums.as_ptr().add(at)), scale);
            if beta != 0.0 {
                values = _mm512_fmadd_ps(T::load(to, mask), keep, values);
            }
            T::store(to, mask, values);
        }
    }
}

/// As [`finish`] for `rows` of 32 values, `apart` from each other; those of the sums lie `stride` apart.
///
/// # Safety
/// As there, and the rows can be read and written.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
pub(super) unsafe fn finish_rows<T: Target>(
    mut to: *mut T,
    apart: usize,
    rows: usize,
    sums: &[f32],
    stride: usize,
    (alpha, beta): (f32, f32),
) {
    assert!(rows == 0 || (rows - 1) * stride + 32 <= sums.len());
    let (scale, keep) = (_mm512_set1_ps(alpha), _mm512_set1_ps(beta));
    let mut sums = sums.as_ptr();
    for _ in 0..rows {
        // SAFETY: the sums are there by the assertion, the row by the caller's promise.
        unsafe {
            let mut first = _mm512_mul_ps(_mm512_loadu_ps(sums), scale);
            let mut second = _mm512_mul_ps(_mm512_loadu_ps(sums.add(16)), scale);
            if beta != 0.0 {
                first = _mm512_fmadd_ps(T::load(to, !0), keep, first);
                second = _mm512_fmadd_ps(T::load(to.add(16), !0), keep, second);
            }
            T::store_two(to, first, second);
        }
        (to, sums) = (to.wrapping_add(apart), sums.wrapping_add(stride));
    }
}
