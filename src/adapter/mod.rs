//! Adapters as something done to a model: which layers get a low-rank term, with what first values, under which names,
//! and in which format on disk. The model computes with the term and does not know where it came from.

mod config;
pub mod hf;
pub mod init;
mod lora;
mod patterns;
mod target;
pub mod torch_random;

pub use config::{Exclude, Init, LoraConfig, Targets};
pub use lora::{attach, delta, detach, tensor_names};
pub use patterns::Patterns;
pub use target::{Placement, Placements, TargetCount, resolve};
