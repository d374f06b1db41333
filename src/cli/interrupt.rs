//! Ctrl-C, SIGTERM and SIGHUP: the first asks the command to leave things in order and stop, the second stops at once.
//! Whichever it was, the exit status is 130: a script has one number to ask for.

use std::sync::atomic::{AtomicBool, Ordering};

use super::terminal::Terminal;
use crate::error::{Error, Result};
use crate::train::{Event, Reporter};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);
/// Whether there is something to leave in order.
static BEGUN: AtomicBool = AtomicBool::new(false);

/// Listens from now on; `promise` says what the first signal leads to. Before [`begin`] it stops the program at once.
pub(super) fn listen(terminal: &Terminal, promise: &'static str) -> Result<&'static AtomicBool> {
    let (say, at_once) =
        (terminal.note(promise), terminal.note("interrupted before there was anything to save"));
    let hangup = Hangup::now();
    ctrlc::set_handler(move || {
        if INTERRUPTED.swap(true, Ordering::SeqCst) {
            std::process::exit(130);
        }
        if !BEGUN.load(Ordering::SeqCst) {
            at_once();
            std::process::exit(130);
        }
        say();
    })
    .map_err(|error| Error::invalid(format!("cannot listen for Ctrl-C: {error}")))?;
    hangup.restore_if_ignored();
    Ok(&INTERRUPTED)
}

/// Says that from now on a signal has to wait until things are in order.
pub(super) fn begin() {
    BEGUN.store(true, Ordering::SeqCst);
}

/// A reporter that calls [`begin`] when training does: before that there is nothing to save.
pub(super) struct BeginsWithTraining(pub(super) Box<dyn Reporter>);

impl Reporter for BeginsWithTraining {
    fn report(&mut self, event: &Event) {
        if matches!(event, Event::Start { .. }) {
            begin();
        }
        self.0.report(event);
    }
}

/// What a lost terminal would do before anybody listened.
struct Hangup {
    #[cfg(unix)]
    ignored: bool,
}

impl Hangup {
    #[cfg(unix)]
    fn now() -> Self {
        // SAFETY: a null action asks what is set and changes nothing; all zeros are an action.
        let ignored = unsafe {
            let mut set: libc::sigaction = std::mem::zeroed();
            libc::sigaction(libc::SIGHUP, std::ptr::null(), &raw mut set) == 0
                && set.sa_sigaction == libc::SIG_IGN
        };
        Self { ignored }
    }

    /// Under `nohup` the end of the terminal must not end the run.
    #[cfg(unix)]
    fn restore_if_ignored(&self) {
        if self.ignored {
            // SAFETY: ignoring a signal runs no code of ours.
            unsafe { libc::signal(libc::SIGHUP, libc::SIG_IGN) };
        }
    }

    #[cfg(not(unix))]
    fn now() -> Self {
        Self {}
    }

    #[cfg(not(unix))]
    fn restore_if_ignored(&self) {}
}
