//! A dense model turned into a mixture of experts:
//!
//!     cargo run --release --example 03_upcycle
//!
//! Cuts the feed-forward networks of the bundled tiny model into slices with routers, and writes a folder that transformers loads
//! as a mixture. `recipes/upcycle-tiny.toml` says the same to `peft upcycle`.

#![expect(clippy::print_stdout, reason = "a program that tells what it does")]

use peft::Result;
use peft::recipe::{Document, UpcyclePlan, UpcycleRecipe};
use peft::run::upcycle;
use peft::upcycle::Event;

const RECIPE: &str = r#"
task = "upcycle"
output = "models/03_upcycle"
model.source = "examples/tiny-llama"
upcycle = { experts = 8, shared = 2, active = 2 }
calibration = { data = [{ path = "datasets/quickstart.jsonl" }], tokens = 4096, held_out = 1024 }
"#;

fn main() -> Result<()> {
    // A recipe is checked before any file is opened: unknown keys, values out of bounds, keys that contradict each other.
    let recipe = UpcycleRecipe::read(&Document::parse("03_upcycle.rs", RECIPE)?)?;
    let plan = UpcyclePlan::of(&recipe, "03_upcycle");

    let mut say = |event: Event| {
        match event {
            Event::Note { text } => println!("{text}"),
            Event::Layer { done, layers } => println!("layer {done} of {layers}"),
            Event::End { path, seconds } => println!("wrote {} in {seconds:.0} s", path.display()),
        }
        Ok(())
    };
    let report = upcycle(&plan, &mut say, &mut |warning| println!("warning: {warning}"))?;

    // The account holds the mixture against the dense model and simpler ways to make it as cheap.
    println!("{}", serde_json::to_string_pretty(&report)?);
    Ok(())
}
