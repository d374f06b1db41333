//! Whether two tensors of a checkpoint have the same values: that of a head which the configuration ties and that of the
//! embedding.

use candle_core::{DType, Device};

use crate::error::Result;
use crate::weights::Checkpoint;

/// Bytes that are compared before their memory is given back.
const PIECE: usize = 1 << 26;

/// Compares bytes where both are stored alike, else values in f32. Ends at the first piece that differs.
pub(super) fn same_values(checkpoint: &Checkpoint, one: &str, other: &str) -> Result<bool> {
    let (first, second) = (checkpoint.info(one)?, checkpoint.info(other)?);
    if first.shape != second.shape {
        return Ok(false);
    }
    let release = || [one, other].map(|name| checkpoint.release(name));
    if first.dtype == second.dtype {
        let pieces = checkpoint.bytes(one)?.chunks(PIECE).zip(checkpoint.bytes(other)?.chunks(PIECE));
        let mut same = true;
        for (x, y) in pieces {
            same = x == y;
            release();
            if !same {
                break;
            }
        }
        return Ok(same);
    }
    let [x, y] = [one, other].map(|name| checkpoint.read(name, DType::F32, &Device::Cpu));
    let same = x?.flatten_all()?.to_vec1::<f32>()? == y?.flatten_all()?.to_vec1::<f32>()?;
    release();
    Ok(same)
}
