//! One integration binary, a file per promise.

/// Adapters made by PEFT are read as PEFT reads them; what cannot be is refused by name.
mod adapter;
/// Each op's value and gradients against its reference, differentiated by candle, and against finite differences.
mod gradients;
