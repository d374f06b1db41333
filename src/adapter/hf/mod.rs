//! The adapter folder of Hugging Face PEFT: `adapter_config.json`, `adapter_model.safetensors`, `README.md`.
//!
//! What is written has only keys that PEFT knows since 0.10, and newer ones where they are needed. What is read is
//! checked as PEFT does not: every tensor must be used, every adapted layer complete, and whatever changes the
//! mathematics and is not built here is refused by name.

mod card;
mod config;
mod experts;
mod fields;
mod fused;
mod halves;
mod joined;
mod tensors;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::{DType, Device, Tensor};

use super::config::LoraConfig;
use super::lora::tensor_names;
use super::target::{Placements, few, place};
use crate::error::{Context, Error, Result, is_there, nearest_path};
use crate::model::Pretrained;
use crate::model::config::{DecoderConfig, EMBEDDING, HEAD};
use crate::weights::write_atomic;

pub(crate) use card::shell_word;

/// The configuration's file.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The tensors' file.
pub const TENSORS_FILE: &str = "adapter_model.safetensors";
/// The model card's file.
pub const CARD_FILE: &str = "README.md";

/// Metadata of the tensors' file of an adapter that this program has written: its version.
pub const WRITER: &str = "peft_rs_version";

/// Hint for adapters that are refused: merge them with PEFT first.
const MERGED_FORM: &str = "PEFT can put it into the weights: `model.merge_and_unload()`, save that model, and give it without the adapter";

/// An adapter as its folder has it.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// The folder, as it was named.
    pub source: String,
    /// Rank, scale and targets. Seeds are not on disk and have their defaults; `alpha` is always said.
    pub config: LoraConfig,
    /// The model it was trained on, as its trainer called it.
    pub base_model: Option<String>,
    /// Branch, tag or commit of that model.
    pub revision: Option<String>,
    /// In f32, by name without the prefix `base_model.model.`: see [`tensor_names`].
    pub tensors: BTreeMap<String, Tensor>,
    /// Copies of the model's own embedding or head, which PEFT adds where these are targeted: [`Adapter::fit`] makes
    /// sure that they are copies.
    pub copies: BTreeMap<String, Tensor>,
    /// The parameters, named in `target_parameters`, that PEFT puts an adapter on directly: see [`Adapter::for_model`].
    pub parameters: Vec<String>,
    /// The version of PEFT that wrote it, where it says so.
    pub peft_version: Option<String>,
    /// Trained weights of routers, in f32 by name.
    pub routers: BTreeMap<String, Tensor>,
    /// What its trainer noted in the tensors' file.
    pub metadata: BTreeMap<String, String>,
    /// What was found and left aside because it changes nothing.
    pub warnings: Vec<String>,
}

impl Adapter {
    /// Reads the folder; says nothing yet about a model.
    pub fn read(folder: &Path, device: &Device) -> Result<Self> {
        let path = folder.join(CONFIG_FILE);
        if !is_there(&path) {
            return Err(no_adapter(folder));
        }
        let read = config::read(&path)?;
        let path = folder.join(TENSORS_FILE);
        if !is_there(&path) {
            return Err(missing_tensors(folder));
        }
        let tensors::Read { tensors, copies, routers, metadata } =
            tensors::read(&path, read.config.lora_bias, device)?;
        Ok(Self {
            source: folder.display().to_string(),
            config: read.config,
            base_model: read.base_model,
            revision: read.revision,
            tensors,
            copies,
            parameters: read.parameters,
            peft_version: read.peft_version,
            routers,
            metadata,
            warnings: read.warnings,
        })
    }

    /// Where the adapter goes on the model, whose embedding and head are those that the adapter holds copies of.
    pub fn fit(&self, model: &Pretrained) -> Result<Placements> {
        for (name, copy) in &self.copies {
            // A tied head is the embedding.
            let tied = model.config().tie_word_embeddings && name == HEAD;
            let original = model.read(if tied { EMBEDDING } else { name }, DType::F32, copy.device())?;
            if copy.dims() != original.dims() {
                return Err(self.not_a_copy(
                    name,
                    &format!("has shape {:?}, and the model\'s {:?}", copy.dims(), original.dims()),
                ));
            }
            let difference = (copy.to_dtype(DType::F32)? - original)?.abs()?.max_all()?.to_scalar::<f32>()?;
            if difference != 0.0 {
                return Err(
                    self.not_a_copy(name, &format!("differs from the model\'s by up to {difference}"))
                );
            }
        }
        self.place(model.config())
    }

