//! Ctrl-C: the first asks the run to save and stop, the second stops at once.

use std::sync::atomic::{AtomicBool, Ordering};

use super::terminal::Terminal;
use crate::error::{Error, Result};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Listens for Ctrl-C from now on; the flag is set by the first.
pub(super) fn listen(terminal: &Terminal) -> Result<&'static AtomicBool> {
    let say = terminal.note("saving a checkpoint after this step; press Ctrl-C again to stop at once");
    ctrlc::set_handler(move || {
        if INTERRUPTED.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
        say();
    })
    .map_err(|error| Error::invalid(format!("cannot listen for Ctrl-C: {error}")))?;
    Ok(&INTERRUPTED)
}
