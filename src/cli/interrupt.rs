//! Ctrl-C, SIGTERM and SIGHUP: the first asks the command to leave things in order and stop, the second stops at once,
//! unless it comes within half a second.
//! Whichever it was, the exit status is 130: a script has one number to ask for.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::faults::TOO_TIGHT;
use super::terminal::{Log, Terminal, message_below, note};
use crate::error::{Error, Result};
use crate::train::{Event, Reporter};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);
/// Whether there is something to leave in order.
static BEGUN: AtomicBool = AtomicBool::new(false);

/// When the first signal came.
static FIRST: OnceLock<Instant> = OnceLock::new();
/// A signal that comes this soon after the first is the same request.
const ONE_REQUEST: Duration = Duration::from_millis(500);

/// Prints a message; the thread that waits for signals calls it.
type Say = Box<dyn Fn() + Send>;

/// Holds the messages of the process's only signal handler; commands and downloads set them.
struct Words {
    /// Whether there is a handler. A process can set one only once.
    listening: bool,
    /// Announces, after the first signal, how the command will stop.
    promise: Option<Say>,
    /// Says that the command stopped before there was anything to save.
    nothing: Option<Say>,
    /// Says what remains of an interrupted download; it replaces `nothing`.
    kept: Option<(Log, String)>,
}

static WORDS: Mutex<Words> = Mutex::new(Words { listening: false, promise: None, nothing: None, kept: None });

/// Listens from now on; `promise` says what the first signal leads to. Before [`begin`] it stops the program at once.
pub(super) fn listen(terminal: &Terminal, promise: &'static str) -> Result<&'static AtomicBool> {
    let mut words = words();
    words.promise = Some(Box::new(terminal.note(promise)));
    words.nothing = Some(Box::new(terminal.note("interrupted before there was anything to save")));
    handle(&mut words)?;
    Ok(&INTERRUPTED)
}

/// Listens for a command that writes nothing, which the first signal ends at once.
pub(super) fn end_at_once(terminal: &Terminal) {
    let mut words = words();
    words.nothing = Some(Box::new(terminal.note("interrupted")));
    // Without a handler a signal ends it all the same, with the signal's own status.
    let _ = handle(&mut words);
}

/// Notes what a signal would leave of a download; `None` once the file is whole.
pub(super) fn keeps(log: Log, text: Option<String>) {
    let mut words = words();
    words.kept = text.map(|text| (log, text));
    // Without a handler the download is kept all the same, and nobody says so.
    let _ = handle(&mut words);
}

fn words() -> MutexGuard<'static, Words> {
    WORDS.lock().unwrap_or_else(PoisonError::into_inner)
}

fn handle(words: &mut Words) -> Result<()> {
    if words.listening {
        return Ok(());
    }
    let hangup = Hangup::now();
    ctrlc::set_handler(|| {
        if INTERRUPTED.swap(true, Ordering::SeqCst) {
            // `timeout` sends its signal to the process and then to its group: both are one request.
            if FIRST.get().is_some_and(|first| first.elapsed() > ONE_REQUEST) {
                std::process::exit(130);
            }
            return;
        }
        let _ = FIRST.set(Instant::now());
        let words = self::words();
        // While a download is on its way nothing else is being written, whether work has begun or not.
        if words.kept.is_none() && BEGUN.load(Ordering::SeqCst) {
            return words.promise.iter().for_each(|say| say());
        }
        match (&words.kept, &words.nothing) {
            (Some((Log::Auto, text)), _) => message_below(format_args!("{text}")),
            (Some((log, text)), _) => note(*log, format_args!("{text}")),
            (None, Some(say)) => say(),
            (None, None) => {}
        }
        std::process::exit(130);
    })
    .map_err(|error| {
        Error::invalid(format!(
            "out of memory or threads: the thread that waits for Ctrl-C cannot be started: {error}"
        ))
        .with_hint(TOO_TIGHT)
    })?;
    words.listening = true;
    hangup.restore_if_ignored();
    Ok(())
}

/// Says that from now on a signal has to wait until things are in order.
pub(super) fn begin() {
    words().kept = None;
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
