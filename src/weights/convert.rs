//! Stored bytes to a tensor of the wanted type in one pass: widen a piece to f32, narrow it, look for NaN and infinity.
//! Pieces are independent, so they are spread over threads; besides the result only a piece per thread is in memory.

use candle_core::{DType, Device, Tensor, WithDType};
use half::slice::HalfFloatSliceExt;
use half::vec::HalfBitsVecExt;
use half::{bf16, f16};
use rayon::prelude::*;

use crate::error::{Error, Result};

/// Values per piece; a multiple of every ggml block.
pub(super) const PIECE: usize = 16 * 1024;

/// A tensor of `wanted` from little-endian floats of type `stored`.
pub(super) fn from_floats(
    bytes: &[u8],
    stored: DType,
    shape: &[usize],
    wanted: DType,
    device: &Device,
) -> Result<Tensor> {
    if stored == wanted {
        return match wanted {
            DType::F32 => copy::<f32>(bytes, shape, device),
            DType::F16 => copy::<f16>(bytes, shape, device),
            DType::BF16 => copy::<bf16>(bytes, shape, device),
            other => Err(not_a_float(other)),
        };
    }
    let size = stored.size_in_bytes();
    match stored {
        DType::F32 => from_pieces(shape, wanted, device, |start, out| {
            f32::load(&bytes[start * size..][..out.len() * size], out);
            Ok(())
        }),
        DType::F16 => from_pieces(shape, wanted, device, |start, out| {
            let mut halves = [f16::ZERO; PIECE];
            let halves = &mut halves[..out.len()];
            f16::load(&bytes[start * size..][..out.len() * size], halves);
            halves.convert_to_f32_slice(out);
            Ok(())
        }),
        DType::BF16 => from_pieces(shape, wanted, device, |start, out| {
            for (value, pair) in out.iter_mut().zip(bytes[start * size..].chunks_exact(size)) {
                *value = f32::from_bits(u32::from(u16::from_le_bytes([pair[0], pair[1]])) << 16);
            }
            Ok(())
        }),
        other => Err(not_a_float(other)),
    }
}

/// A tensor of `wanted` whose values `widen(first, out)` writes, piece by piece, as f32.
pub(super) fn from_pieces(
    shape: &[usize],
    wanted: DType,
    device: &Device,
    widen: impl Fn(usize, &mut [f32]) -> Result<()> + Sync,
) -> Result<Tensor> {
    match wanted {
        DType::F32 => fill::<f32>(shape, device, |start, out| widen(start, out)),
        DType::F16 => fill::<f16>(shape, device, |start, out| narrow(start, out, &widen)),
        DType::BF16 => fill::<bf16>(shape, device, |start, out| narrow(start, out, &widen)),
        other => Err(not_a_float(other)),
    }
}

fn copy<T: Float>(bytes: &[u8], shape: &[usize], device: &Device) -> Result<Tensor> {
    fill::<T>(shape, device, |start, out| {
        T::load(&bytes[start * size_of::<T>()..][..size_of_val(out)], out);
        Ok(())
    })
}

fn narrow<T: Float>(
    start: usize,
    out: &mut [T],
    widen: &impl Fn(usize, &mut [f32]) -> Result<()>,
) -> Result<()> {
    let mut wide = [0f32; PIECE];
    let wide = &mut wide[..out.len()];
    widen(start, wide)?;
    if wide.iter().fold(true, |finite, value| finite & value.is_finite()) {
        T::narrow(wide, out);
        if !all_finite(out) {
            return Err(Error::invalid(format!(
                "holds values beyond the range of {}, the type it was to be read as",
                T::DTYPE.as_str()
            )));
        }
        return Ok(());
    }
    Err(not_finite())
}

fn fill<T: Float>(
    shape: &[usize],
    device: &Device,
    piece: impl Fn(usize, &mut [T]) -> Result<()> + Sync,
) -> Result<Tensor> {
    let mut values = T::zeros(shape.iter().product());
    values.par_chunks_mut(PIECE).enumerate().try_for_each(|(index, out)| {
        piece(index * PIECE, out)?;
        if all_finite(out) { Ok(()) } else { Err(not_finite()) }
    })?;
    Ok(Tensor::from_vec(values, shape, device)?)
}

/// Without branches in the loop, so that it runs at the speed of memory.
fn all_finite<T: Float>(values: &[T]) -> bool {
    values.iter().fold(true, |finite, value| finite & value.finite())
}

pub(super) fn not_finite() -> Error {
    Error::invalid("holds NaN or infinity; these weights are broken")
        .with_hint("fetch the model again, or look for a repaired copy")
}

