//! New experts in a mixture, for a task that it has not seen: each layer gets copies of the experts that most tokens of the
//! task's text are routed to. Every tensor that the mixture has keeps its bytes.
//!
//! A new expert starts from the router row of the expert that it copies, with a little noise, so that training can tell the
//! two apart. What that does before training depends on the family:
//!
//! - Where the choice has a bias (`glm4_moe`), the new one's is so low that it is never chosen, whatever the input: the model
//!   computes what it did until training raises the bias (`losses.bias_update`). The router's input is `w * x` with `|x| <=
//!   sqrt(hidden)`, so the logit of a row `r` is within `sqrt(hidden) |r * w|`, and scores are within its sigmoid.
//! - Elsewhere the copy is chosen beside the original and takes the place of the least of a token's experts, and where
//!   weights are not renormalised all of them become a little smaller. The model changes; by how much is measured.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use rand_distr::{Distribution, StandardNormal};
use serde_json::{Value, json};

use super::compare::{Comparison, losses};
use super::export::{Layer, write_config};
use super::load::{Load, idle_warning};
use super::report::Report;
use super::settings::{RouterKind, Settings};
use super::solve::{matrix, values};
use super::verify::{Expected, open, reopened};
use super::{Event, Job, Watch};
use crate::data::generator;
use crate::error::{Context, Error, Result};
use crate::model::config::MoeConfig;
use crate::model::{Decoder, DecoderConfig, Pretrained, family};
use crate::weights::{DEFAULT_SHARD_BYTES, ShardedWriter, TensorSpec};

/// The noise of a new row, as a share of the deviation of the one that it is a copy of.
const NOISE: f32 = 0.05;
/// Rounding of inputs and scores.
const MARGIN: f64 = 1e-2;

/// What follows where an expert that is copied gets no token, and what to do.
const COPIED: &str = "and new experts are copies of them; ask for fewer `upcycle.experts`, or give more of the task's text in \
`calibration.data`";
/// What follows where a new expert gets no token, and what to do.
const UNSEEN: &str = "so these new experts learn nothing until training sends them some; ask for fewer `upcycle.experts`, or \
give text of the task in `calibration.data`";

/// Writes the mixture with its new experts.
pub(super) fn expand(
    job: &Job<'_>,
    settings: &Settings,
    folder: &Path,
    watch: &mut Watch<'_>,
) -> Result<Report> {
    let begun = std::time::Instant::now();
    let base = job.base;
    let moe = refuse_unfit(base, settings)?;
    if job.calibration.fitted.is_empty() {
        return Err(Error::request("`upcycle.method = \"expand\"` needs text of the new task")
            .with_hint("name files in `calibration.data`"));
    }
    let json = grown(base.config_json(), moe.experts, settings.experts)?;
    let config = family::read(&json)?;
    let (load, copied) = most_used(job, settings.experts)?;
    watch(Event::note("writing"))?;
    let mut writer = announce(base, &config, folder)?;
    for name in base.checkpoint().tensors().keys() {
        if !is_of_router(base.config(), name) {
            base.checkpoint().refuse_not_finite(name)?;
            writer.write_bytes(name, base.checkpoint().bytes(name)?)?;
            base.checkpoint().release(name);
        }
    }
    for (layer, moe) in base.config().sparse_layers() {
        let path =
            |expert: usize, projection| format!("{}.weight", moe.expert_path(layer, expert, projection));
        for (new, original) in copied[&layer].iter().enumerate() {
            let read = |projection| read_stored(base, &path(*original, projection));
            let mut expert = Layer { projections: [read(0)?, read(1)?, read(2)?] };
            expert.redraw(settings.drop_ratio, [settings.seed, layer as u64, new as u64])?;
            for (projection, tensor) in expert.projections.iter().enumerate() {
                writer.write(&path(moe.experts + new, projection), tensor)?;
            }
        }
        write_router(&mut writer, base, (layer, moe), &copied[&layer], settings.seed)?;
        watch(Event::Layer { done: layer + 1, layers: config.layers.len() })?;
    }
    writer.finish()?;
    let note = base.config_json().get("upcycled").cloned().unwrap_or(Value::Null);
    write_config(folder, &json, base.compute_dtype(), note)?;
    base.write_companions(folder)?;
    let mut idle = load.idle();
    idle.retain(|(layer, expert)| copied[layer].contains(expert));
    let mut report = Report::of_expansion(base, settings, &moe, job.calibration.num_tokens(), copied);
    let text = format!("{} calibration tokens", load.tokens());
    report.warnings.extend(idle_warning(&idle, &text, COPIED));
    report.seconds = begun.elapsed().as_secs_f64();
    if settings.verify {
        watch(Event::note("reading back and measuring"))?;
        let written = reopened(folder)?;
        refuse_changed(base, &written)?;
        let before = open(base, base.config())?;
        let expected = Expected::of(&before, &job.calibration.held_out)?;
        let losses_before = losses(&before, job.calibration.texts(), &mut Load::default())?;
        drop(before);
        let after = open(&written, written.config())?;
        let difference = expected.compare(&after)?;
        let what = "before it is trained, the new mixture computes what the old one does".to_string();
        report.guarantees = vec![difference.guarantee(what, moe.selection_bias, difference.is_rounding())];
        let mut load = Load::default();
        let losses = losses_before.into_iter().zip(losses(&after, job.calibration.texts(), &mut load)?);
        let texts = job.calibration.texts().zip(losses);
        report.comparisons =
            texts.map(|(text, (before, after))| Comparison::of_whole(text, before, after)).collect();
        // Where the choice has a bias, new experts are not chosen before they are trained: that is what was promised.
        if !moe.selection_bias {
            let mut idle = load.idle();
            idle.retain(|(_, expert)| *expert >= moe.experts);
            let text = format!("{} measured tokens", load.tokens());
            report.warnings.extend(idle_warning(&idle, &text, UNSEEN));
        }
    }
    Ok(report)
}

