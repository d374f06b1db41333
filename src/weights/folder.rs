//! A Hugging Face folder: `model.safetensors`, or `model.safetensors.index.json` and its shards, mapped into memory.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use safetensors::tensor::{Metadata, SafeTensors};
use serde_json::Value;

use super::mapped::MappedFile;
use super::{StoredType, TensorInfo};
use crate::error::{Context, Error, Result, is_there};

pub(super) const SINGLE: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// The mapped files of a folder and where in them each tensor is.
#[derive(Debug)]
pub(super) struct Folder {
    pub(super) path: PathBuf,
    /// Holds warnings about the files for the user.
    pub(super) warnings: Vec<String>,
    shards: Vec<MappedFile>,
    places: BTreeMap<String, Place>,
}

/// Tensors of names that a later shard has too, with their shapes and types.
type Overlaid = BTreeMap<String, Vec<(Place, TensorInfo)>>;

#[derive(Debug, Clone, Copy)]
struct Place {
    shard: usize,
    start: usize,
    end: usize,
}

impl Folder {
    pub(super) fn open(path: &Path) -> Result<(Self, BTreeMap<String, TensorInfo>)> {
        let mut folder = Self {
            path: path.to_path_buf(),
            warnings: super::warnings_of_repeated_keys(path),
            shards: Vec::new(),
            places: BTreeMap::new(),
        };
        let (mut tensors, mut overlaid) = (BTreeMap::new(), Overlaid::new());
        if is_there(&path.join(SINGLE)) {
            folder.add_shard(SINGLE, &mut tensors, &mut overlaid)?;
        } else if is_there(&path.join(INDEX)) {
            let promised = read_index(&path.join(INDEX))?;
            for shard in promised.values().collect::<BTreeSet<_>>() {
                folder.add_shard(shard, &mut tensors, &mut overlaid)?;
            }
            folder.check_promised(&promised)?;
            folder.check_overlaid(&overlaid, &promised, &tensors).at(path.join(INDEX))?;
        } else {
            return Err(no_weights(path)).at(path);
        }
        Ok((folder, tensors))
    }

    /// The bytes of a tensor as they are stored.
    pub(super) fn bytes(&self, name: &str) -> Option<&[u8]> {
        self.places.get(name).map(|place| self.bytes_at(place))
    }

    /// The file that holds a tensor.
    pub(super) fn file_of(&self, name: &str) -> Option<&Path> {
        Some(self.shards[self.places.get(name)?.shard].path())
    }

    /// Where in its file a tensor is.
    pub(super) fn range_of(&self, name: &str) -> Option<std::ops::Range<usize>> {
        self.places.get(name).map(|place| place.start..place.end)
    }

    /// Lets go of the pages that reading a tensor brought in.
    pub(super) fn release(&self, name: &str) {
        if let Some(place) = self.places.get(name) {
            self.shards[place.shard].release(place.start, place.end);
        }
    }

    /// Lets go of all pages of all files.
    pub(super) fn release_all(&self) {
        for shard in &self.shards {
            shard.release(0, shard.len());
        }
    }

    pub(super) fn refuse_changed(&self) -> Result<()> {
        self.shards.iter().try_for_each(MappedFile::refuse_changed)
    }

    /// Adds the tensors of a file; of two of one name the later file's counts, as in transformers.
    fn add_shard(
        &mut self,
        name: &str,
        tensors: &mut BTreeMap<String, TensorInfo>,
        overlaid: &mut Overlaid,
    ) -> Result<()> {
        let path = self.path.join(name);
        let map = MappedFile::open(&path)?;
        super::refuse_repeated_names(&map).at(&path)?;
        let (header, metadata) =
            SafeTensors::read_metadata(&map).map_err(|error| explain(error, &map)).at(&path)?;
        let data = 8 + header;
        let shard = self.shards.len();
        for (tensor, info) in metadata.tensors() {
            let (start, end) = (data + info.data_offsets.0, data + info.data_offsets.1);
            let info = TensorInfo {
                name: tensor.clone(),
                shape: info.shape.clone(),
                dtype: StoredType::from(info.dtype),
            };
            let earlier = self.places.insert(tensor.clone(), Place { shard, start, end });
            let earlier = earlier.zip(tensors.insert(tensor.clone(), info));
            overlaid.entry(tensor).or_default().extend(earlier);
        }
        self.shards.push(map);
        overlaid.retain(|_, earlier| !earlier.is_empty());
        Ok(())
    }

    fn check_promised(&self, promised: &BTreeMap<String, String>) -> Result<()> {
        let mut absent = promised.iter().filter(|(name, _)| !self.places.contains_key(*name));
        let Some((name, shard)) = absent.next() else { return Ok(()) };
        let more = match absent.count() {
            0 => String::new(),
            count => format!(" (and {count} more like it)"),
        };
        Err(Error::invalid(format!("tensor `{name}` should be in `{shard}`, but is not there{more}"))
            .with_hint("the index and the shards are of different models, or a shard is incomplete; fetch them again"))
        .at(self.path.join(shard))
    }

