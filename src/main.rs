//! The `peft` binary: arguments in, exit status out.

use std::process::ExitCode;

/// A run allocates and frees the same large buffers step after step; glibc gives their pages back to the system each
/// time, and touching them anew costs more than the arithmetic in them. mimalloc keeps them.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    peft::cli::run(std::env::args_os())
}
