//! Whether the values of a stored tensor are numbers, read where they lie: for tensors that are copied without being
//! converted, which would notice.

use rayon::prelude::*;
use safetensors::Dtype;

use super::{Checkpoint, StoredType, convert, gguf};
use crate::error::{Context, Result};

/// Bytes that one thread looks at before the next piece; a multiple of the size of every type.
const PIECE: usize = 1 << 18;

impl Checkpoint {
    /// Refuses a tensor that holds NaN or infinity, by its name and file. The values are not copied.
    pub fn refuse_not_finite(&self, name: &str) -> Result<()> {
        let bytes = self.bytes(name)?;
        let finite = match self.info(name)?.dtype {
            StoredType::Quantized(stored) => gguf::all_finite(bytes, stored),
            stored => stored.safetensors().is_none_or(|dtype| all_finite(bytes, dtype)),
        };
        if finite { Ok(()) } else { Err(convert::not_finite()).in_tensor(name).at(self.file_of(name)) }
    }
}

/// Whether all values are finite. Integers always are, and so are floats of four and six bits, which have no other values.
fn all_finite(bytes: &[u8], dtype: Dtype) -> bool {
    match dtype {
        Dtype::F32 | Dtype::C64 => all(bytes, |value| u32::from_le_bytes(value) & 0x7f80_0000 != 0x7f80_0000),
        Dtype::F16 => all(bytes, |value| u16::from_le_bytes(value) & 0x7c00 != 0x7c00),
        Dtype::BF16 => all(bytes, |value| u16::from_le_bytes(value) & 0x7f80 != 0x7f80),
        Dtype::F64 => all(bytes, |value| u64::from_le_bytes(value) >> 52 & 0x7ff != 0x7ff),
        Dtype::F8_E5M2 => all(bytes, |[value]: [u8; 1]| value & 0x7c != 0x7c),
        Dtype::F8_E4M3 => all(bytes, |[value]: [u8; 1]| value & 0x7f != 0x7f),
        Dtype::F8_E4M3FNUZ | Dtype::F8_E5M2FNUZ => all(bytes, |[value]: [u8; 1]| value != 0x80),
        Dtype::F8_E8M0 => all(bytes, |[value]: [u8; 1]| value != 0xff),
        _ => true,
    }
}

/// Whether all values of `N` bytes are finite; without branches in the inner loop, so that it runs at the speed of memory.
fn all<const N: usize>(bytes: &[u8], is_finite: impl Fn([u8; N]) -> bool + Sync) -> bool {
    bytes.par_chunks(PIECE).all(|piece| {
        let (values, _) = piece.as_chunks::<N>();
        values.iter().fold(true, |finite, value| finite & is_finite(*value))
    })
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

    /// The bytes of `value` as the last of many that are finite.
    fn ending_in(value: &[u8]) -> Vec<u8> {
        [vec![0x01; 2 * PIECE], value.to_vec()].concat()
    }

    #[test]
    fn nan_and_infinity_are_found_in_every_type_and_nothing_else() {
        let wrong: [(Dtype, Vec<Vec<u8>>); 9] = [
            (
                Dtype::F32,
                [f32::NAN, f32::INFINITY, f32::NEG_INFINITY].map(|v| v.to_le_bytes().to_vec()).into(),
            ),
            (
                Dtype::F64,
                [f64::NAN, f64::INFINITY, f64::NEG_INFINITY].map(|v| v.to_le_bytes().to_vec()).into(),
            ),
            (
                Dtype::F16,
                [f16::NAN, f16::INFINITY, f16::NEG_INFINITY].map(|v| v.to_le_bytes().to_vec()).into(),
            ),
            (Dtype::BF16, [bf16::NAN, bf16::INFINITY].map(|v| v.to_le_bytes().to_vec()).into()),
            (Dtype::F8_E5M2, vec![vec![0x7c], vec![0xfc], vec![0x7f]]),
            (Dtype::F8_E4M3, vec![vec![0x7f], vec![0xff]]),
            (Dtype::F8_E4M3FNUZ, vec![vec![0x80]]),
            (Dtype::F8_E5M2FNUZ, vec![vec![0x80]]),
            (Dtype::F8_E8M0, vec![vec![0xff]]),
        ];
        for (dtype, values) in wrong {
            values
                .iter()
                .for_each(|value| assert!(!all_finite(&ending_in(value), dtype), "{dtype} {value:x?}"));
        }
        let right: [(Dtype, Vec<Vec<u8>>); 7] = [
            (Dtype::F32, [f32::MAX, f32::MIN, -0.0].map(|v| v.to_le_bytes().to_vec()).into()),
            (Dtype::F64, [f64::MAX, f64::MIN, -0.0].map(|v| v.to_le_bytes().to_vec()).into()),
            (Dtype::F16, [f16::MAX, f16::MIN].map(|v| v.to_le_bytes().to_vec()).into()),
            (Dtype::BF16, [bf16::MAX, bf16::MIN].map(|v| v.to_le_bytes().to_vec()).into()),
            (Dtype::F8_E5M2, vec![vec![0x7b], vec![0xfb]]),
            (Dtype::F8_E4M3, vec![vec![0x7e], vec![0xfe]]),
            (Dtype::I64, vec![vec![0xff; 8]]),
        ];
        for (dtype, values) in right {
            values
                .iter()
                .for_each(|value| assert!(all_finite(&ending_in(value), dtype), "{dtype} {value:x?}"));
        }
    }
}
