//! The two streams of the terminal: data on stdout, messages on stderr.

use std::borrow::Cow;
use std::fmt::Arguments;
use std::io::{self, IsTerminal, Write};

use clap::ValueEnum;
use clap::builder::styling::{AnsiColor, Style};

use crate::error::{Error, Result};

/// Whether messages are coloured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Colour {
    /// On a terminal, unless `NO_COLOR` is set
    Auto,
    /// Always
    Always,
    /// Never
    Never,
}

/// The form in which progress is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Log {
    /// A live bar on a terminal, lines elsewhere
    Auto,
    /// Plain lines; for the steps about a hundred, and one a minute at least
    Lines,
    /// Every event as a line of JSON
    Json,
    /// Warnings and errors only
    Silent,
}

/// Where a command's output goes.
pub(super) struct Terminal {
    pub(super) log: Log,
    pub(super) coloured: bool,
    stdout_is_closed: bool,
}

impl Terminal {
    pub(super) fn new(log: Log, colour: Colour) -> Self {
        let coloured = match colour {
            Colour::Always => true,
            Colour::Never => false,
            Colour::Auto => {
                let wanted = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
                wanted && io::stderr().is_terminal()
            }
        };
        Self { log, coloured, stdout_is_closed: false }
    }

    /// Writes data to stdout and flushes it, so that streamed text is seen at once.
    pub(super) fn write(&mut self, data: Arguments<'_>) -> Result<()> {
        let mut stdout = io::stdout().lock();
        // A file or another program gets the data as they are; a terminal would obey what is in them.
        let written = match stdout.is_terminal() {
            true => stdout.write_all(escaped(&data.to_string()).as_bytes()),
            false => stdout.write_fmt(data),
        };
        let written = written.and_then(|()| stdout.flush());
        // A reader such as `head` has what it wanted; that is not an error worth a message.
        self.stdout_is_closed |= matches!(&written, Err(error) if error.kind() == io::ErrorKind::BrokenPipe);
        written.map_err(|error| {
            Error::invalid(format!("stdout cannot be written: {error}"))
                .with_hint("look at the file or the program that the output is sent to")
        })
    }

    /// Writes one JSON document to stdout.
    pub(super) fn write_json(&mut self, document: &impl serde::Serialize) -> Result<()> {
        let text = serde_json::to_string_pretty(document)?;
        self.write(format_args!("{text}\n"))
    }

    /// Whether what happens is told as lines of JSON.
    pub(super) fn tells_json(&self) -> bool {
        self.log == Log::Json
    }

    /// Tells on stderr what happened, as a line of JSON.
    pub(super) fn tell(&self, event: &impl serde::Serialize) -> Result<()> {
        message(format_args!("{}", serde_json::to_string(event)?));
        Ok(())
    }

    /// Says a fact on stderr, unless only errors and warnings are wanted.
    pub(super) fn say(&self, text: Arguments<'_>) {
        note(self.log, text);
    }

    /// Says on stderr what the user should look at.
    pub(super) fn warn(&self, text: &str) {
        if self.log == Log::Json {
            let event = serde_json::json!({ "event": "warning", "text": text });
            return message(format_args!("{event}"));
        }
        labelled(Label::warning(self.coloured), format_args!("{text}"));
    }

    /// A message in the form that was asked for, to be said from another thread when the time comes.
    pub(super) fn note(&self, text: &'static str) -> impl Fn() + Send + 'static {
        let log = self.log;
        move || match log {
            Log::Json => message(format_args!("{}", serde_json::json!({ "event": "note", "text": text }))),
            Log::Auto | Log::Lines | Log::Silent => message_below(format_args!("{text}")),
        }
    }

    /// Whether the reader of stdout has gone away.
    pub(super) fn stdout_is_closed(&self) -> bool {
        self.stdout_is_closed
    }

    /// Says on stderr what went wrong and what to do about it.
    pub(super) fn complain(&self, error: &Error) {
        if self.log == Log::Json {
            let event = serde_json::json!({
                "event": "error",
                "text": error.to_string(),
                "hint": error.hint(),
                "exit_code": error.exit_code(),
            });
            message(format_args!("{event}"));
            return;
        }
        for error in error.each() {
            // What was interrupted on request is no error.
            match error.exit_code() {
                130 => message(format_args!("{error}")),
                _ => labelled(Label::new("error", AnsiColor::Red, self.coloured), format_args!("{error}")),
            }
            if let Some(hint) = error.hint() {
                labelled(Label::new("hint", AnsiColor::Cyan, self.coloured), format_args!("{hint}"));
            }
        }
    }
}

/// Says a fact on stderr in this form, unless only errors and warnings are wanted.
pub(super) fn note(log: Log, text: Arguments<'_>) {
    match log {
        Log::Silent => {}
        Log::Json => {
            message(format_args!("{}", serde_json::json!({ "event": "note", "text": text.to_string() })))
        }
        _ => message(text),
    }
}

/// Writes a message to stderr. When that is gone there is nobody left to tell.
pub(super) fn message(text: Arguments<'_>) {
    let _ = writeln!(io::stderr().lock(), "{}", in_message(&text.to_string()));
}

/// Writes a sign to stderr that asks for input; what is typed stands behind it.
pub(super) fn sign(text: &str) {
    let mut stderr = io::stderr().lock();
    let _ = stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush());
}

