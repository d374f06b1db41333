//! The training loop, its optimizer, schedule and checkpoints. It says what happens as [`Event`]s and never prints.

mod arrival;
mod best;
mod checkpoint;
mod event;
mod identity;
mod memory;
mod metrics;
mod optimizer;
mod record;
mod run;
mod schedule;
mod step;

pub use best::copy_best;
pub use checkpoint::{
    Artifact, digests_of_run, identity_of_run, is_of_run, is_run, list as checkpoints, refuse_foreign,
};
pub use event::{Event, FinalWeights, Reporter, Sample, StepReport};
pub use identity::{Difference, Identity};
pub use memory::{available_bytes, peak_rss_bytes};
pub use optimizer::{AdamW, AdamWConfig};
pub use record::{BEST, Best, TrainerState, digest_of, is_result};
pub use run::{Job, Settings, Summary, run};
pub use schedule::Schedule;
pub use step::{
    Objective, StepGradients, Teacher, balanced_step_gradients, objective_gradients, step_gradients,
};
