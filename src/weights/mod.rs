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

mod adapter_text;
mod companion;
mod convert;
mod digest;
mod finite;
mod folder;
mod gguf;
mod gguf_header;
mod gguf_text;
mod header;
#[cfg(feature = "hub")]
mod hub;
mod json;
mod mapped;
pub mod output;
mod shards;
mod tensor;
mod text;
mod text_differences;
mod tokenizer;
mod told;
mod write;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde_json::Value;

use crate::error::{Context, Error, Result, is_there, nearest};
pub use adapter_text::AdapterText;
pub use companion::{TEMPLATES, is_companion};
pub use digest::hexadecimal;
use folder::Folder;
use gguf::Gguf;
pub use gguf::{GgufMetadata, MappedBytes};
pub use header::refuse_repeated_names;
#[cfg(feature = "hub")]
pub use hub::{HubSettings, OnProgress, report_downloads};
use json::{LARGEST_JSON, LARGEST_TOKENIZER, read_json, read_json_if_there, warnings_of_repeated_keys};
pub use mapped::mapped_path_at;
pub use shards::{
    DEFAULT_SHARD_BYTES, ShardedWriter, TensorSpec, overwrite, write_one_by_one, write_safetensors,
};
pub use tensor::{StoredType, TensorInfo};
pub use text::TextFiles;
pub use told::{SPECIAL_TOKENS, TEMPLATE, record as record_told};
pub use write::{Staged, remove_folder, remove_stale, write_atomic};

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
        #[cfg(feature = "hub")]
        return Self::open_with(source, &HubSettings::from_env());
        #[cfg(not(feature = "hub"))]
        Self::opened(source, |source| {
            Err(Error::request(format!("`{source}` is neither a folder nor a .gguf file"))
                .with_hint("ids of the Hub need a build with the cargo feature `hub`"))
        })
    }

    /// The same with settings of one's own. The Hub is only asked where no such path exists.
    #[cfg(feature = "hub")]
    pub fn open_with(source: &str, settings: &HubSettings) -> Result<Self> {
        Self::opened(source, |source| hub::find(source, settings))
    }

    /// Opens what is at a path, or in the folder that `elsewhere` finds.
    fn opened(source: &str, elsewhere: impl FnOnce(&str) -> Result<PathBuf>) -> Result<Self> {
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
            Store::folder(&elsewhere(source)?)?
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

    /// Reads the tokenizer and chat template beside an adapter, where they are not those of this model. `rows` is the number of
    /// tokens that the model's embedding has.
    pub fn adapter_text(&self, folder: &Path, rows: usize) -> Result<Option<AdapterText>> {
        AdapterText::of(self, folder, rows)
    }

    /// Warns of tokens that are said to end a text and that a vocabulary of this many tokens does not have.
    #[must_use]
    pub fn warnings_of_endings(&self, tokens: usize) -> Vec<String> {
        match (self.folder(), self.config_json()) {
            (Some(folder), Ok(config)) => text::warnings_of_endings(folder, &config, tokens),
            _ => Vec::new(),
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
        self.folder().map_or(Ok(()), |folder| companion::copy(folder, target))
    }

    /// Returns warnings about how the files are read.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        match &self.store {
            Store::Folder(folder) => &folder.warnings,
            Store::Gguf(_) => &[],
        }
    }

    /// Refuses companions that [`Self::write_companions`] would not copy, so that long work does not end with that.
    pub fn check_companions(&self) -> Result<()> {
        let Some(folder) = self.folder() else { return Ok(()) };
        companion::companions(folder)?.iter().try_for_each(|file| companion::read(file, folder).map(drop))
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

    /// An error that names a file of the weights which is not what it was when it was opened: call it before anything that
    /// was computed from them is published.
    pub fn refuse_changed(&self) -> Result<()> {
        match &self.store {
            Store::Folder(folder) => folder.refuse_changed(),
            Store::Gguf(gguf) => gguf.refuse_changed(),
        }
    }

    /// The error of work that read these weights; where a file of them has changed meanwhile, that is its cause.
    #[must_use]
    pub fn explain(&self, error: Error) -> Error {
        match error {
            Error::Interrupted { .. } => error,
            error => self.refuse_changed().err().unwrap_or(error),
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
