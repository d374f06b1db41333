//! One integration binary, a file per promise.

/// Each op's value and gradients against its reference, differentiated by candle, and against finite differences.
mod gradients;