/// How the mixture chooses; an error where this method cannot add to it.
pub(super) fn refuse_unfit(base: &Pretrained, settings: &Settings) -> Result<MoeConfig> {
    let Some((layer, moe)) = base.config().sparse_layers().next() else {
        return Err(Error::request(format!("`{}` is not a mixture of experts", base.name()))
            .with_hint("`upcycle.method = \"copy\"` or `\"split\"` makes one of a dense model"));
    };
    if settings.router != RouterKind::Random {
        return Err(Error::request(
            "`upcycle.router` does nothing with `upcycle.method = \"expand\"`: a new expert starts from the router row \
             of the expert that it copies",
        )
        .with_hint("leave `upcycle.router` out"));
    }
    let name = format!("{}.weight", moe.expert_path(layer, 0, 0));
    let (stored, _) = base.stored_in(&name)?;
    if base.checkpoint().is_gguf() || stored != name {
        return Err(Error::request(format!(
            "the experts of `{}` lie in one tensor, `{stored}`; experts are added to a safetensors folder with one \
             tensor per expert",
            base.name()
        ))
        .with_hint("mixtral, qwen2_moe, qwen3_moe, olmoe and glm4_moe are stored so on the Hub"));
    }
    Ok(moe.clone())
}

/// The `config.json` for `more` experts than the `experts` there are.
pub(super) fn grown(json: &Value, experts: usize, more: usize) -> Result<Value> {
    let mut json = json.clone();
    let keys = ["n_routed_experts", "num_experts", "num_local_experts"];
    let keys: Vec<&str> = keys.into_iter().filter(|key| json.get(key) == Some(&json!(experts))).collect();
    if keys.is_empty() {
        return Err(Error::invalid(format!("`config.json` does not say that there are {experts} experts")));
    }
    keys.into_iter().for_each(|key| json[key] = json!(experts + more));
    Ok(json)
}

/// Runs the text through the mixture. Returns the load of its experts, and for each layer the experts to copy: those with
/// most tokens. Where more are added than there are, each is copied in turn.
fn most_used(job: &Job<'_>, more: usize) -> Result<(Load, BTreeMap<usize, Vec<usize>>)> {
    let model = Decoder::open(job.base, job.dtype, &Device::Cpu)?;
    let mut load = Load::default();
    for batch in &job.calibration.fitted {
        load.add(&model.forward(&batch.tokens, &batch.documents())?.routing);
    }
    let ranked = |counts: &Vec<usize>| -> Vec<usize> {
        let mut order: Vec<usize> = (0..counts.len()).collect();
        order.sort_by_key(|expert| (std::cmp::Reverse(counts[*expert]), *expert));
        order.into_iter().cycle().take(more).collect()
    };
    let copied = load.counts().iter().map(|(layer, counts)| (*layer, ranked(counts))).collect();
    Ok((load, copied))
}

