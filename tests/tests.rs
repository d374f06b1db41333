//! One integration binary, a file per promise.

/// Adapters made by PEFT are read as PEFT reads them; what cannot be is refused by name.
mod adapter;
/// Commands, help and messages as a user sees them.
mod cli;
/// Conversations, labels and order of training data, as transformers has them.
mod data;
/// A fixture folder made by transformers and PEFT.
mod fixture;
/// Each op's value and gradients against its reference, differentiated by candle, and against finite differences.
mod gradients;
/// Who may use whom, and how long a file may be.
mod layering;
/// Ten optimizer steps against ten golden losses.
mod losses;
/// Logits, losses and every gradient against transformers and PEFT, for each family.
mod parity;
/// Recipes as they are written, planned and written again.
mod recipes;
