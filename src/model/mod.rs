//! One decoder for all families.

pub mod config;
mod linear;

pub use linear::Linear;