    /// Where the adapter goes on `model`: every tensor has its layer there, and the shape that rank and layer ask for.
    /// Refuses copies, which take the model itself to judge: see [`Adapter::fit`].
    pub fn placements(&self, model: &DecoderConfig) -> Result<Placements> {
        match self.copies.keys().next() {
            Some(name) => Err(self.not_a_copy(name, "is a whole tensor of the model")),
            None => self.place(model),
        }
    }

    fn place(&self, model: &DecoderConfig) -> Result<Placements> {
        // A pattern of this file that takes too long is no fault of the request.
        let resolved = place(&self.config, model)
            .map_err(|error| Error::invalid(error.to_string()))
            .at(Path::new(&self.source).join(CONFIG_FILE))?;
        let mut expected: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for placement in &resolved.placements {
            let names = tensor_names(&placement.linear.path);
            expected.insert(names.a, vec![placement.rank, placement.linear.in_features]);
            expected.insert(names.b, vec![placement.linear.out_features, placement.rank]);
            if self.config.lora_bias {
                expected.insert(names.bias, vec![placement.linear.out_features]);
            }
        }
        let mut wrong = Vec::new();
        let paths: Vec<String> = model.linears().into_iter().map(|linear| linear.path).collect();
        for (name, tensor) in &self.tensors {
            match expected.get(name) {
                None if paths.iter().any(|path| tensors::is_of(name, path)) => {
                    wrong.push(format!("`{name}` is on a layer that the configuration does not target"));
                }
                None => wrong.push(format!("`{name}` is on a layer that the model does not have")),
                Some(shape) if tensor.dims() != shape => {
                    wrong.push(format!("`{name}` has shape {:?}, expected {shape:?}", tensor.dims()));
                }
                Some(_) => {}
            }
        }
        let shapes: BTreeMap<String, Vec<usize>> =
            if self.routers.is_empty() { BTreeMap::new() } else { model.tensors().into_iter().collect() };
        for (name, tensor) in &self.routers {
            match shapes.get(name).filter(|_| model.is_held_in_f32(name)) {
                None => wrong.push(format!("`{name}` is a whole tensor, and no router of the model")),
                Some(shape) if tensor.dims() != shape => {
                    wrong.push(format!("`{name}` has shape {:?}, expected {shape:?}", tensor.dims()));
                }
                Some(_) => {}
            }
        }
        for name in expected.keys().filter(|name| !self.tensors.contains_key(*name)) {
            wrong.push(format!("`{name}` is missing, though the configuration targets its layer"));
        }
        if wrong.is_empty() {
            return Ok(resolved);
        }
        let error = Error::invalid(format!("the adapter does not fit the model: {}", few(&wrong)));
        Err(match &self.base_model {
            Some(base) => error.with_hint(format!("the adapter was made for `{base}`")),
            None => error,
        })
    }

    fn not_a_copy(&self, name: &str, what: &str) -> Error {
        Error::At {
            path: self.source.clone().into(),
            source: Box::new(
                Error::invalid(format!("`{name}` {what}; trained embeddings and heads are not built yet"))
                    .with_hint(MERGED_FORM),
            ),
        }
    }

    /// What to warn of when the adapter goes on the model called `source`: another name than it was trained on.
    #[must_use]
    pub fn base_mismatch(&self, source: &str) -> Option<String> {
        let base = self.base_model.as_deref()?;
        let (known, given) = (short_name(base), short_name(source));
        // GGUF files carry the kind of their quantization behind the model's name.
        let same = known == given || (source.ends_with(".gguf") && given.starts_with(&known));
        (!same).then(|| {
            format!("the adapter `{}` was made for `{base}`, and the model is `{source}`", self.source)
        })
    }
}

/// What the files of an adapter say of where it comes from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Provenance {
    /// The model it was trained on: a Hub id or a path.
    pub base_model: Option<String>,
    /// Branch, tag or commit of that model.
    pub revision: Option<String>,
    /// Goes into the metadata of the safetensors file, beside `format: pt`.
    pub metadata: BTreeMap<String, String>,
}

/// Writes the three files of an adapter into `folder`, which exists; each replaces its predecessor in one step.
///
/// `tensors` are those of [`super::attach`] or of [`Adapter::tensors`], and trained weights of routers.
pub fn write<'t>(
    folder: &Path,
    config: &LoraConfig,
    placements: &Placements,
    tensors: impl IntoIterator<Item = (&'t str, &'t Tensor)>,
    provenance: &Provenance,
) -> Result<()> {
    write_per_expert(folder, config, placements, &by_name(tensors), provenance)
}

