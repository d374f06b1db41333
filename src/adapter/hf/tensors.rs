//! `adapter_model.safetensors`: names both ways, values to f32.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensors};

use super::super::target::few;
use super::MERGED_FORM;
use crate::error::{Context, Error, Result, read_regular};
use crate::model::config::{EMBEDDING, HEAD};
use crate::weights::{refuse_repeated_names, write_safetensors};

const PREFIX: &str = "base_model.model.";
const SUFFIXES: [&str; 3] = [".lora_A.weight", ".lora_B.weight", ".lora_B.bias"];

/// The most bytes of an adapter's tensors, which are read whole: 64 GiB.
const LARGEST: u64 = 1 << 36;

/// Whether the tensor `name` belongs to the layer at `path`.
pub(super) fn is_of(name: &str, path: &str) -> bool {
    name.strip_prefix(path).is_some_and(|rest| SUFFIXES.contains(&rest))
}

/// The tensors and metadata of the file.
pub(super) struct Read {
    /// Low-rank tensors in f32, by name without the prefix of PEFT.
    pub(super) tensors: BTreeMap<String, Tensor>,
    /// Copies of the model's embedding or head, by name.
    pub(super) copies: BTreeMap<String, Tensor>,
    /// Trained weights of routers in f32, by name.
    pub(super) routers: BTreeMap<String, Tensor>,
    /// The metadata of the file.
    pub(super) metadata: BTreeMap<String, String>,
}

/// Every tensor of the file.
pub(super) fn read(path: &Path, lora_bias: bool, device: &Device) -> Result<Read> {
    let bytes = read_regular(path, LARGEST).at(path)?;
    refuse_repeated_names(&bytes).at(path)?;
    let file = SafeTensors::deserialize(&bytes).at(path)?;
    let names = canonical_names(file.names(), lora_bias).at(path)?;
    let (mut tensors, mut copies, mut routers) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    let mut broken = Vec::new();
    for (canonical, stored) in names {
        let view = file.tensor(stored).at(path)?;
        let values = match to_f32(view.dtype(), view.data()) {
            Ok(values) => values,
            Err(what) => {
                broken.push(format!("`{stored}` {what}"));
                continue;
            }
        };
        if values.is_empty() {
            broken.push(format!("`{stored}` is empty, shape {:?}", view.shape()));
        } else if let Some(value) = values.iter().find(|value| !value.is_finite()) {
            broken.push(format!("`{stored}` has the value {value}"));
        } else {
            let tensor = Tensor::from_vec(values, view.shape(), device).in_tensor(stored).at(path)?;
            let into = match &canonical {
                name if is_copy(name) => &mut copies,
                name if is_router(name) => &mut routers,
                _ => &mut tensors,
            };
            into.insert(canonical, tensor);
        }
    }
    if !broken.is_empty() {
        return Err(Error::invalid(few(&broken))).at(path);
    }
    let (_, header) = SafeTensors::read_metadata(&bytes).at(path)?;
    let metadata = header.metadata().iter().flatten().map(|(key, value)| (key.clone(), value.clone()));
    Ok(Read { tensors, copies, routers, metadata: metadata.collect() })
}

/// Writes every tensor in f32 under its name with the prefix.
pub(super) fn write<'t>(
    path: &Path,
    tensors: impl IntoIterator<Item = (&'t str, &'t Tensor)>,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let mut prefixed = BTreeMap::new();
    for (name, tensor) in tensors {
        prefixed.insert(format!("{PREFIX}{name}"), tensor.to_dtype(DType::F32).in_tensor(name)?);
    }
    write_safetensors(path, &prefixed, metadata)
}

