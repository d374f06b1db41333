//! The work that a recipe asks for: files are opened, memory is planned, a model is trained or converted, results are written.
//!
//! [`finetune`] and [`upcycle`] do a run from [`Plan`](crate::recipe::Plan) to files; [`check`] and [`check_upcycle`] tell what can
//! be known before.

mod artifact;
mod calibration;
mod check;
mod continue_from;
mod describe;
mod directory;
mod disk;
pub mod figures;
mod finetune;
mod inference;
mod kernels;
mod memory;
mod prepared;
mod teacher;
mod told;
mod units;
mod upcycle;
mod warnings;

pub use check::{Report, Segment, Target, check};
pub use finetune::finetune;
pub use inference::{Loaded, read_adapter};
pub use kernels::ChosenKernels;
pub use memory::{Components, Memory, Moment, Needs, Way};
pub use prepared::{PlacedAdapter, Prepared, Trainable, Trainee};
pub use teacher::PreparedTeacher;
pub use told::text_of;
pub use upcycle::{UpcycleCheck, check_upcycle, upcycle};
