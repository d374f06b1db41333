//! Downloads from the Hub on stderr: a bar on a terminal, a line per file and one now and then elsewhere.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::interrupt;
use super::report::can_draw;
use super::terminal::{Log, escaped, message, note};
use crate::run::figures::{bytes, duration};
use crate::weights::OnProgress;

/// A log line about a slow download is written at most this often.
const BETWEEN_LINES: Duration = Duration::from_secs(20);

/// The file that is on its way; files come one after the other.
struct File {
    name: String,
    bar: Option<ProgressBar>,
    begun: Instant,
    /// Bytes that an earlier try had left.
    first: u64,
    told: Instant,
}

/// What tells of downloads in the form that was asked for.
pub(super) fn downloads(log: Log) -> OnProgress {
    let drawn = log == Log::Auto && can_draw();
    let file = Mutex::new(None::<File>);
    Arc::new(move |name: &str, done: u64, total: u64| {
        interrupt::keeps(log, (done < total).then(|| kept(name, done, total)));
        let mut current = file.lock().unwrap_or_else(PoisonError::into_inner);
        let is_new = current.as_ref().is_none_or(|file| file.name != name || done < file.first);
        let now = Instant::now();
        let file = match &mut *current {
            Some(file) if !is_new => file,
            other => {
                let bar = drawn.then(|| bar(name, done));
                other.insert(File { name: name.to_string(), bar, begun: now, first: done, told: now })
            }
        };
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
            None if drawn => {}
            None if is_new && done == 0 => note(log, format_args!("fetching {name} ({})", bytes(total))),
            None if is_new => {
                let (done, total) = (bytes(done), bytes(total));
                note(log, format_args!("fetching {name} ({total}, {done} of it from an earlier try)"));
            }
            None if now - file.told > BETWEEN_LINES && done < total => {
                file.told = now;
                let seconds = (now - file.begun).as_secs_f64();
                note(log, format_args!("{}", line(name, (file.first, done, total), seconds)));
            }
            None => {}
        }
    })
}

/// Says how far a download is: its bytes, its speed, and the time that the rest takes at that.
fn line(name: &str, (first, done, total): (u64, u64, u64), seconds: f64) -> String {
    let speed = (done.saturating_sub(first)) as f64 / seconds;
    let left = duration(total.saturating_sub(done) as f64 / speed.max(1.0));
    let megabytes = speed / 1e6;
    format!("fetching {name}: {} of {}, {megabytes:.1} MB/s, {left} left", bytes(done), bytes(total))
}

/// Says what an interrupted download leaves.
fn kept(name: &str, done: u64, total: u64) -> String {
    let (done, total) = (bytes(done), bytes(total));
    format!("interrupted; {done} of {total} of `{name}` are kept, and the same command goes on from there")
}

fn bar(name: &str, first: u64) -> ProgressBar {
    let template = "fetching {msg} {bar:20} {bytes}/{total_bytes} {decimal_bytes_per_sec} {eta} left";
    // The template is a literal; the default is as good should indicatif come to refuse it.
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    let bar =
        ProgressBar::new(0).with_style(style.progress_chars("━━─")).with_message(escaped(name).into_owned());
    // The speed is that of this try, not of what was there before.
    bar.set_position(first);
    bar.reset_eta();
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_bytes_speed_and_the_time_left() {
        let told = line("x", (1 << 30, 2 << 30, 4 << 30), 10.0);
        assert_eq!(told, "fetching x: 2.0 GiB of 4.0 GiB, 107.4 MB/s, 20s left");
        assert_eq!(line("x", (0, 0, 9), 0.5), "fetching x: 0 B of 9 B, 0.0 MB/s, 9s left");
    }
}