/// Writes a message to stderr where the cursor may stand after a bar, or after the `^C` that the terminal echoes.
pub(super) fn message_below(text: Arguments<'_>) {
    let _ = writeln!(io::stderr().lock(), "\n{}", in_message(&text.to_string()));
}

/// Writes a message to stderr that begins with a label, which may be coloured.
fn labelled(label: Label, text: Arguments<'_>) {
    let _ = writeln!(io::stderr().lock(), "{label} {}", in_message(&text.to_string()));
}

/// Returns the text of a message for the terminal: control characters are shown, and all lines after the first are
/// indented. A name with a line break in it could otherwise begin a line with `error:` or another label.
pub(super) fn in_message(text: &str) -> String {
    indented(&escaped(text), 4)
}

/// Moves all lines of a text but the first to the right by so many spaces.
pub(super) fn indented(text: &str, spaces: usize) -> String {
    text.replace('\n', &format!("\n{:spaces$}", ""))
}

/// Shows the control characters in a text, but not tab and newline, as JSON writes them: `\u001b`. Names, paths, data and
/// what models say could otherwise move the cursor, rename the window or hide what was said. Characters that separate lines
/// or turn the direction of text around are shown, too. In lines of JSON this changes no value.
pub(super) fn escaped(text: &str) -> Cow<'_, str> {
    let obeyed = |c: char| match c {
        '\n' | '\t' => false,
        '\u{61c}' | '\u{200e}' | '\u{200f}' => true,
        '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => true,
        c => c.is_control(),
    };
    if !text.contains(obeyed) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match obeyed(c) {
            true => shown += &format!("\\u{:04x}", c as u32),
            false => shown.push(c),
        }
    }
    Cow::Owned(shown)
}

/// What a message begins with: `error:`.
pub(super) struct Label {
    text: &'static str,
    style: Style,
}

impl Label {
    pub(super) fn new(text: &'static str, colour: AnsiColor, coloured: bool) -> Self {
        let style = if coloured { colour.on_default().bold() } else { Style::new() };
        Self { text, style }
    }

    /// `warning:`
    pub(super) fn warning(coloured: bool) -> Self {
        Self::new("warning", AnsiColor::Yellow, coloured)
    }
}

impl std::fmt::Display for Label {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}{}:{:#}", self.style, self.text, self.style)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_shown() {
        assert_eq!(
            escaped("\u{1b}]0;title\u{7}a\rb\u{7f}\u{9b}2J"),
            "\\u001b]0;title\\u0007a\\u000db\\u007f\\u009b2J"
        );
    }

    #[test]
    fn text_stays_what_it_is() {
        for text in ["plain", "two\n\tlines", "ö 漢 🙂 \u{a0} שלום \u{200d}"] {
            assert!(matches!(escaped(text), Cow::Borrowed(same) if same == text));
        }
    }

    #[test]
    fn what_separates_lines_or_turns_text_around_is_shown() {
        for c in "\u{85}\u{61c}\u{200e}\u{200f}\u{2028}\u{2029}\u{202a}\u{202e}\u{2066}\u{2069}".chars() {
            assert_eq!(escaped(&format!("a{c}b")), format!("a\\u{:04x}b", c as u32));
        }
        assert_eq!(in_message("a\nerror: b\r\nhint: c"), "a\n    error: b\\u000d\n    hint: c");
    }

    #[test]
    fn json_keeps_its_values() {
        let event = serde_json::json!({ "text": "\u{1b}[2J \u{9b}2J \u{7f}\n" });
        let shown = escaped(&event.to_string()).into_owned();
        assert!(!shown.contains(char::is_control));
        assert_eq!(serde_json::from_str::<serde_json::Value>(&shown).unwrap(), event);
    }
}
