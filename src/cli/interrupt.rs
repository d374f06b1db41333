//! Ctrl-C: the first asks the run to save and stop, the second stops at once.

use std::sync::atomic::{AtomicBool, Ordering};

use super::terminal::message;
use crate::error::{Error, Result};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Listens for Ctrl-C from now on; the flag is set by the first.
pub(super) fn listen() -> Result<&'static AtomicBool> {
    ctrlc::set_handler(|| {
        if INTERRUPTED.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
        message(format_args!("\nsaving a checkpoint after this step; press Ctrl-C again to stop at once"));
    })
    .map_err(|error| Error::invalid(format!("cannot listen for Ctrl-C: {error}")))?;
    Ok(&INTERRUPTED)
}
