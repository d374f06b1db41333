//! Weights on disk: Hugging Face folders, GGUF files and Hub ids, read lazily, written atomically. Knows no model:
//! names and shapes are what the file says.
//!
//! ```no_run
//! use candle_core::{DType, Device};
//! use peft::weights::Checkpoint;
//!
//! let checkpoint = Checkpoint::open("path/to/model")?; // or `model.gguf`, or `org/name@revision`
//! for info in checkpoint.tensors().values() {
//!     let values = checkpoint.read(&info.name, DType::F32, &Device::Cpu)?;
//!     assert_eq!(values.dims(), info.shape);
//! }
//! # Ok::<(), peft::Error>(())
//! ```

mod companion;
mod convert;
mod digest;
mod folder;
mod gguf;
mod gguf_text;
mod hub;
mod json;
mod shards;
mod text;
mod write;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor};
use memmap2::Mmap;
use serde_json::Value;

use crate::error::{Context, Error, Result, is_there, nearest, open_regular};
use folder::Folder;
use gguf::Gguf;
pub use gguf::{GgufMetadata, MappedBytes};
pub use hub::{HubSettings, OnProgress, report_downloads};
use json::{LARGEST_JSON, LARGEST_TOKENIZER, read_json, read_json_if_there};
pub use shards::{
    DEFAULT_SHARD_BYTES, ShardedWriter, TensorSpec, overwrite, write_one_by_one, write_safetensors,
};
pub use text::TextFiles;
pub use write::{Staged, refuse_below_file, refuse_occupied, remove_folder, remove_stale, write_atomic};

/// A tensor as its file has it, without its values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// The name in the file.
    pub name: String,
    /// The shape, rows first.
    pub shape: Vec<usize>,
    /// How the values are stored.
    pub dtype: StoredType,
}

impl TensorInfo {
    /// How many values there are.
    #[must_use]
    pub fn num_values(&self) -> usize {
        self.shape.iter().product()
    }

    /// How many bytes the values take in the file.
    #[must_use]
    pub fn size_in_bytes(&self) -> usize {
        match self.dtype {
            StoredType::Float(dtype) => self.num_values() * dtype.size_in_bytes(),
            StoredType::Quantized(dtype) => self.num_values() / dtype.block_size() * dtype.type_size(),
            StoredType::Other(dtype) => self.num_values() * dtype.bitsize() / 8,
        }
    }
}

/// How values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoredType {
    /// f32, f16 or bf16: what can be read as it is.
    Float(DType),
    /// One of ggml's block formats.
    Quantized(GgmlDType),
    /// What a safetensors file may hold besides: copied, never read.
    Other(safetensors::Dtype),
}

impl StoredType {
    /// The type in a safetensors file; quantized values have none.
    #[must_use]
    pub fn safetensors(self) -> Option<safetensors::Dtype> {
        match self {
            Self::Float(DType::F32) => Some(safetensors::Dtype::F32),
            Self::Float(DType::F16) => Some(safetensors::Dtype::F16),
            Self::Float(DType::BF16) => Some(safetensors::Dtype::BF16),
            Self::Other(dtype) => Some(dtype),
            Self::Float(_) | Self::Quantized(_) => None,
        }
    }
}

impl From<safetensors::Dtype> for StoredType {
    fn from(dtype: safetensors::Dtype) -> Self {
        match dtype {
            safetensors::Dtype::F32 => Self::Float(DType::F32),
            safetensors::Dtype::F16 => Self::Float(DType::F16),
            safetensors::Dtype::BF16 => Self::Float(DType::BF16),
            other => Self::Other(other),
        }
    }
}

impl fmt::Display for StoredType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Float(dtype) => f.write_str(dtype.as_str()),
            Self::Quantized(dtype) => f.write_str(&format!("{dtype:?}").to_lowercase()),
            Self::Other(dtype) => f.write_str(&dtype.to_string().to_lowercase()),
        }
    }
}

/// An open checkpoint: names, shapes and types are known, values are read when asked for.
#[derive(Debug)]
pub struct Checkpoint {
    source: String,
    store: Store,
    tensors: BTreeMap<String, TensorInfo>,
}

#[derive(Debug)]
enum Store {
    Folder(Folder),
    Gguf(Gguf),
}

impl Store {
    fn folder(path: &Path) -> Result<(Self, BTreeMap<String, TensorInfo>)> {
        let (folder, tensors) = Folder::open(path)?;
        Ok((Self::Folder(folder), tensors))
    }
}

