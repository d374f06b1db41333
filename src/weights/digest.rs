//! A digest of a checkpoint that tells other weights of the same shapes apart without reading them all: names, shapes,
//! types and, of each tensor, two samples. Training moves nearly every value, so a sample of each tensor sees it. And
//! digests of whole tensors, for those who have to know that nothing else changed.

use std::collections::BTreeMap;

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::Checkpoint;
use crate::error::Result;

/// Bytes of a sample: a page, which is what the system reads at least.
const SAMPLE: usize = 4096;

impl Checkpoint {
    /// The digest. How tensors are spread over files does not enter it, so that the same weights in other shards have the
    /// same; a model of 10 GB takes some megabytes of reading.
    pub fn digest(&self) -> Result<String> {
        let mut hash = Sha256::new();
        for (name, info) in self.tensors() {
            let bytes = self.bytes(name)?;
            hash.update(format!("{name} {:?} {} {}\n", info.shape, info.dtype, bytes.len()));
            // The last values too: of an embedding the first rows are often those of tokens that nobody uses.
            hash.update(&bytes[..bytes.len().min(SAMPLE)]);
            hash.update(&bytes[bytes.len().saturating_sub(SAMPLE)..]);
            self.release(name);
        }
        Ok(hexadecimal(&hash.finalize()))
    }

    /// SHA-256 of all bytes of each tensor, by its name in the file. Reads everything.
    pub fn tensor_digests(&self) -> Result<BTreeMap<String, [u8; 32]>> {
        let of = |name: &String| -> Result<(String, [u8; 32])> {
            let digest = Sha256::digest(self.bytes(name)?).into();
            self.release(name);
            Ok((name.clone(), digest))
        };
        self.tensors().par_iter().map(|(name, _)| of(name)).collect()
    }
}

/// A digest as it is written into files and messages.
#[must_use]
pub fn hexadecimal(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}
