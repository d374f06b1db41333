//! The folder of a merged model: weights in the files of the base where that is possible, and what belongs to them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::plan::MergePlan;
use super::text::MergedText;
use crate::adapter::hf::Adapter;
use crate::error::{Context, Error, Result, open_regular};
use crate::model::Pretrained;
use crate::weights::{
    DEFAULT_SHARD_BYTES, SPECIAL_TOKENS, ShardedWriter, StoredType, TEMPLATE, TensorSpec, record_told,
    write_atomic,
};

const INDEX: &str = "model.safetensors.index.json";

/// Bytes of a file that are copied at once.
const PART: u64 = 1 << 28;

/// Refuses to write where the base is read from.
pub(super) fn refuse_base(model: &Pretrained, output: &Path) -> Result<()> {
    let base = model.checkpoint().path();
    match (fs::canonicalize(base), fs::canonicalize(output)) {
        (Ok(base), Ok(output)) if base == output => {
            Err(Error::request(format!("the output `{}` is the model that is merged into", output.display()))
                .with_hint("choose another folder with `--output`; the base is never changed"))
        }
        _ => Ok(()),
    }
}

/// Where tensors are written.
pub(super) enum Sink<'m> {
    /// Files of the base are copied, and the bytes of changed tensors are replaced in the copies.
    Patched { model: &'m Pretrained, files: BTreeMap<PathBuf, (PathBuf, File)> },
    /// New files are written, with a layout of their own.
    New(ShardedWriter),
}

impl<'m> Sink<'m> {
    /// Makes the files in `folder`: those of the base, with its names, header and order, if nothing but values changes.
    /// `go_on` is asked between the parts of large files.
    pub(super) fn new(
        model: &'m Pretrained,
        plan: &MergePlan<'_>,
        folder: &Path,
        go_on: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Self> {
        if !plan.keeps_layout(model) {
            let mut specs = Vec::new();
            for (name, output) in &plan.tensors {
                let stored = output.dtype.map_or(output.stored, StoredType::Float);
                let dtype = stored
                    .safetensors()
                    .ok_or_else(|| {
                        Error::invalid(format!("is stored as {stored}, which safetensors does not have"))
                    })
                    .in_tensor(name)?;
                specs.push(TensorSpec { name: name.clone(), dtype, shape: output.shape.clone() });
            }
            return Ok(Self::New(ShardedWriter::create(
                folder,
                &specs,
                &BTreeMap::new(),
                DEFAULT_SHARD_BYTES,
            )?));
        }
        let mut files = BTreeMap::new();
        for name in plan.tensors.keys() {
            let (from, _) = place(model, name)?;
            if files.contains_key(from) {
                continue;
            }
            let to = folder.join(from.file_name().unwrap_or_default());
            // Not `fs::copy`: it would make a read-only copy of a read-only file, and cannot be interrupted.
            let mut file = File::create(&to).at(&to)?;
            let mut original = open_regular(from).at(from)?;
            while std::io::copy(&mut (&mut original).take(PART), &mut file).at(&to)? == PART {
                go_on()?;
            }
            files.insert(from.to_path_buf(), (to, file));
        }
        let sharded = files.keys().any(|file| !file.ends_with("model.safetensors"));
        if let Some(base) = model.checkpoint().folder().filter(|_| sharded) {
            copy(&base.join(INDEX), &folder.join(INDEX))?;
        }
        Ok(Self::Patched { model, files })
    }

    /// Whether tensors that do not change have to be written too.
    pub(super) fn needs_copies(&self) -> bool {
        matches!(self, Self::New(_))
    }

    /// Writes the bytes of a tensor.
    pub(super) fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        match self {
            Self::New(writer) => writer.write_bytes(name, bytes),
            Self::Patched { model, files } => {
                let (from, range) = place(model, name)?;
                let (to, file) = files.get_mut(from).ok_or_else(|| no_place(name))?;
                if range.len() != bytes.len() {
                    return Err(Error::invalid(format!(
                        "has {} bytes, expected {}",
                        bytes.len(),
                        range.len()
                    )))
                    .in_tensor(name);
                }
                file.seek(SeekFrom::Start(range.start as u64)).at(&*to)?;
                file.write_all(bytes).at(&*to)
            }
        }
    }

    /// Closes the files.
    pub(super) fn finish(self) -> Result<()> {
        match self {
            Self::New(writer) => writer.finish(),
            Self::Patched { .. } => Ok(()),
        }
    }
}

/// Writes all that is not weights: configuration, tokenizer, templates, generation settings.
pub(super) fn write_companions(
    model: &Pretrained,
    adapters: &[Adapter],
    text: &MergedText,
    plan: &MergePlan<'_>,
    folder: &Path,
) -> Result<()> {
    model.write_companions(folder)?;
    text.write(folder)?;
    // Of several adapters the last one says what texts of the merged model are told.
    for adapter in adapters {
        let said = |key| Some((key, Some(adapter.metadata.get(key)?.clone())));
        let records: Vec<_> = [TEMPLATE, SPECIAL_TOKENS].into_iter().filter_map(said).collect();
        record_told(folder, &records)?;
    }
    let path = folder.join("config.json");
    if let Some(base) = model.checkpoint().folder().filter(|_| plan.keeps_layout(model)) {
        return copy(&base.join("config.json"), &path);
    }
    model.write_config(folder, plan.main_dtype())?;
    if plan.untied {
        let mut config: Value = serde_json::from_slice(&fs::read(&path).at(&path)?).at(&path)?;
        config["tie_word_embeddings"] = Value::from(false);
        write_atomic(&path, (serde_json::to_string_pretty(&config)? + "\n").as_bytes())?;
    }
    Ok(())
}

fn place<'m>(model: &'m Pretrained, name: &str) -> Result<(&'m Path, std::ops::Range<usize>)> {
    model.checkpoint().place_of(name).ok_or_else(|| no_place(name))
}

fn no_place(name: &str) -> Error {
    Error::invalid(format!("tensor `{name}` has no place in the files of the model"))
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    let mut file = File::create(to).at(to)?;
    std::io::copy(&mut open_regular(from).at(from)?, &mut file).at(to)?;
    Ok(())
}
