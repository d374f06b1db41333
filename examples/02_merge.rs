//! An adapter folded into the weights it was trained beside:
//!
//!     cargo run --release --example 01_finetune
//!     cargo run --release --example 02_merge
//!
//! Writes a folder that transformers loads, with a receipt of what changed.

#![expect(clippy::print_stdout, reason = "a program that tells what it does")]

use std::path::Path;

use peft::Result;
use peft::merge::merge;
use peft::model::Pretrained;
use peft::run::read_adapter;

fn main() -> Result<()> {
    let model = Pretrained::open("examples/tiny-llama")?;

    // An adapter is read as PEFT stores it, then fitted to the names and shapes of the model.
    let adapter = read_adapter(Path::new("runs/01_finetune"))?.for_model(model.config())?;

    // Tensors are merged one after the other, so that memory holds one of them. The closure is told how far it is, and ends
    // the merge when it returns `false`.
    let receipt = merge(&model, &[adapter], Path::new("models/02_merge"), None, &mut |_| true)?;

    // In bf16 a small change may be rounded away: the receipt says how much of it is left.
    println!("{}", serde_json::to_string_pretty(&receipt)?);
    Ok(())
}
