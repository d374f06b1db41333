//! The forms in which a run is told on stderr: a live bar, plain lines, JSON lines, or silence.

use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::routing::table;
use super::terminal::{Label, Log, Terminal, in_message};
use crate::adapter::hf::shell_word;
use crate::run::figures::{bytes, count, duration};
use crate::train::{Event, FinalWeights, Reporter, Sample, StepReport};

impl Terminal {
    /// A new reporter in the form that was asked for.
    pub(super) fn reporter(&self) -> Box<dyn Reporter> {
        reporter(self.log, self.coloured)
    }

    /// A bar for work that is counted.
    pub(super) fn counter(&self, what: &'static str) -> Counter {
        Counter::new(self.log, what)
    }
}

/// A reporter that writes to stderr.
pub(super) fn reporter(log: Log, coloured: bool) -> Box<dyn Reporter> {
    match log {
        Log::Auto if can_draw() => Box::new(Bar::new(coloured)),
        Log::Auto | Log::Lines => Box::new(Lines::new(io::stderr(), coloured)),
        Log::Json => Box::new(Json(io::stderr())),
        Log::Silent => Box::new(Silent { out: io::stderr(), coloured }),
    }
}

/// Whether a bar on stderr would be seen: not in a file, and not on a terminal that says it is `dumb`.
pub(super) fn can_draw() -> bool {
    !ProgressDrawTarget::stderr().is_hidden()
}

/// How much of a run is done, to tell when it will end.
struct Progress {
    begun: Instant,
    first: u64,
    steps: u64,
}

impl Progress {
    fn new() -> Self {
        Self { begun: Instant::now(), first: 0, steps: 0 }
    }

    fn start(&mut self, step: u64, steps: u64) {
        *self = Self { begun: Instant::now(), first: step, steps };
    }

    /// Seconds that the steps after `step` will take if they go on as they went.
    fn left(&self, step: u64) -> f64 {
        seconds_left(self.begun.elapsed().as_secs_f64(), step.saturating_sub(self.first), self.steps - step)
    }
}

fn seconds_left(elapsed: f64, done: u64, left: u64) -> f64 {
    elapsed / done.max(1) as f64 * left as f64
}

/// A bar that stays at the foot of the terminal while everything else scrolls above.
struct Bar {
    bar: Option<ProgressBar>,
    progress: Progress,
    coloured: bool,
}

impl Bar {
    fn new(coloured: bool) -> Self {
        Self { bar: None, progress: Progress::new(), coloured }
    }

    fn print(&self, event: &Event) {
        let write = || write_event(&mut io::stderr(), event, self.coloured);
        match &self.bar {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }
}

impl Reporter for Bar {
    fn report(&mut self, event: &Event) {
        match event {
            Event::Start { step, steps } => {
                self.progress.start(*step, *steps);
                let style = ProgressStyle::with_template("{pos}/{len} {bar:8} {wide_msg}");
                // The template is a literal; the default is as good should indicatif come to refuse it.
                let style = style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("━━─");
                self.bar = Some(ProgressBar::new(*steps).with_style(style).with_position(*step));
            }
            Event::Step(step) => {
                if let Some(bar) = &self.bar {
                    bar.set_message(bar_message(step, self.progress.left(step.step)));
                    bar.set_position(step.step);
                }
            }
            Event::End { .. } => {
                if let Some(bar) = self.bar.take() {
                    bar.abandon();
                }
                self.print(event);
            }
            _ => self.print(event),
        }
    }
}

impl Drop for Bar {
    /// What was reached stays on the screen when a run ends early.
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.abandon();
        }
    }
}

/// A bar for work that is counted. It is gone when the work is done, and there is none where nobody watches.
pub(super) struct Counter(Option<ProgressBar>);

impl Counter {
    pub(super) fn new(log: Log, what: &'static str) -> Self {
        let watched = log == Log::Auto && can_draw();
        Self(watched.then(|| {
            let style = ProgressStyle::with_template("{msg} {bar:30} {pos}/{len}");
            let style = style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("━━─");
            ProgressBar::new(0).with_style(style).with_message(what)
        }))
    }

