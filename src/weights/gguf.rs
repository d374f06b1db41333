//! GGUF files: header and metadata through candle, values from the mapped file: dequantized piece by piece when read, or
//! handed out as the blocks they are.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::io::Cursor;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::{CpuStorage, DType, Device, Tensor};
use half::f16;
use rayon::prelude::*;

use super::mapped::MappedFile;
use super::{StoredType, TensorInfo, convert, gguf_header};
use crate::error::{Context, Error, Result};

/// The metadata of a GGUF file.
pub type GgufMetadata = HashMap<String, Value>;

/// A mapped GGUF file and where in it each tensor is.
#[derive(Debug)]
pub(super) struct Gguf {
    pub(super) path: PathBuf,
    pub(super) metadata: GgufMetadata,
    map: Arc<MappedFile>,
    places: BTreeMap<String, (usize, usize)>,
}

impl Gguf {
    pub(super) fn open(path: &Path) -> Result<(Self, BTreeMap<String, TensorInfo>)> {
        let map = MappedFile::open(path)?;
        let content = read_header(&map).at(path)?;
        refuse_part(&content.metadata).at(path)?;
        let mut tensors = BTreeMap::new();
        let mut places = BTreeMap::new();
        for (name, info) in &content.tensor_infos {
            let place = place(&content, name, map.len()).in_tensor(name).at(path)?;
            places.insert(name.clone(), place);
            let shape = info.shape.dims().to_vec();
            let dtype = StoredType::from(info.ggml_dtype);
            tensors.insert(name.clone(), TensorInfo { name: name.clone(), shape, dtype });
        }
        Ok((
            Self { path: path.to_path_buf(), metadata: content.metadata, map: Arc::new(map), places },
            tensors,
        ))
    }

    /// The bytes of a tensor as they are stored.
    pub(super) fn bytes(&self, name: &str) -> Option<&[u8]> {
        let (start, end) = *self.places.get(name)?;
        Some(&self.map[start..end])
    }

    /// The same for as long as they are needed, the file closed or not.
    pub(super) fn shared(&self, name: &str) -> Option<MappedBytes> {
        let (start, end) = *self.places.get(name)?;
        Some(MappedBytes { map: Arc::clone(&self.map), start, end })
    }

    pub(super) fn refuse_changed(&self) -> Result<()> {
        self.map.refuse_changed()
    }

    /// Lets go of the pages that reading a tensor brought in.
    pub(super) fn release(&self, name: &str) {
        if let Some((start, end)) = self.places.get(name) {
            self.map.release(*start, *end);
        }
    }
}

/// Bytes of a mapped file.
#[derive(Debug, Clone)]
pub struct MappedBytes {
    map: Arc<MappedFile>,
    start: usize,
    end: usize,
}

impl AsRef<[u8]> for MappedBytes {
    fn as_ref(&self) -> &[u8] {
        &self.map[self.start..self.end]
    }
}

impl From<GgmlDType> for StoredType {
    fn from(dtype: GgmlDType) -> Self {
        match dtype {
            GgmlDType::F32 => Self::Float(DType::F32),
            GgmlDType::F16 => Self::Float(DType::F16),
            GgmlDType::BF16 => Self::Float(DType::BF16),
            other => Self::Quantized(other),
        }
    }
}

/// A tensor of `wanted` from ggml blocks.
pub(super) fn dequantize(
    bytes: &[u8],
    stored: GgmlDType,
    shape: &[usize],
    wanted: DType,
    device: &Device,
) -> Result<Tensor> {
    let (block, size) = (stored.block_size(), stored.type_size());
    convert::from_pieces(shape, wanted, device, |start, out| {
        let piece = &bytes[start / block * size..][..out.len() / block * size];
        let CpuStorage::F32(values) = stored.from_data(Cow::Borrowed(piece)).dequantize(out.len())? else {
            return Err(Error::invalid(format!("{stored:?} does not dequantize to f32")));
        };
        out.copy_from_slice(&values);
        Ok(())
    })
}

