//! One integration binary, a file per promise.

/// Adapters made by PEFT are read as PEFT reads them; what cannot be is refused by name.
mod adapter;
/// Each op's value and gradients against its reference, differentiated by candle, and against finite differences.
mod gradients;
/// Models come from the Hub as a whole or not at all, with what a user has to know when they do not.
mod hub;
/// Checkpoints are read to the last bit, refused by what is wrong with them, written whole or not at all.
mod weights;