    pub(super) fn at(&self, done: u64, total: u64) {
        if let Some(bar) = &self.0 {
            bar.set_length(total);
            bar.set_position(done);
        }
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

/// What stands beside the bar; with it, less than 80 columns.
fn bar_message(step: &StepReport, left: f64) -> String {
    let StepReport { loss, learning_rate, grad_norm, tokens_per_second, peak_rss_bytes, .. } = step;
    let (speed, left, peak) = (tokens_per_second.round() as u64, duration(left), bytes(*peak_rss_bytes));
    let of_teacher = teacher_terms(step);
    format!(
        "loss {loss:.3}{of_teacher} lr {learning_rate:.1e} norm {grad_norm:.1} {speed} tok/s {peak} eta {left}"
    )
}

/// Of slow steps none is silent for longer than this.
const SILENCE: Duration = Duration::from_secs(60);

/// A line per event; of many steps only some.
struct Lines<W> {
    out: W,
    progress: Progress,
    /// When the last step was told.
    told: Instant,
    coloured: bool,
}

impl<W: Write> Lines<W> {
    fn new(out: W, coloured: bool) -> Self {
        Self { out, progress: Progress::new(), told: Instant::now(), coloured }
    }

    /// Whether a step gets a line: the first, the last, about a hundred, and whenever the last line is old.
    fn is_due(&self, step: u64) -> bool {
        let Progress { first, steps, .. } = self.progress;
        let every = steps.div_ceil(100).max(1);
        let marked = step == first + 1 || step == steps || step.is_multiple_of(every);
        marked || self.told.elapsed() >= SILENCE
    }
}

impl<W: Write> Reporter for Lines<W> {
    fn report(&mut self, event: &Event) {
        match event {
            Event::Start { step, steps } => self.progress.start(*step, *steps),
            Event::Step(step) => {
                if self.is_due(step.step) {
                    self.told = Instant::now();
                    write_line(&mut self.out, &step_line(step, self.progress.left(step.step)));
                }
            }
            _ => write_event(&mut self.out, event, self.coloured),
        }
    }
}

/// What the teacher says of a step, where there is one.
fn teacher_terms(step: &StepReport) -> String {
    let term = |(name, value): (&str, Option<f64>)| value.map(|value| format!("  {name} {value:.4}"));
    [("kl", step.kl), ("hidden", step.hidden)].into_iter().filter_map(term).collect()
}

fn step_line(step: &StepReport, left: f64) -> String {
    format!(
        "step {}/{}  loss {:.4}{}  lr {:.2e}  norm {:.3}  {} tokens/s  peak {}  {} left",
        step.step,
        step.steps,
        step.loss,
        teacher_terms(step),
        step.learning_rate,
        step.grad_norm,
        count(step.tokens_per_second.round() as u64),
        bytes(step.peak_rss_bytes),
        duration(left)
    )
}

/// Every event as a line of JSON.
struct Json<W>(W);

impl<W: Write> Reporter for Json<W> {
    fn report(&mut self, event: &Event) {
        if let Ok(json) = serde_json::to_string(event) {
            write_line(&mut self.0, &json);
        }
    }
}

/// Warnings only.
struct Silent<W> {
    out: W,
    coloured: bool,
}

impl<W: Write> Reporter for Silent<W> {
    fn report(&mut self, event: &Event) {
        if matches!(event, Event::Warning { .. }) {
            write_event(&mut self.out, event, self.coloured);
        }
    }
}

/// An event that is no step in words, in one or more messages; none for those that only move the bar.
fn messages(event: &Event) -> Vec<String> {
    let message = match event {
        Event::Note { text } | Event::Warning { text } => text.clone(),
        Event::Evaluation { step, eval_loss, best } => {
            let best = if *best { "  best so far" } else { "" };
            format!("step {step}  eval loss {eval_loss:.4}  perplexity {:.2}{best}", eval_loss.exp())
        }
        Event::Sample { step, sample: Sample { prompt, completion } } => {
            let when = if *step == 0 { "before training".to_string() } else { format!("after step {step}") };
            let answer = format!("{when}, answered: {}", completion.trim());
            return vec![format!("{when}, asked: {}", prompt.trim()), answer];
        }
        Event::Routing { routing } => return table(routing).lines().map(str::to_string).collect(),
        Event::Checkpoint { path, .. } => format!("saved {}", path.display()),
        Event::End { path, seconds, result } => {
            return vec![format!("done in {}: {}", duration(*seconds), path.display()), ending(path, result)];
        }
        Event::Start { .. } | Event::Step(_) => return Vec::new(),
    };
    vec![message]
}

/// Says which weights a run left, and what to do with them.
fn ending(path: &Path, result: &FinalWeights) -> String {
    let loss = |loss: Option<f64>| loss.map_or_else(String::new, |loss| format!(" (eval loss {loss:.4})"));
    let step = result.step;
    let which = match (result.is_best, result.last_eval_loss) {
        (true, Some(last)) => format!(
            "it holds the weights after step {step}{}, the best evaluation; the last had {last:.4}",
            loss(result.eval_loss)
        ),
        _ => format!("it holds the weights after step {step}{}", loss(result.eval_loss)),
    };
    let path = shell_word(&path.to_string_lossy());
    let next = match &result.base {
        Some(base) => format!("peft chat --model {} --adapter {path}", shell_word(base)),
        None => format!("peft chat --model {path}"),
    };
    format!("{which}; talk to it with `{next}`")
}

/// When stderr is gone there is nobody left to tell. Control characters are shown; only our labels are coloured.
fn write_line(out: &mut impl Write, line: &str) {
    let _ = writeln!(out, "{}", in_message(line));
}

/// Writes an event that is no step, if it is told in words.
fn write_event(out: &mut impl Write, event: &Event, coloured: bool) {
    match event {
        Event::Warning { text } => {
            let _ = writeln!(out, "{} {}", Label::warning(coloured), in_message(text));
        }
        _ => messages(event).iter().for_each(|message| write_line(out, message)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: u64, steps: u64) -> Event {
        Event::Step(StepReport {
            step,
            steps,
            epoch: 0.5,
            loss: 12.3456,
            learning_rate: 1.9e-4,
            grad_norm: 0.9123,
            tokens: 2048,
            supervised_tokens: 1024,
            tokens_per_second: 1234.4,
            peak_rss_bytes: 1_932_735_283,
            kl: None,
            hidden: None,
            router_losses: std::collections::BTreeMap::new(),
            routing: Vec::new(),
        })
    }

    fn told(mut reporter: impl FnMut(&Event), events: &[Event]) {
        events.iter().for_each(&mut reporter);
    }

    fn story() -> Vec<Event> {
        vec![
            Event::Note { text: "trainable params: 10 || all params: 100 || trainable%: 10.0000".into() },
            Event::Start { step: 0, steps: 2 },
            Event::Sample {
                step: 0,
                sample: Sample { prompt: "Who?".into(), completion: "I\ndo not know.\n".into() },
            },
            step(1, 2),
            Event::Warning { text: "3 records have no labels and are left out".into() },
            Event::Evaluation { step: 1, eval_loss: 2.0, best: true },
            step(2, 2),
            Event::Evaluation { step: 2, eval_loss: 2.1, best: false },
            Event::Checkpoint { step: 2, path: "runs/quickstart/checkpoint-2".into() },
            Event::End { path: "runs/quickstart".into(), seconds: 61.2, result: best_weights() },
        ]
    }

    fn best_weights() -> FinalWeights {
        let (eval_loss, last_eval_loss) = (Some(2.0), Some(2.1));
        FinalWeights { step: 1, eval_loss, last_eval_loss, is_best: true, base: Some("model".into()) }
    }

    #[test]
    fn lines_tell_a_short_run_step_by_step() {
        let mut lines = Lines::new(Vec::new(), false);
        told(|event| lines.report(event), &story());
        insta::assert_snapshot!(String::from_utf8(lines.out).unwrap(), @"
        trainable params: 10 || all params: 100 || trainable%: 10.0000
        before training, asked: Who?
        before training, answered: I
            do not know.
        step 1/2  loss 12.3456  lr 1.90e-4  norm 0.912  1,234 tokens/s  peak 1.8 GiB  0s left
        warning: 3 records have no labels and are left out
        step 1  eval loss 2.0000  perplexity 7.39  best so far
        step 2/2  loss 12.3456  lr 1.90e-4  norm 0.912  1,234 tokens/s  peak 1.8 GiB  0s left
        step 2  eval loss 2.1000  perplexity 8.17
        saved runs/quickstart/checkpoint-2
        done in 1m01s: runs/quickstart
        it holds the weights after step 1 (eval loss 2.0000), the best evaluation; the last had 2.1000; talk to it with `peft chat --model model --adapter runs/quickstart`
        ");
    }

    #[test]
    fn names_and_answers_cannot_begin_a_line() {
        let text = "a\nerror: b\u{2028}c".to_string();
        let sample = Sample { prompt: text.clone(), completion: text.clone() };
        let events = [
            Event::Note { text: text.clone() },
            Event::Warning { text: text.clone() },
            Event::Sample { step: 1, sample },
            Event::Checkpoint { step: 1, path: text.clone().into() },
            Event::End { path: text.into(), seconds: 1.0, result: best_weights() },
        ];
        let mut lines = Lines::new(Vec::new(), false);
        told(|event| lines.report(event), &events);
        let told = String::from_utf8(lines.out).unwrap();
        assert_eq!(told.matches("\n    error: b\\u2028c\n").count(), 6, "{told}");
        assert!(!told.contains("\nerror:"), "{told}");
    }

    #[test]
    fn lines_leave_steps_of_a_long_run_out() {
        let mut lines = Lines::new(Vec::new(), false);
        lines.report(&Event::Start { step: 7, steps: 1000 });
        (8..=1000).for_each(|n| lines.report(&step(n, 1000)));
        let text = String::from_utf8(lines.out).unwrap();
        let told: Vec<&str> = text.lines().filter_map(|line| line.split_whitespace().nth(1)).collect();
        assert_eq!(told[..3], ["8/1000", "10/1000", "20/1000"]);
        assert_eq!(told.last(), Some(&"1000/1000"));
        assert_eq!(told.len(), 101);
    }

    #[test]
    fn slow_steps_are_told_one_by_one() {
        let mut lines = Lines::new(Vec::new(), false);
        lines.report(&Event::Start { step: 0, steps: 1000 });
        lines.report(&step(1, 1000));
        lines.report(&step(2, 1000));
        lines.told = Instant::now().checked_sub(SILENCE).unwrap();
        lines.report(&step(3, 1000));
        lines.report(&step(4, 1000));
        let text = String::from_utf8(lines.out).unwrap();
        let told: Vec<&str> = text.lines().filter_map(|line| line.split_whitespace().nth(1)).collect();
        assert_eq!(told, ["1/1000", "3/1000"]);
    }

    #[test]
    fn every_json_line_is_an_event() {
        let mut json = Json(Vec::new());
        told(|event| json.report(event), &story());
        let text = String::from_utf8(json.0).unwrap();
        let events: Vec<serde_json::Value> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(events.len(), story().len());
        assert!(events.iter().all(|event| event["event"].is_string()));
        assert_eq!(events[3]["event"], "step");
        assert_eq!(events[3]["tokens"], 2048);
    }

    #[test]
    fn silence_lets_warnings_through() {
        let mut silent = Silent { out: Vec::new(), coloured: false };
        told(|event| silent.report(event), &story());
        assert_eq!(
            String::from_utf8(silent.out).unwrap(),
            "warning: 3 records have no labels and are left out\n"
        );
    }

    #[test]
    fn the_bar_fits_into_eighty_columns() {
        let Event::Step(step) = step(9999, 10_000) else { panic!("a step") };
        let message = bar_message(&step, 7634.0);
        assert_eq!(message, "loss 12.346 lr 1.9e-4 norm 0.9 1234 tok/s 1.8 GiB eta 2h07m");
        let bar = "9999/10000 ━━━━━━━━ ";
        assert!(bar.chars().count() + message.chars().count() < 80);
    }

    #[test]
    fn the_time_left_follows_the_steps_made_by_this_process() {
        assert_eq!(seconds_left(10.0, 5, 20), 40.0);
        assert_eq!(seconds_left(0.0, 0, 20), 0.0);
        assert_eq!(seconds_left(10.0, 5, 0), 0.0);
    }
}
