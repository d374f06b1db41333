//! One decoder for all families.

pub mod config;
pub mod family;
mod linear;
mod pretrained;

pub use linear::Linear;
pub use pretrained::Pretrained;