    /// Refuses shards of which the index names one for a tensor and transformers reads another, with other values.
    fn check_overlaid(
        &mut self,
        overlaid: &Overlaid,
        promised: &BTreeMap<String, String>,
        tensors: &BTreeMap<String, TensorInfo>,
    ) -> Result<()> {
        let Some(first) = overlaid.keys().next() else { return Ok(()) };
        for (name, earlier) in overlaid {
            let last = self.places[name];
            let is_named =
                |place: &Place| promised.get(name).is_some_and(|named| *named == self.file_name(place));
            let Some((place, info)) = earlier.iter().find(|(place, _)| is_named(place)) else { continue };
            if *info == tensors[name] && self.bytes_at(place) == self.bytes_at(&last) {
                continue;
            }
            let (named, last) = (self.file_name(place), self.file_name(&last));
            return Err(Error::invalid(format!(
                "tensor `{name}` should be in `{named}`, and `{last}` has another one of that name, which transformers reads"
            ))
            .with_hint(format!("name `{last}` for it in the index, or take it out of `{last}`")));
        }
        let (name, last) = (first, self.file_name(&self.places[first]));
        let what = match overlaid.len() {
            1 => format!("tensor `{name}` is in several files and is read from `{last}`"),
            many => format!("{many} tensors are in several files; `{name}` is read from `{last}`"),
        };
        self.warnings.push(format!("{what}, the last by name, as in transformers"));
        Ok(())
    }

    fn file_name(&self, place: &Place) -> String {
        let name = self.shards[place.shard].path().file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }

    fn bytes_at(&self, place: &Place) -> &[u8] {
        &self.shards[place.shard][place.start..place.end]
    }
}

/// Tensor names and the shards they are in.
fn read_index(path: &Path) -> Result<BTreeMap<String, String>> {
    let index: Value = super::read_json(path)?;
    let map = index
        .get("weight_map")
        .and_then(Value::as_object)
        .filter(|map| !map.is_empty())
        .ok_or_else(|| Error::invalid("`weight_map` must be a table of tensor names and file names"))
        .at(path)?;
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut promised = BTreeMap::new();
    for (name, shard) in map {
        let shard = shard.as_str().unwrap_or_default();
        if Path::new(shard).file_name().is_none_or(|file| file != shard) {
            return Err(Error::invalid(format!(
                "`weight_map` names `{shard}`, expected a file in the same folder"
            )))
            .at(path);
        }
        if !folder.join(shard).exists() {
            return Err(Error::invalid(format!("shard `{shard}`, which holds tensor `{name}`, is missing"))
                .with_hint("copy or fetch all files of the model"))
            .at(path);
        }
        promised.insert(name.clone(), shard.to_string());
    }
    Ok(promised)
}

/// Says how many bytes are missing where that is what is wrong.
fn explain(error: safetensors::SafeTensorError, map: &[u8]) -> Error {
    let promised = || {
        let length = u64::from_le_bytes(map.get(..8)?.try_into().ok()?);
        let end = usize::try_from(length).ok()?.checked_add(8)?;
        let metadata: Metadata = serde_json::from_slice(map.get(8..end)?).ok()?;
        end.checked_add(metadata.data_len())
    };
    let header = map.get(..8).and_then(|bytes| Some(u64::from_le_bytes(bytes.try_into().ok()?)));
    match promised() {
        Some(expected) if expected != map.len() => {
            Error::invalid(format!("the file has {} bytes, its header promises {expected}", map.len()))
                .with_hint("a download or copy was cut short; fetch the file again")
        }
        // The longest header that the format allows.
        None if header.is_some_and(|bytes| bytes <= 100_000_000 && bytes + 8 > map.len() as u64) => {
            Error::invalid(format!("the file has {} bytes, and ends within its header", map.len()))
                .with_hint("a download or copy was cut short; fetch the file again")
        }
        _ => Error::from(error),
    }
}

/// Why a folder has no weights to read, as far as its files tell.
fn no_weights(path: &Path) -> Error {
    let names: Vec<String> = std::fs::read_dir(path)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect();
    let any = |test: &dyn Fn(&str) -> bool| names.iter().any(|name| test(name));
    let missing = format!("holds neither `{SINGLE}` nor `{INDEX}`");
    if any(&|name| name == "adapter_config.json") {
        return Error::request(format!("{missing}; it is an adapter"))
            .with_hint("give the model that it was trained on, and this folder as the adapter beside it");
    }
    if any(&|name| name.ends_with(".gguf")) {
        return Error::request(format!("{missing}, but a .gguf file"))
            .with_hint("give the path of the .gguf file itself");
    }
    if any(&|name| [".bin", ".pt", ".pth"].iter().any(|ending| name.ends_with(ending))) {
        return Error::request(format!(
            "{missing}, only pickled weights, which can run code when they are read"
        ))
        .with_hint("save the model with transformers as safetensors, or take a revision that has them");
    }
    Error::request(missing).with_hint("give the folder of a model as transformers saves it")
}
