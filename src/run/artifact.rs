//! What a run leaves: an adapter as Hugging Face PEFT loads it, or a model as transformers loads it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Tensor};

use super::directory::RESULT;
use super::prepared::{PlacedAdapter, Prepared};
use super::told::LAYOUT;
use super::units::Units;
use crate::adapter::hf::{self, Provenance};
use crate::data::Layout;
use crate::error::{Context, Error, Result, is_there};
use crate::model::Pretrained;
use crate::ops::Trainables;
use crate::recipe::Plan;
use crate::train::{self, Artifact, Best};
use crate::weights::{DEFAULT_SHARD_BYTES, ShardedWriter, Staged, TensorSpec, record_told};

/// The files of an adapter.
pub(super) struct AdapterFiles<'a> {
    adapter: &'a PlacedAdapter,
    base: &'a Pretrained,
    trainables: Trainables,
    units: Units,
    /// What PEFT wants beside them, as it is stored.
    companions: BTreeMap<String, Tensor>,
    provenance: Provenance,
    /// Whether nothing else is trained.
    writes_all: bool,
}

impl<'a> AdapterFiles<'a> {
    pub(super) fn new(
        plan: &Plan,
        prepared: &'a Prepared,
        adapter: &'a PlacedAdapter,
        trainables: &Trainables,
        writes_all: bool,
    ) -> Result<Self> {
        let name = plan.model.id.as_ref().unwrap_or(&plan.model.source);
        let (base_model, revision) = match name.rsplit_once('@') {
            Some((id, revision)) if !Path::new(name).exists() => (id, Some(revision)),
            _ => (name.as_str(), None),
        };
        let mut metadata = BTreeMap::from([
            (hf::WRITER.to_string(), env!("CARGO_PKG_VERSION").to_string()),
            (LAYOUT.to_string(), Layout::of(&prepared.dataset.train_counts).name().to_string()),
        ]);
        let records = prepared.told.records(&prepared.text)?.into_iter();
        metadata.extend(records.filter_map(|(key, record)| Some((key.to_string(), record?))));
        let provenance = Provenance {
            base_model: Some(base_model.to_string()),
            revision: revision.map(str::to_string),
            metadata,
        };
        let base = &prepared.base;
        let (units, trainables) = (Units::of(base.config()), trainables.clone());
        let companions = companions(adapter, base, &trainables)?;
        Ok(Self { adapter, base, trainables, units, companions, provenance, writes_all })
    }

    /// What is written, as it is stored.
    fn tensors(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut tensors = self.units.all_stored(&self.trainables)?;
        tensors.extend(self.companions.clone());
        Ok(tensors)
    }
}

impl Artifact for AdapterFiles<'_> {
    fn write(&self, folder: &Path) -> Result<()> {
        let tensors = self.tensors()?;
        let tensors = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
        hf::write(folder, &self.adapter.config, &self.adapter.placements, tensors, &self.provenance)?;
        self.base.write_companions(folder)
    }

    fn write_result(&self, folder: &Path) -> Result<()> {
        let tensors = self.tensors()?;
        let tensors = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor));
        let PlacedAdapter { config, placements, .. } = self.adapter;
        hf::write_for_peft(folder, config, placements, tensors, &self.provenance)?;
        self.base.write_companions(folder)
    }

    fn restore(&self, folder: &Path) -> Result<()> {
        let saved = hf::Adapter::read(folder, &Device::Cpu).at(folder)?.for_model(self.base.config())?;
        let saved = saved.tensors.into_iter().chain(saved.routers);
        let saved = saved.filter(|(name, _)| !self.companions.contains_key(name)).collect();
        set_all(&self.trainables, self.units.all_trained(&saved)?).at(folder)
    }

    fn is_exact(&self) -> bool {
        self.writes_all
    }
}

/// What of routers is written and not trained now: what the adapter in `adapter.from` has of them, with which all losses
/// are measured; and the weight or bias of a router of which the other is written, as PEFT saves and loads a module whole.
fn companions(
    adapter: &PlacedAdapter,
    base: &Pretrained,
    trainables: &Trainables,
) -> Result<BTreeMap<String, Tensor>> {
    let is_trained = |name: &str| trainables.contains_key(name);
    let earlier = adapter.from.iter().flat_map(|from| &from.routers).filter(|(name, _)| !is_trained(name));
    let mut companions: BTreeMap<String, Tensor> =
        earlier.map(|(name, stored)| (name.clone(), stored.clone())).collect();
    for (layer, moe) in base.config().sparse_layers().filter(|(_, moe)| moe.selection_bias) {
        let names = [format!("{}.weight", moe.router_path(layer)), moe.selection_bias_path(layer)];
        let is_written = |name: &String| is_trained(name) || companions.contains_key(name);
        if !names.iter().any(is_written) {
            continue;
        }
        for name in names.iter().filter(|name| !is_written(name)).cloned().collect::<Vec<_>>() {
            let stored = base.read(&name, DType::F32, &Device::Cpu)?;
            companions.insert(name, stored);
        }
    }
    Ok(companions)
}