fn not_a_float(dtype: DType) -> Error {
    Error::invalid(format!("is or was to be read as {}; weights are f32, f16 or bf16", dtype.as_str()))
}

/// The three types of weights.
trait Float: WithDType {
    /// Fresh pages straight from the allocator, touched first by the thread that fills them.
    fn zeros(len: usize) -> Vec<Self>;
    fn load(bytes: &[u8], out: &mut [Self]);
    fn narrow(wide: &[f32], out: &mut [Self]);
    fn finite(self) -> bool;
}

impl Float for f32 {
    fn zeros(len: usize) -> Vec<Self> {
        vec![0.0; len]
    }
    fn load(bytes: &[u8], out: &mut [Self]) {
        for (value, four) in out.iter_mut().zip(bytes.chunks_exact(4)) {
            *value = Self::from_le_bytes([four[0], four[1], four[2], four[3]]);
        }
    }
    fn narrow(wide: &[f32], out: &mut [Self]) {
        out.copy_from_slice(wide);
    }
    fn finite(self) -> bool {
        self.is_finite()
    }
}

impl Float for f16 {
    fn zeros(len: usize) -> Vec<Self> {
        vec![0u16; len].reinterpret_into()
    }
    fn load(bytes: &[u8], out: &mut [Self]) {
        for (value, two) in out.iter_mut().zip(bytes.chunks_exact(2)) {
            *value = Self::from_le_bytes([two[0], two[1]]);
        }
    }
    fn narrow(wide: &[f32], out: &mut [Self]) {
        out.convert_from_f32_slice(wide);
    }
    fn finite(self) -> bool {
        self.to_bits() & 0x7c00 != 0x7c00
    }
}

impl Float for bf16 {
    fn zeros(len: usize) -> Vec<Self> {
        vec![0u16; len].reinterpret_into()
    }
    fn load(bytes: &[u8], out: &mut [Self]) {
        for (value, two) in out.iter_mut().zip(bytes.chunks_exact(2)) {
            *value = Self::from_le_bytes([two[0], two[1]]);
        }
    }
    fn narrow(wide: &[f32], out: &mut [Self]) {
        for (value, wide) in out.iter_mut().zip(wide) {
            *value = Self::from_f32(*wide);
        }
    }
    fn finite(self) -> bool {
        self.to_bits() & 0x7f80 != 0x7f80
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes_of(values: &[f32], dtype: DType) -> Vec<u8> {
        match dtype {
            DType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            DType::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
            _ => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
        }
    }

    #[test]
    fn every_pair_of_types_agrees_with_candle() {
        let values: Vec<f32> = (0..PIECE + 7).map(|i| (i as f32 - 5000.0) / 37.0).collect();
        let reference = Tensor::new(&values[..], &Device::Cpu).unwrap();
        for stored in [DType::F32, DType::F16, DType::BF16] {
            let bytes = bytes_of(&values, stored);
            for wanted in [DType::F32, DType::F16, DType::BF16] {
                let read = from_floats(&bytes, stored, &[values.len()], wanted, &Device::Cpu).unwrap();
                let expected = reference.to_dtype(stored).unwrap().to_dtype(wanted).unwrap();
                assert_eq!(read.dtype(), wanted);
                let widened = |tensor: Tensor| tensor.to_dtype(DType::F32).unwrap().to_vec1::<f32>().unwrap();
                assert_eq!(widened(read), widened(expected), "{stored:?} as {wanted:?}");
            }
        }
    }

    #[test]
    fn broken_values_are_found_wherever_they_are() {
        for stored in [DType::F32, DType::F16, DType::BF16] {
            for (bad, position) in [(f32::NAN, 0), (f32::INFINITY, PIECE), (f32::NEG_INFINITY, PIECE + 6)] {
                let mut values = vec![1.0f32; PIECE + 7];
                values[position] = bad;
                let bytes = bytes_of(&values, stored);
                for wanted in [DType::F32, DType::F16, DType::BF16] {
                    let error =
                        from_floats(&bytes, stored, &[values.len()], wanted, &Device::Cpu).unwrap_err();
                    assert!(error.to_string().contains("NaN or infinity"), "{error}");
                }
            }
        }
    }

    #[test]
    fn a_value_too_large_for_f16_is_not_called_broken() {
        let bytes = bytes_of(&[1.0, 70_000.0], DType::F32);
        let error = from_floats(&bytes, DType::F32, &[2], DType::F16, &Device::Cpu).unwrap_err();
        assert!(error.to_string().contains("beyond the range of f16"), "{error}");
    }
}
