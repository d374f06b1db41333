//! `peft check`: everything that can be known before training. Reads configurations, tokenizer and data, no weights.

use serde::Serialize;

use super::describe::describe;
use super::directory::RunDirectory;
use super::disk::Disk;
use super::memory::Memory;
use super::prepared::{Prepared, Trainable, Trainee};
use super::warnings::warnings;
use crate::data::{Counts, preview};
use crate::error::Result;
use crate::recipe::Plan;

/// What is known of a run before it begins.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The plan in lines of text, as a run says it.
    pub lines: Vec<String>,
    /// The resolved recipe, as TOML.
    pub recipe: String,
    /// Layers that get an adapter, per target.
    pub targets: Vec<Target>,
    /// How many numbers are trained.
    pub parameters: Trainable,
    /// Each file of training data.
    pub train: Vec<Counts>,
    /// Each file of evaluation data.
    pub eval: Vec<Counts>,
    /// Documents to evaluate on.
    pub eval_documents: usize,
    /// Updates in all.
    pub steps: u64,
    /// What the run takes at its peak, and what was chosen for it.
    pub memory: Memory,
    /// Bytes that the run directory holds at most.
    pub disk_bytes: u64,
    /// What to look at before starting.
    pub warnings: Vec<String>,
    /// The first document that is trained on, in pieces; the learned ones are marked.
    pub sample: Vec<Segment>,
}

/// A target and its layers.
#[derive(Debug, Clone, Serialize)]
pub struct Target {
    /// As the recipe has it.
    pub target: String,
    /// Layers that get an adapter.
    pub layers: usize,
}

/// A piece of a document.
#[derive(Debug, Clone, Serialize)]
pub struct Segment {
    /// What it says, special tokens written out.
    pub text: String,
    /// Whether its tokens are learned.
    pub learned: bool,
}

/// Opens what `plan` names and reports on it. What a run would be refused for because of its directory or the disk is
/// refused here.
pub fn check(plan: &Plan) -> Result<Report> {
    let of_directory = RunDirectory::foresee(plan)?;
    let prepared = Prepared::of(plan)?;
    let memory = Memory::of(plan, &prepared);
    memory.refuse_excess(plan)?;
    let disk = Disk::of(plan, &prepared);
    disk.refuse_excess(&plan.output)?;
    let targets = match &prepared.trained {
        Trainee::Full => Vec::new(),
        Trainee::Adapter(adapter) => {
            let counts = &adapter.placements.counts;
            counts.iter().map(|c| Target { target: c.target.clone(), layers: c.placed }).collect()
        }
    };
    let first = prepared.dataset.train.iter().flat_map(|part| &part.rows).next();
    let pieces = first.map_or(Ok(Vec::new()), |row| preview(row, &prepared.text))?;
    Ok(Report {
        lines: describe(plan, &prepared, &memory)?,
        recipe: plan.to_toml()?,
        targets,
        parameters: prepared.trainable(),
        train: prepared.dataset.train_counts.clone(),
        eval: prepared.dataset.eval_counts.clone(),
        eval_documents: prepared.dataset.eval.len(),
        steps: prepared.steps,
        disk_bytes: disk.bytes,
        warnings: warnings(plan, &prepared, &memory).into_iter().chain(of_directory).collect(),
        memory,
        sample: pieces.into_iter().map(|(text, learned)| Segment { text, learned }).collect(),
    })
}
