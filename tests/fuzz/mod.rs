//! Mutated files against everything that reads files. Each class of input is read in a process of its own, so that an
//! abort or an overflow of the stack is a failure with a name.
//!
//! `cargo test --release -- fuzz::` reads a thousand inputs a class. `PEFT_FUZZ=100000` reads more and `PEFT_FUZZ_SEED=7`
//! reads others. A failing input is kept in a folder that the failure names; `PEFT_FUZZ_REPLAY=FOLDER` with the name of the
//! class reads it again.

mod adapters;
mod chance;
mod containers;
mod harness;
mod json;
mod models;
mod process;
mod runs;
mod texts;
mod toy;

use std::collections::BTreeMap;
use std::path::Path;

use chance::Chance;
use process::run;

/// The files of an input by their names; a name may have folders in it.
type Files = BTreeMap<String, Vec<u8>>;

/// A kind of input and the code that reads it.
trait Class {
    /// Inputs that are right, which mutations begin with.
    fn seeds(&self) -> Vec<Files>;

    /// Inputs that are read before any mutation, as they are: what once did harm.
    fn attacks(&self, _seeds: &[Files]) -> Vec<Files> {
        Vec::new()
    }

    /// Changes one thing.
    fn mutate(&self, files: &mut Files, chance: &mut Chance);

    /// Reads the input in `folder` and does with it what commands do.
    fn read(&self, folder: &Path) -> peft::Result<()>;
}

#[test]
fn safetensors() {
    run("safetensors", &models::Safetensors);
}

#[test]
fn shard_index() {
    run("shard_index", &models::ShardIndex);
}

#[test]
fn gguf() {
    run("gguf", &models::Gguf);
}

#[test]
fn config() {
    run("config", &models::Config);
}

#[test]
fn adapter() {
    run("adapter", &adapters::Adapter);
}

#[test]
fn tokenizer() {
    run("tokenizer", &texts::Tokenizer);
}

#[test]
fn tokenizer_config() {
    run("tokenizer_config", &texts::TokenizerConfig);
}

#[test]
fn template() {
    run("template", &texts::Template);
}

#[test]
fn data() {
    run("data", &runs::Data);
}

#[test]
fn recipe() {
    run("recipe", &runs::Recipes);
}

#[test]
fn checkpoint() {
    run("checkpoint", &runs::Checkpoints);
}

/// Without this, a harness that sees nothing would pass everything.
#[test]
fn faults_of_every_kind_are_seen() {
    harness::faults_of_every_kind_are_seen();
}
