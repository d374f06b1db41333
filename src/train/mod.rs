//! The training loop, its optimizer, schedule and checkpoints.

mod event;

pub use event::{Event, Reporter, Sample, StepReport};
