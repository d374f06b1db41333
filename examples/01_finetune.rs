//! A fine-tuning run from code, as `peft finetune` does it from a recipe:
//!
//!     cargo run --release --example 01_finetune
//!
//! Trains an adapter for the bundled tiny model, and leaves a run directory that `peft finetune --resume` and Hugging Face PEFT
//! understand. `02_merge` folds its result into the model.

#![expect(clippy::print_stdout, reason = "a program that tells what it does")]

use std::sync::atomic::AtomicBool;

use peft::Result;
use peft::recipe::Plan;
use peft::run::finetune;
use peft::train::{Event, Reporter};

/// Takes what happens, and prints a part of it.
struct Losses;

impl Reporter for Losses {
    fn report(&mut self, event: &Event) {
        match event {
            Event::Step(report) if report.step % 10 == 0 => {
                println!("step {:2}  loss {:.4}", report.step, report.loss);
            }
            Event::Evaluation { step, eval_loss, .. } => println!("step {step:2}  eval loss {eval_loss:.4}"),
            Event::Warning { text } => println!("warning: {text}"),
            _ => {}
        }
    }
}

fn main() -> Result<()> {
    // What is not said has the default of its key: `peft recipes keys` lists them.
    let plan = Plan::finetune("examples/tiny-llama")
        .rank(16)
        .data("datasets/quickstart.jsonl")
        .steps(60)
        .learning_rate(2e-3)
        .output("runs/01_finetune")
        .build()?;

    // The plan as a recipe: reading this text gives the same plan.
    println!("{}", plan.to_toml()?);

    // Another thread may set this flag: the run then saves a checkpoint and ends.
    let interrupt = AtomicBool::new(false);
    // `true` goes on with a run that is in the directory, and begins one where there is none.
    let summary = finetune(&plan, true, &interrupt, &mut Losses)?;
    println!("{} steps, eval loss {:?}", summary.state.step, summary.last_eval_loss);
    Ok(())
}