impl Checkpoint {
    /// Opens a folder, a `.gguf` file or a Hub id (`org/name[@revision]`). Reads no values.
    pub fn open(source: &str) -> Result<Self> {
        Self::open_with(source, &HubSettings::from_env())
    }

    /// The same with settings of one's own. The Hub is only asked where no such path exists.
    pub fn open_with(source: &str, settings: &HubSettings) -> Result<Self> {
        let path = Path::new(source);
        let (store, tensors) = if path.is_dir() {
            Store::folder(path)?
        } else if path.is_file() && path.extension().is_some_and(|extension| extension == "safetensors") {
            return Err(Error::request(format!("`{source}` is a single file of weights"))
                .with_hint("give the folder it is in, which has the model's `config.json` too"));
        } else if is_there(path) {
            let (gguf, tensors) = Gguf::open(path)?;
            (Store::Gguf(gguf), tensors)
        } else {
            Store::folder(&hub::find(source, settings)?)?
        };
        Ok(Self { source: source.to_string(), store, tensors })
    }

    /// What it was opened from, as it was written.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.source
    }

    /// The folder or the file on this machine.
    #[must_use]
    pub fn path(&self) -> &Path {
        match &self.store {
            Store::Folder(folder) => &folder.path,
            Store::Gguf(gguf) => &gguf.path,
        }
    }

    /// The folder, unless it is a GGUF file.
    #[must_use]
    pub fn folder(&self) -> Option<&Path> {
        match &self.store {
            Store::Folder(folder) => Some(&folder.path),
            Store::Gguf(_) => None,
        }
    }

    /// Whether it is a GGUF file.
    #[must_use]
    pub fn is_gguf(&self) -> bool {
        self.gguf_metadata().is_some()
    }

    /// The metadata of a GGUF file.
    #[must_use]
    pub fn gguf_metadata(&self) -> Option<&GgufMetadata> {
        match &self.store {
            Store::Folder(_) => None,
            Store::Gguf(gguf) => Some(&gguf.metadata),
        }
    }

    /// The folder's `config.json`. A GGUF file has none; its model is described by its metadata.
    pub fn config_json(&self) -> Result<Value> {
        match &self.store {
            Store::Folder(folder) => read_json(&folder.path.join("config.json")),
            Store::Gguf(gguf) => {
                Err(Error::invalid("is a GGUF file and has no `config.json`")).at(&gguf.path)
            }
        }
    }

    /// Tokenizer, chat template and special tokens.
    pub fn text(&self) -> Result<TextFiles> {
        match &self.store {
            Store::Folder(folder) => TextFiles::from_folder(&folder.path, &self.config_json()?),
            Store::Gguf(gguf) => TextFiles::from_gguf(&gguf.metadata).at(&gguf.path),
        }
    }

    /// The files of a folder that belong to a copy with other weights: tokenizer, templates, generation settings.
    pub fn companions(&self) -> Result<Vec<PathBuf>> {
        match &self.store {
            Store::Folder(folder) => companion::companions(&folder.path),
            Store::Gguf(_) => Ok(Vec::new()),
        }
    }

    /// Puts these files into another folder, byte for byte; those of a GGUF file are made from its metadata.
    pub fn write_companions(&self, target: &Path) -> Result<()> {
        if self.is_gguf() {
            return self.text()?.write(target);
        }
        for file in self.companions()? {
            let copy = target.join(file.file_name().unwrap_or_default());
            // Not `fs::copy`, which would follow any link, and make a read-only copy of a read-only file.
            std::fs::write(&copy, companion::read(&file)?).at(&copy)?;
        }
        Ok(())
    }

    /// Refuses companions that [`Self::write_companions`] would not copy, so that long work does not end with that.
    pub fn check_companions(&self) -> Result<()> {
        self.companions()?.iter().try_for_each(|file| companion::read(file).map(drop))
    }

    /// Every tensor, by its name in the file.
    #[must_use]
    pub fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }

    /// Shape and type of a tensor.
    pub fn info(&self, name: &str) -> Result<&TensorInfo> {
        self.tensors.get(name).ok_or_else(|| {
            let near = nearest(name, self.tensors.keys().map(String::as_str), 1);
            let error = Error::invalid(format!("`{}` has no tensor `{name}`", self.source));
            match near.first() {
                Some(near) => error.with_hint(format!("nearest is `{near}`")),
                None => error,
            }
        })
    }

    /// Bytes of the largest tensor in the file.
    #[must_use]
    pub fn largest_tensor(&self) -> usize {
        self.tensors.values().map(TensorInfo::size_in_bytes).max().unwrap_or(0)
    }

    /// The values of a tensor in the wanted type; quantized ones are dequantized. NaN and infinity are errors.
    pub fn read(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        self.read_part(name, 0, &self.info(name)?.shape, dtype, device)
    }

    /// The values from number `first` on that fill `shape`; of a quantized tensor only all of them.
    pub fn read_part(
        &self,
        name: &str,
        first: usize,
        shape: &[usize],
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        let info = self.info(name)?;
        let end = first + shape.iter().product::<usize>();
        if end > info.num_values() {
            let found = info.num_values();
            return Err(Error::invalid(format!("has {found} values, expected {end}"))).in_tensor(name);
        }
        let bytes = self.bytes(name)?;
        let tensor = match info.dtype {
            StoredType::Float(stored) => {
                let size = stored.size_in_bytes();
                convert::from_floats(&bytes[first * size..end * size], stored, shape, dtype, device)
            }
            StoredType::Quantized(stored) => gguf::dequantize(bytes, stored, shape, dtype, device),
            StoredType::Other(_) => {
                Err(Error::invalid(format!("is stored as {}; weights are f32, f16 or bf16", info.dtype)))
            }
        };
        self.release(name);
        tensor.in_tensor(name).at(self.file_of(name))
    }

    /// The blocks of a quantized tensor as they are stored, for those who compute with them: the bytes of the mapped file,
    /// which stays mapped as long as they are in use. NaN and infinity are errors.
    pub fn read_blocks(&self, name: &str) -> Result<MappedBytes> {
        let info = self.info(name)?;
        let (StoredType::Quantized(stored), Store::Gguf(gguf)) = (info.dtype, &self.store) else {
            return Err(Error::invalid(format!("is stored as {}, not quantized", info.dtype)))
                .in_tensor(name)
                .at(self.file_of(name));
        };
        let Some(blocks) = gguf.shared(name) else {
            return Err(Error::invalid(format!("`{}` has no tensor `{name}`", self.source)));
        };
        if gguf::all_finite(blocks.as_ref(), stored) {
            return Ok(blocks);
        }
        Err(convert::not_finite()).in_tensor(name).at(self.file_of(name))
    }

    /// The bytes of a tensor as they are stored. Its pages stay in memory until [`Self::release`].
    pub fn bytes(&self, name: &str) -> Result<&[u8]> {
        let bytes = match &self.store {
            Store::Folder(folder) => folder.bytes(name),
            Store::Gguf(gguf) => gguf.bytes(name),
        };
        bytes.ok_or_else(|| Error::invalid(format!("`{}` has no tensor `{name}`", self.source)))
    }

    /// Gives back the memory that the bytes of a tensor took; reading it again is allowed.
    pub fn release(&self, name: &str) {
        match &self.store {
            Store::Folder(folder) => folder.release(name),
            Store::Gguf(gguf) => gguf.release(name),
        }
    }

    /// Gives back what reading tensors left of a folder's files: the system reads more than it is asked for. Of a GGUF file
    /// the pages stay, for its weights are computed with where they are.
    pub fn release_files(&self) {
        if let Store::Folder(folder) = &self.store {
            folder.release_all();
        }
    }

    /// The safetensors file that holds a tensor and where in it its bytes are; `None` in a GGUF file.
    #[must_use]
    pub fn place_of(&self, name: &str) -> Option<(&Path, std::ops::Range<usize>)> {
        match &self.store {
            Store::Folder(folder) => Some((folder.file_of(name)?, folder.range_of(name)?)),
            Store::Gguf(_) => None,
        }
    }

    fn file_of(&self, name: &str) -> &Path {
        match &self.store {
            Store::Folder(folder) => folder.file_of(name).unwrap_or(&folder.path),
            Store::Gguf(gguf) => &gguf.path,
        }
    }
}

/// Maps a file.
fn map(path: &Path) -> Result<Mmap> {
    let file = open_regular(path).at(path)?;
    // SAFETY: the map is read-only. Another process that cuts the file while it is mapped could end this one with a
    // bus error; every program that maps weights takes that risk, and files here are replaced by renaming.
    unsafe { Mmap::map(&file) }.at(path)
}

/// Drops the pages of a mapped range, so that what was read and converted is not in memory twice.
fn release(map: &Mmap, start: usize, end: usize) {
    #[cfg(unix)]
    if end > start {
        // SAFETY: the map is a read-only view of a file; dropped pages are read from the file again when touched.
        // An error leaves the pages where they are, which is correct too.
        let _ = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, end - start) };
    }
    #[cfg(not(unix))]
    let _ = (map, start, end);
}