/// Room for all tensors of `config`, in the types that the mixture has them in.
fn announce(base: &Pretrained, config: &DecoderConfig, folder: &Path) -> Result<ShardedWriter> {
    let checkpoint = base.checkpoint();
    let mut specs = Vec::new();
    let stored = |name: &str, shape: &[usize], like: &str| -> Result<TensorSpec> {
        let info = checkpoint.info(like)?;
        let dtype = info.dtype.safetensors();
        let dtype = dtype.ok_or_else(|| Error::invalid(format!("is stored as {}", info.dtype)));
        Ok(TensorSpec { name: name.to_string(), dtype: dtype.in_tensor(like)?, shape: shape.to_vec() })
    };
    let grown: BTreeMap<String, Vec<usize>> = config.tensors().into_iter().collect();
    for (name, info) in checkpoint.tensors() {
        let shape = if is_of_router(base.config(), name) { &grown[name] } else { &info.shape };
        specs.push(stored(name, shape, name)?);
    }
    for (layer, moe) in config.sparse_layers() {
        let before = base.config().sparse_layers().next().map_or(0, |(_, moe)| moe.experts);
        for expert in before..moe.experts {
            for projection in 0..3 {
                let path = |expert| format!("{}.weight", moe.expert_path(layer, expert, projection));
                specs.push(stored(&path(expert), &grown[&path(expert)], &path(0))?);
            }
        }
    }
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    ShardedWriter::create(folder, &specs, &metadata, DEFAULT_SHARD_BYTES)
}

/// Whether a tensor has a row or a value for each expert.
fn is_of_router(config: &DecoderConfig, name: &str) -> bool {
    config.sparse_layers().any(|(layer, moe)| {
        name == format!("{}.weight", moe.router_path(layer)) || name == moe.selection_bias_path(layer)
    })
}

/// A tensor in the type that it is stored in.
fn read_stored(base: &Pretrained, name: &str) -> Result<Tensor> {
    let dtype = match base.stored_dtype(name)? {
        crate::weights::StoredType::Float(dtype) => dtype,
        _ => DType::F32,
    };
    base.read(name, dtype, &Device::Cpu)
}

/// The router with a row more for each new expert, and its bias where it has one.
fn write_router(
    writer: &mut ShardedWriter,
    base: &Pretrained,
    (layer, moe): (usize, &MoeConfig),
    copied: &[usize],
    seed: u64,
) -> Result<()> {
    let name = format!("{}.weight", moe.router_path(layer));
    let stored = read_stored(base, &name)?; // [experts, hidden]
    let hidden = stored.dim(1)?;
    let old = values(&stored)?;
    let mut chance = generator("upcycle/expand", &[seed, layer as u64]);
    let mut rows = Vec::new();
    for original in copied {
        let row = &old[original * hidden..][..hidden];
        let deviation = (row.iter().map(|x| x * x).sum::<f32>() / hidden as f32).sqrt();
        rows.extend(row.iter().map(|x| -> f32 {
            let normal: f32 = StandardNormal.sample(&mut chance);
            x + NOISE * deviation * normal
        }));
    }
    let new = matrix(rows.clone(), hidden)?.to_dtype(stored.dtype())?;
    writer.write(&name, &Tensor::cat(&[&stored, &new], 0)?)?;
    if !moe.selection_bias {
        return Ok(());
    }
    let norm = format!("model.layers.{layer}.post_attention_layernorm.weight");
    let norm = values(&base.read(&norm, DType::F32, &Device::Cpu)?)?;
    let bound = |row: &[f32]| -> f64 {
        let square: f64 = row.iter().zip(&norm).map(|(r, w)| f64::from(r * w).powi(2)).sum();
        (1.0 + MARGIN) * (square * hidden as f64).sqrt()
    };
    let sigmoid = |z: f64| 1.0 / (1.0 + (-z).exp());
    let name = moe.selection_bias_path(layer);
    let stored = read_stored(base, &name)?; // [experts]
    let biases = stored.to_dtype(DType::F32)?.to_vec1::<f32>()?;
    let least = old.chunks_exact(hidden).zip(&biases).map(|(row, b)| sigmoid(-bound(row)) + f64::from(*b));
    let least = least.fold(f64::INFINITY, f64::min);
    // The last term is far above the rounding of a score and a bias in f32.
    let new = rows.chunks_exact(hidden).map(|row| (least - sigmoid(bound(row)) - 1e-4) as f32);
    let new = Tensor::new(new.collect::<Vec<f32>>(), &Device::Cpu)?.to_dtype(stored.dtype())?;
    writer.write(&name, &Tensor::cat(&[&stored, &new], 0)?)
}

/// An error if a tensor that was there is not the same to the byte; of routers the rows that were there.
fn refuse_changed(base: &Pretrained, written: &Pretrained) -> Result<()> {
    let (before, after) = (base.checkpoint(), written.checkpoint());
    for name in before.tensors().keys() {
        let (old, new) = (before.bytes(name)?, after.bytes(name)?);
        if new.len() < old.len() || new[..old.len()] != *old {
            return Err(Error::invalid("changed when experts were added")).in_tensor(name);
        }
        before.release(name);
        after.release(name);
    }
    Ok(())
}
