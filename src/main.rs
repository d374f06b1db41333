//! The `peft` binary.

fn main() {}