/// The files of a model whose weights are all trained, in the type that the base is stored in.
pub(super) struct ModelFiles<'a> {
    base: &'a Pretrained,
    trainables: Trainables,
    units: Units,
    /// What is computed in.
    dtype: DType,
    /// What is written.
    stored: DType,
    /// Whether nothing else is trained.
    writes_all: bool,
    /// What the model is told about its text.
    told: [(&'static str, Option<String>); 2],
}

impl<'a> ModelFiles<'a> {
    pub(super) fn new(prepared: &'a Prepared, trainables: &Trainables, writes_all: bool) -> Result<Self> {
        let Prepared { base, dtype, .. } = prepared;
        let (units, stored) = (Units::of(base.config()), base.compute_dtype());
        let told = prepared.told.records(&prepared.text)?;
        Ok(Self { base, trainables: trainables.clone(), units, dtype: *dtype, stored, writes_all, told })
    }
}

impl Artifact for ModelFiles<'_> {
    fn write(&self, folder: &Path) -> Result<()> {
        let rounded = |tensor: &Tensor| tensor.to_dtype(self.stored);
        // Biases that only the choice of experts sees are no weights, and stay what they are.
        let mut untrained = BTreeMap::new();
        for (name, _) in self.base.config().tensors() {
            let trained = self.trainables.contains_key(name.as_str());
            if !trained && self.base.config().is_held_in_f32(&name) {
                untrained.insert(name.clone(), self.base.read(&name, DType::F32, &Device::Cpu)?);
            }
        }
        let specs = self.trainables.iter().map(|(name, variable)| {
            let shape = variable.dims().to_vec();
            Ok(TensorSpec { shape, ..TensorSpec::of(name, &Tensor::zeros(0, self.stored, &Device::Cpu)?)? })
        });
        let specs = specs.chain(untrained.iter().map(|(name, tensor)| TensorSpec::of(name, tensor)));
        let specs = specs.collect::<Result<Vec<_>>>()?;
        let mut writer = ShardedWriter::create(folder, &specs, &BTreeMap::new(), DEFAULT_SHARD_BYTES)?;
        for (name, variable) in &self.trainables {
            writer.write(name, &rounded(&self.units.stored(name, variable.as_tensor())?)?)?;
        }
        for (name, tensor) in &untrained {
            writer.write(name, tensor)?;
        }
        writer.finish()?;
        self.base.write_config(folder, self.stored)?;
        self.base.write_companions(folder)?;
        record_told(folder, &self.told)
    }

    fn restore(&self, folder: &Path) -> Result<()> {
        let saved = Pretrained::open(&folder.to_string_lossy())?;
        let tensors = self.trainables.keys().map(|name| {
            let stored = saved.read(name, self.dtype, &Device::Cpu)?;
            Ok((name.to_string(), self.units.trained(name, &stored)?))
        });
        set_all(&self.trainables, tensors.collect::<Result<_>>()?).at(folder)
    }

    fn is_exact(&self) -> bool {
        // What routers are trained in is not what a rounded model stores.
        let rounds_routers = self.stored != DType::F32 && self.base.config().sparse_layers().next().is_some();
        self.writes_all && self.stored == self.dtype && !rounds_routers
    }
}

fn set_all(trainables: &Trainables, mut tensors: BTreeMap<String, Tensor>) -> Result<()> {
    for (name, variable) in trainables {
        let saved = tensors.remove(&**name).ok_or_else(|| Error::invalid("is missing")).in_tensor(name)?;
        variable.set(&saved.to_dtype(variable.dtype())?).in_tensor(name)?;
    }
    match tensors.keys().next() {
        None => Ok(()),
        Some(name) => Err(Error::invalid("is saved and not trained now")).in_tensor(name),
    }
}

/// An artifact that is written only while the files of the model and its teacher are those that were opened: what was
/// computed from others would be of no model.
pub(super) struct Unchanged<'a> {
    pub(super) prepared: &'a Prepared,
    pub(super) artifact: Box<dyn Artifact + 'a>,
}

impl Artifact for Unchanged<'_> {
    fn write(&self, folder: &Path) -> Result<()> {
        self.prepared.refuse_changed()?;
        self.artifact.write(folder)
    }

    fn write_result(&self, folder: &Path) -> Result<()> {
        self.prepared.refuse_changed()?;
        self.artifact.write_result(folder)
    }

    fn restore(&self, folder: &Path) -> Result<()> {
        self.artifact.restore(folder)
    }

    fn is_exact(&self) -> bool {
        self.artifact.is_exact()
    }
}

/// Writes the result of a run beside what the run directory holds already: each file whole, or not at all. With `best` the
/// result is a copy of the best evaluation, which is returned, else what is trained now. `written` has the digests of what the run wrote before
/// it went on.
pub(super) fn publish(
    artifact: &dyn Artifact,
    output: &Path,
    written: &BTreeSet<String>,
    best: bool,
) -> Result<Option<Best>> {
    let staged = Staged::replacing(output.join(RESULT))?;
    let copied = if best {
        train::copy_best(output, staged.path())?
    } else {
        artifact.write_result(staged.path())?;
        None
    };
    refuse_to_replace(output, staged.path(), written)?;
    staged.commit_files()?;
    Ok(copied)
}

/// Refuses to write a result over files that somebody else put into its directory, or changed there. What is the same, or
/// is as the run wrote it once, is lost to nobody.
fn refuse_to_replace(output: &Path, result: &Path, written: &BTreeSet<String>) -> Result<()> {
    let mut entries = fs::read_dir(result).at(result)?.collect::<std::io::Result<Vec<_>>>().at(result)?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let (target, made) = (output.join(entry.file_name()), entry.path());
        let is_folder = made.is_dir();
        if !is_there(&target) {
            continue;
        }
        if is_folder && target.is_dir() {
            refuse_to_replace(&target, &made, written)?;
            continue;
        }
        // What cannot be read is not known to be the same.
        let found = if is_folder { None } else { train::digest_of(&target).ok() };
        let is_known = match found {
            None => false,
            Some(found) => written.contains(&found) || train::digest_of(&made)? == found,
        };
        if !is_known {
            return Err(Error::invalid("differs from the result of the run, which would be written over it")
                .with_hint("move it to another folder and go on with `--resume`"))
            .at(target);
        }
    }
    Ok(())
}