/// As [`write`], for PEFT where that reads another layout: an adapter whose experts it holds together. What is read again
/// computes the same, in tensors of other shapes.
pub fn write_for_peft<'t>(
    folder: &Path,
    config: &LoraConfig,
    placements: &Placements,
    tensors: impl IntoIterator<Item = (&'t str, &'t Tensor)>,
    provenance: &Provenance,
) -> Result<()> {
    let tensors = by_name(tensors);
    match joined::join(config, placements, &tensors)? {
        None => write_per_expert(folder, config, placements, &tensors, provenance),
        Some(joined::Joined { config, placements, parameters, tensors }) => {
            write_as(folder, &config, &placements, (&parameters, &tensors), provenance)
        }
    }
}

fn by_name<'t>(tensors: impl IntoIterator<Item = (&'t str, &'t Tensor)>) -> BTreeMap<String, Tensor> {
    tensors.into_iter().map(|(name, tensor)| (name.to_string(), tensor.clone())).collect()
}

fn write_per_expert(
    folder: &Path,
    config: &LoraConfig,
    placements: &Placements,
    tensors: &BTreeMap<String, Tensor>,
    provenance: &Provenance,
) -> Result<()> {
    write_as(folder, config, placements, (&experts::target_parameters(placements), tensors), provenance)
}

fn write_as(
    folder: &Path,
    config: &LoraConfig,
    placements: &Placements,
    (parameters, tensors): (&BTreeSet<String>, &BTreeMap<String, Tensor>),
    provenance: &Provenance,
) -> Result<()> {
    let renamed = |name: &str| match &placements.router {
        Some((own, theirs)) => match name.strip_suffix(own.as_str()) {
            Some(before) => format!("{before}{theirs}"),
            None => name.to_string(),
        },
        None => name.to_string(),
    };
    let tensors: Vec<(String, &Tensor)> =
        tensors.iter().map(|(name, tensor)| (renamed(name), tensor)).collect();
    let names = tensors.iter().map(|(name, _)| name.as_str());
    let routers: Vec<&str> = names.filter(|name| !name.contains(".lora_")).collect();
    let named = tensors.iter().map(|(name, tensor)| (name.as_str(), *tensor));
    tensors::write(&folder.join(TENSORS_FILE), named, &provenance.metadata)?;
    let text = config::to_json(config, placements, parameters, &routers, provenance)?;
    write_atomic(folder.join(CONFIG_FILE), text.as_bytes())?;
    write_atomic(folder.join(CARD_FILE), card::text(config, placements, provenance).as_bytes())
}

fn no_adapter(folder: &Path) -> Error {
    let at = folder.display();
    if !folder.exists() {
        let error = Error::request(format!("there is no adapter folder `{at}`"));
        return match nearest_path(folder, Path::is_dir) {
            Some(near) => error.with_hint(format!("did you mean `{}`?", near.display())),
            None => error,
        };
    }
    let error = Error::request(format!("`{at}` is not an adapter: it has no `{CONFIG_FILE}`"));
    if folder.join("config.json").exists() {
        return error.with_hint("it is a model; the adapter is what `--adapter` takes");
    }
    error
}

fn missing_tensors(folder: &Path) -> Error {
    let error =
        |message: String| Error::At { path: folder.to_path_buf(), source: Box::new(Error::invalid(message)) };
    if folder.join("adapter_model.bin").exists() {
        return error(format!("has `adapter_model.bin`, a pickle, and no `{TENSORS_FILE}`")).with_hint(
            "pickles can run code and are not read; load the adapter with PEFT and `save_pretrained` it again",
        );
    }
    error(format!("has no `{TENSORS_FILE}`"))
}

/// Returns the part of a model's name that is the same wherever the model lies: without organisation, folder, revision or
/// place in the Hub's cache, in small letters.
fn short_name(name: &str) -> String {
    let cached = name.split_once("models--").map(|(_, rest)| rest.split('/').next().unwrap_or(rest));
    let name = cached.map_or(name, |cached| cached.rsplit("--").next().unwrap_or(cached));
    let name = name.trim_end_matches('/');
    let name = name.rsplit('/').next().unwrap_or(name);
    name.split('@').next().unwrap_or(name).to_lowercase()
}

#[cfg(test)]
mod tests {
    use super::short_name;

    #[test]
    fn a_model_is_known_by_its_last_name() {
        for name in [
            "SmolLM2-135M",
            "HuggingFaceTB/SmolLM2-135M",
            "HuggingFaceTB/SmolLM2-135M@main",
            "/models/smollm2-135m/",
            "/cache/hub/models--HuggingFaceTB--SmolLM2-135M/snapshots/0123abcd",
        ] {
            assert_eq!(short_name(name), "smollm2-135m", "{name}");
        }
    }
}
