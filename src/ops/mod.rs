//! The operations that training spends its time in, each a pair of plain functions: `forward(..) -> (y, saved)`
//! and `backward(saved, dy) -> (dx, gradients)`. This room knows candle and nothing else of ours but errors.
//!
//! An op picks its path by device: slices on the CPU; elsewhere the forward is `reference`, composed of candle
//! primitives, and the backward differentiates it. Tests hold both paths and finite differences together.
//!
//! Shape legend of this room: `tokens` rows of a flat batch, `d` a width, `out`/`in` of a linear layer, `rank`.

pub mod attention;
mod buffers;
mod clock;
pub mod cross_entropy;
pub mod distillation;
mod documents;
pub mod dropout;
pub mod embedding;
pub mod experts;
pub mod glu;
mod gradients;
pub mod groups;
mod kernel;
pub mod linear;
mod matmul;
mod quantized;
pub mod reference;
pub mod rms_norm;
pub mod rotary;
pub mod rows;
mod scores;
mod sum;
mod weight;

pub use buffers::KeepBuffers;
pub use clock::Op;
pub use documents::{Documents, Pass};
pub use glu::Activation;
pub use gradients::{Gradients, Trainables};
pub use groups::Groups;
pub use kernel::{KernelRate, Kernels};
pub use matmul::{Operand, matmul, matmul_f32, rows_alike, scaled_matmul_f32, sum_of_products};
pub use quantized::{Quantized, SharedBytes};
pub use reference::differentiate;
pub use scores::{largest, scores};
pub use sum::{add, add_to_rows, cast};
pub use weight::{Dropout, LowRank, Parameter, Weight};
