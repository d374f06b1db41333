//! The memory of a run: what it will be, and what is chosen for it.

mod plan;
mod predict;

pub use plan::Memory;
pub use predict::{Components, Moment, Needs, Way};
