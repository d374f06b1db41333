//! One integration binary, a file per promise.

/// Adapter files against those of PEFT.
mod adapter;
/// Commands, help and messages as a user sees them.
mod cli;
/// Each op's value and gradients against its reference, differentiated by candle, and against finite differences.
mod gradients;
/// Who may use whom, and how long a file may be.
mod layering;
/// Recipes as they are written, planned and written again.
mod recipes;
