//! One integration binary, a file per promise.

/// Adapters made by PEFT are read as PEFT reads them; what cannot be is refused by name.
mod adapter;
/// A fixture folder made by transformers and PEFT.
mod fixture;
/// Each op's value and gradients against its reference, differentiated by candle, and against finite differences.
mod gradients;
/// Ten optimizer steps against ten golden losses.
mod losses;
/// Logits, losses and every gradient against transformers and PEFT, for each family.
mod parity;
