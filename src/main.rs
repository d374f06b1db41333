//! The `peft` binary: arguments in, exit status out.

use std::process::ExitCode;

use mimalloc::MiMalloc;
use peft::ops::KeepBuffers;

/// A run allocates and frees the same large buffers step after step, and the system's fresh pages cost more than the
/// arithmetic in them.
#[global_allocator]
static ALLOCATOR: KeepBuffers<MiMalloc> = KeepBuffers::with_hook(MiMalloc, peft::cli::out_of_memory);

fn main() -> ExitCode {
    peft::cli::run(std::env::args_os())
}