/// Name in memory and name in the file, for each tensor; refuses all that is not one of a plain LoRA.
fn canonical_names(stored: Vec<&str>, lora_bias: bool) -> Result<BTreeMap<String, &str>> {
    let mut names = BTreeMap::new();
    let mut wrong = Vec::new();
    for stored in stored.into_iter().collect::<BTreeSet<_>>() {
        match canonical(stored) {
            Err(what) => wrong.push(format!("`{stored}` is {what}")),
            Ok(name) if name.ends_with(".bias") && !lora_bias => {
                wrong.push(format!("`{stored}` is a bias, though `lora_bias` is false"));
            }
            Ok(name) => {
                if let Some(other) = names.insert(name, stored) {
                    wrong.push(format!("`{stored}` and `{other}` are the same tensor"));
                }
            }
        }
    }
    for (name, stored) in &names {
        if let Some(path) = name.strip_suffix(".lora_A.weight")
            && !names.contains_key(&format!("{path}.lora_B.weight"))
        {
            wrong.push(format!("`{stored}` has no `lora_B.weight` beside it"));
        } else if let Some(path) = name.strip_suffix(".lora_B.weight")
            && !names.contains_key(&format!("{path}.lora_A.weight"))
        {
            wrong.push(format!("`{stored}` has no `lora_A.weight` beside it"));
        }
    }
    if !wrong.is_empty() {
        let error = Error::invalid(format!("not the tensors of a plain LoRA: {}", few(&wrong)));
        let not_built = wrong.iter().any(|problem| problem.ends_with("not built yet"));
        return Err(if not_built { error.with_hint(MERGED_FORM) } else { error });
    }
    if !names.keys().any(|name| !is_copy(name)) {
        return Err(Error::invalid("has no tensors of an adapter"));
    }
    Ok(names)
}

/// Whether the name is that of a tensor that PEFT copies into an adapter on the embedding or the head.
fn is_copy(name: &str) -> bool {
    name == EMBEDDING || name == HEAD
}

/// Whether the name can be that of a router's weight or bias; the model says whether it is.
fn is_router(name: &str) -> bool {
    [".gate.weight", ".router.layer.weight", ".router.weight", ".e_score_correction_bias"]
        .iter()
        .any(|end| name.ends_with(end))
}

/// `base_model.model.<path>.lora_A.weight` to `<path>.lora_A.weight`. Also read: no prefix, `model.` twice, and the
/// adapter's name `default`; else what the tensor is.
fn canonical(stored: &str) -> std::result::Result<String, &'static str> {
    let name = stored.strip_prefix(PREFIX).unwrap_or(stored);
    let name = if name.starts_with("model.model.") { &name["model.".len()..] } else { name };
    let name = name.replace(".lora_A.default.", ".lora_A.").replace(".lora_B.default.", ".lora_B.");
    // Packed tensors of all experts are parameters, not modules.
    let name = match name.rsplit_once('.') {
        Some((path, last @ ("lora_A" | "lora_B"))) if path.contains(".experts.") => {
            format!("{path}.{last}.weight")
        }
        _ => name,
    };
    if SUFFIXES.iter().any(|suffix| name.ends_with(suffix)) {
        return Ok(name);
    }
    let whole = name.replace(".base_layer.", ".");
    if is_copy(&whole) || is_router(&whole) {
        return Ok(whole);
    }
    Err(if name.contains("lora_magnitude_vector") {
        "a magnitude of DoRA, which is not built yet"
    } else if name.contains("lora_embedding_") {
        "an adapter on an embedding, which is not built yet"
    } else if name.contains("trainable_tokens_delta") {
        "a set of trained embedding rows, which is not built yet"
    } else if name.ends_with(".lora_A") || name.ends_with(".lora_B") {
        "a packed adapter, which is read of experts only"
    } else if name.contains(".lora_") {
        "of a variant of LoRA that is not supported"
    } else {
        "a whole tensor of the model (as `modules_to_save` leaves it), which is not built yet"
    })
}

fn to_f32(dtype: Dtype, data: &[u8]) -> std::result::Result<Vec<f32>, String> {
    match dtype {
        Dtype::F32 => {
            Ok(data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect())
        }
        Dtype::BF16 => Ok(data.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()),
        Dtype::F16 => Ok(data.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect()),
        other => Err(format!("is of type {other:?}, expected F32, BF16 or F16")),
    }
}