/// Whether every value that the blocks stand for is a number: integers are, so it is up to the scales.
pub(super) fn all_finite(blocks: &[u8], stored: GgmlDType) -> bool {
    let scales: &[usize] = match stored {
        GgmlDType::Q4_0 | GgmlDType::Q5_0 | GgmlDType::Q8_0 => &[0],
        GgmlDType::Q4_1 | GgmlDType::Q5_1 | GgmlDType::Q8_1 | GgmlDType::Q4K | GgmlDType::Q5K => &[0, 2],
        GgmlDType::Q2K => &[80, 82],
        GgmlDType::Q3K => &[108],
        GgmlDType::Q6K => &[208],
        // Scales in f32, or no blocks at all: what these are used for looks at the values.
        GgmlDType::Q8K | GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16 => &[],
    };
    let is_finite = |block: &[u8]| {
        let finite = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).is_finite();
        scales.iter().fold(true, |all, at| all & finite(*at))
    };
    let size = stored.type_size();
    let pieces = blocks.par_chunks(convert::PIECE * size);
    pieces.all(|piece| piece.chunks_exact(size).fold(true, |all, block| all & is_finite(block)))
}

/// A model may be split over several files, of which each is a GGUF file.
fn refuse_part(metadata: &GgufMetadata) -> Result<()> {
    let count = metadata.get("split.count").and_then(|count| count.to_u64().ok()).unwrap_or(1);
    if count <= 1 {
        return Ok(());
    }
    Err(Error::request(format!("is one of {count} parts of a model"))
        .with_hint("join the parts with `llama-gguf-split --merge`"))
}

fn read_header(map: &[u8]) -> Result<Content> {
    if map.get(..4) != Some(b"GGUF") {
        return Err(Error::invalid("does not begin with `GGUF`")
            .with_hint("give a .gguf file, or the folder of a model"));
    }
    // candle divides by the alignment that the file states, and of two entries of one name it keeps the last.
    gguf_header::check(map)?;
    Content::read(&mut Cursor::new(map)).map_err(|error| explain(&error))
}

/// First and last byte of a tensor.
fn place(content: &Content, name: &str, file_size: usize) -> Result<(usize, usize)> {
    let info = &content.tensor_infos[name];
    let (block, size) = (info.ggml_dtype.block_size(), info.ggml_dtype.type_size());
    let dims = info.shape.dims();
    let values = dims
        .iter()
        .try_fold(1usize, |product, n| product.checked_mul(*n))
        .filter(|values| values.is_multiple_of(block) && dims.last().is_some_and(|n| n.is_multiple_of(block)))
        .ok_or_else(|| {
            Error::invalid(format!("shape {dims:?} is no whole number of {block}-value blocks"))
        })?;
    let start = usize::try_from(content.tensor_data_offset.saturating_add(info.offset)).unwrap_or(usize::MAX);
    let end = (values / block).checked_mul(size).and_then(|bytes| start.checked_add(bytes));
    match end.filter(|end| *end <= file_size) {
        Some(_) if start % 4 != 0 => {
            Err(Error::invalid(format!("begins at byte {start}, which is not a multiple of 4")))
        }
        Some(end) => Ok((start, end)),
        None => {
            Err(Error::invalid(format!("reaches beyond the end of the file, which has {file_size} bytes"))
                .with_hint("a download or copy was cut short; fetch the file again"))
        }
    }
}

/// candle's message, or what it means where a type is one that it has no code for.
fn explain(error: &candle_core::Error) -> Error {
    const LATER: [(&str, &str); 12] = [
        ("16", "IQ2_XXS"),
        ("17", "IQ2_XS"),
        ("18", "IQ3_XXS"),
        ("19", "IQ1_S"),
        ("20", "IQ4_NL"),
        ("21", "IQ3_S"),
        ("22", "IQ2_S"),
        ("23", "IQ4_XS"),
        ("29", "IQ1_M"),
        ("34", "TQ1_0"),
        ("35", "TQ2_0"),
        ("39", "MXFP4"),
    ];
    let message = error.to_string();
    let message = message.lines().next().unwrap_or_default();
    let Some((_, number)) = message.split_once("unknown dtype for tensor ") else {
        return gguf_header::unreadable(message.to_string());
    };
    let name = LATER.iter().find(|(code, _)| *code == number.trim()).map_or(number, |(_, name)| name);
    Error::invalid(format!(
        "a tensor has the quantized type {name}, which is not supported; supported are F32, F16, BF16, Q4_0, Q4_1, \
         Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K and Q6_K"
    ))
    .with_hint("take a file quantized as one of these, for example Q4_K_M or Q8_0")
}
