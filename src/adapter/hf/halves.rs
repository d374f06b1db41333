//! Gate and up of one product, given back the ranks that were their own. What holds both in one parameter has the `A` of both
//! below one another, and in `B` zeros where the one meets the ranks of the other: as [`super::joined`] and PEFT write them.

use candle_core::Tensor;

use super::Adapter;
use crate::adapter::lora::tensor_names;
use crate::error::{Context, Error, Result};

/// Paths of gate and up that have an `A` in common.
pub(super) type Pair = [String; 2];

impl Adapter {
    /// Removes from gate and up the half of the ranks in which their `B` is zero, if it is zero in all pairs. Returns whether
    /// it did; where every `B` is zero throughout, nothing is removed.
    ///
    /// A half that is zero in some of them only stays, as the rank of a projection is the same in all layers.
    pub(super) fn halve(&mut self, pairs: &[Pair], rank: usize) -> Result<bool> {
        if pairs.is_empty() || !rank.is_multiple_of(2) {
            return Ok(false);
        }
        let half = rank / 2;
        let mut any = false;
        for pair in pairs {
            for (path, other) in pair.iter().zip([half, 0]) {
                let b = self.tensor(&tensor_names(path).b)?;
                if !is_zero(&b.narrow(1, other, half)?)? {
                    return Ok(false);
                }
                any |= !is_zero(b)?;
            }
        }
        if !any {
            return Ok(false);
        }
        for pair in pairs {
            for (path, own) in pair.iter().zip([0, half]) {
                let names = tensor_names(path);
                for (name, side) in [(names.a, 0), (names.b, 1)] {
                    // A copy, so that the other half is not kept in memory.
                    let part = self.tensor(&name)?.narrow(side, own, half)?.force_contiguous()?;
                    self.tensors.insert(name, part);
                }
            }
        }
        Ok(true)
    }

    fn tensor(&self, name: &str) -> Result<&Tensor> {
        self.tensors.get(name).ok_or_else(|| Error::invalid("is missing")).in_tensor(name)
    }
}

fn is_zero(values: &Tensor) -> Result<bool> {
    Ok(values.abs()?.max_all()?.to_scalar::<f32>()? == 0.0)
}
