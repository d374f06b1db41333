//! Downloads from the Hub on stderr: a bar on a terminal, a line per file elsewhere.

use std::sync::{Arc, Mutex, PoisonError};

use indicatif::{ProgressBar, ProgressStyle};

use super::report::{Log, can_draw};
use super::terminal::{escaped, message, note};
use crate::recipe::figures::bytes;
use crate::weights::OnProgress;

/// The file that is on its way; files come one after the other.
#[derive(Default)]
struct File {
    name: String,
    bar: Option<ProgressBar>,
}

/// What tells of downloads in the form that was asked for.
pub(super) fn downloads(log: Log) -> OnProgress {
    let drawn = log == Log::Auto && can_draw();
    let file = Mutex::new(File::default());
    Arc::new(move |name: &str, done: u64, total: u64| {
        let mut file = file.lock().unwrap_or_else(PoisonError::into_inner);
        let is_new = file.name != name;
        if is_new {
            file.name = name.to_string();
            file.bar = drawn.then(|| bar(name));
        }
        match &file.bar {
            Some(bar) => {
                bar.set_length(total);
                bar.set_position(done);
                if done >= total {
                    bar.finish_and_clear();
                    file.bar = None;
                    message(format_args!("fetched {name} ({})", bytes(total)));
                }
            }
            None if is_new && !drawn => note(log, format_args!("fetching {name} ({})", bytes(total))),
            None => {}
        }
    })
}

fn bar(name: &str) -> ProgressBar {
    let style = ProgressStyle::with_template("fetching {msg} {bar:20} {bytes}/{total_bytes} eta {eta}");
    // The template is a literal; the default is as good should indicatif come to refuse it.
    let style = style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("━━─");
    ProgressBar::new(0).with_style(style).with_message(escaped(name).into_owned())
}
