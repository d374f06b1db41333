//! `peft chat`: lines from stdin are questions or commands, answers go to stdout.

use std::io::{self, BufRead, ErrorKind, IsTerminal, StdinLock};
use std::path::Path;

use clap::Args;

use super::ModelArguments;
use super::generate::{
    SamplingArguments, TRAINED_PLAIN, not_blank, stream, warn_if_full, warn_of_control_tokens, without_system,
};
use super::models::open;
use super::new_file::write_new;
use super::terminal::{Terminal, message, sign};
use crate::data::{Layout, Text};
use crate::error::{Error, Result, nearest};
use crate::generate::{Fitted, Limits, Session, Talk};

#[derive(Debug, Args)]
pub(super) struct Chat {
    #[command(flatten)]
    model: ModelArguments,
    /// Set the system message, which the model keeps to
    #[arg(long, value_name = "TEXT", value_parser = not_blank)]
    system: Option<String>,
    /// The most tokens of an answer
    #[arg(long, value_name = "N", default_value_t = 1024)]
    max_new_tokens: usize,
    #[command(flatten)]
    sampling: SamplingArguments,
}

/// A command of the chat: its name, what stands behind it, and what it does.
const COMMANDS: [(&str, &str, &str); 6] = [
    ("/help", "", "list the commands"),
    ("/clear", "", "forget what was said; the system message stays"),
    ("/system", "TEXT", "tell the model what to keep to; without TEXT, nothing"),
    ("/save", "FILE", "write the chat into a new file, a record that `data.train` takes"),
    ("/undo", "", "take back the last exchange"),
    ("/exit", "", "end the chat, as Ctrl-D does"),
];

/// Stands before and after several lines that are one question.
const QUOTES: &str = "\"\"\"";

pub(super) fn chat(arguments: &Chat, terminal: &mut Terminal) -> Result<()> {
    let loaded = open(&arguments.model, terminal)?;
    let text = &loaded.text;
    if !text.has_template() {
        return Err(Error::request("the model has no chat template")
            .with_hint("`peft generate --raw` continues a text without one"));
    }
    if loaded.layout == Some(Layout::Plain) {
        terminal.warn(&format!("{TRAINED_PLAIN}; `peft generate --raw` leaves it out"));
    }
    let most = loaded.model.config().max_position_embeddings;
    let mut talk = Talk::new(text, most, arguments.max_new_tokens);
    if let Some(system) = &arguments.system {
        warn_of_control_tokens(system, text, terminal);
        talk.set_system(Some(system.clone())).map_err(without_system)?;
    }
    let mut session = Session::new(&loaded.model);
    let limits = Limits { max_new_tokens: arguments.max_new_tokens, stop: text.eos_ids().to_vec() };
    let mut input = Input::new();
    if input.is_terminal {
        message(format_args!("say something; `/help` lists the commands, Ctrl-D ends the chat"));
    }
    while let Some(said) = input.next(terminal)? {
        let question = match said {
            Said::Question(question) => question,
            Said::Command { name, rest } if name == "/exit" && rest.is_empty() => return Ok(()),
            Said::Command { name, rest } => {
                obey(&name, &rest, &mut talk, text, terminal);
                continue;
            }
        };
        warn_of_control_tokens(&question, text, terminal);
        let Some(prompt) = fitting(&mut talk, &question, terminal)? else { continue };
        let sampling = arguments.sampling.sampling();
        let (answer, outcome) = stream(&mut session, text, &prompt, &limits, sampling, terminal)?;
        warn_if_full(outcome.ended, most, terminal);
        talk.answer(answer);
    }
    Ok(())
}

/// The prompt of a conversation that goes on with a question; says what became of the question or of what was said before, where
/// not all of it has room.
fn fitting(talk: &mut Talk<'_>, question: &str, terminal: &Terminal) -> Result<Option<Vec<u32>>> {
    let fitted = talk.ask(question)?;
    let most = talk.most();
    match fitted {
        Fitted::TooLong(tokens) => {
            terminal.warn(&format!(
                "this takes {tokens} tokens, and the model sees {most} with the answer: it is left out; say less"
            ));
            Ok(None)
        }
        Fitted::Prompt { tokens, forgotten } => {
            let oldest = match forgotten {
                0 => return Ok(Some(tokens)),
                1 => "the oldest exchange is".to_string(),
                more => format!("the {more} oldest exchanges are"),
            };
            terminal
                .warn(&format!("the model sees {most} tokens, and the chat is longer: {oldest} forgotten"));
            Ok(Some(tokens))
        }
    }
}

/// Does what a command says. One that cannot be done is warned of, and the chat goes on.
fn obey(name: &str, rest: &str, talk: &mut Talk<'_>, text: &Text, terminal: &Terminal) {
    let Some((_, takes, _)) = COMMANDS.iter().find(|(known, _, _)| *known == name) else {
        let hint = match nearest(name, COMMANDS.map(|(known, _, _)| known), 1).first() {
            Some(near) => format!("did you mean `{near}`?"),
            None => format!(
                "`/help` lists the commands, and a question that begins with `/` stands between lines of `{QUOTES}`"
            ),
        };
        return terminal.warn(&format!("there is no command `{name}`; {hint}"));
    };
    if takes.is_empty() && !rest.is_empty() {
        return terminal
            .warn(&format!("`{name}` stands alone, and `{rest}` follows it here: nothing is done"));
    }
    match name {
        "/clear" => {
            talk.clear();
            terminal.say(format_args!("what was said is forgotten"));
        }
        "/system" if rest.is_empty() => match talk.set_system(None) {
            Ok(()) => terminal.say(format_args!("there is no system message")),
            Err(error) => terminal.warn(&error.to_string()),
        },
        "/system" => {
            warn_of_control_tokens(rest, text, terminal);
            match talk.set_system(Some(rest.to_string())) {
                Ok(()) => terminal.say(format_args!("the model is told so from now on")),
                Err(error) => terminal.warn(&error.to_string()),
            }
        }
        "/undo" if talk.undo() => terminal.say(format_args!("the last exchange is taken back")),
        "/undo" => terminal.warn("nothing has been answered, so there is nothing to take back"),
        "/save" => match save(rest, talk) {
            Ok(said) => terminal.say(format_args!("{said}")),
            Err(error) => terminal.warn(&error.to_string()),
        },
        _ => {
            for (name, takes, does) in COMMANDS {
                terminal.say(format_args!("{:14}{does}", format!("{name} {takes}")));
            }
            terminal.say(format_args!("{:14}before and after several lines that are one question", QUOTES));
        }
    }
}

/// Writes the conversation into a new file, and says what was written.
fn save(file: &str, talk: &Talk<'_>) -> Result<String> {
    if file.is_empty() {
        return Err(Error::request("`/save` needs the name of a file to write"));
    }
    let (record, left_out) = talk.record();
    let Some(record) = record else {
        return Err(Error::request("nothing has been answered, so there is nothing to save"));
    };
    let taken = Error::request("exists already, and `/save` writes a new file");
    write_new(Path::new(file), &format!("{record}\n"), taken)?;
    Ok(match left_out {
        0 => format!("wrote {file}"),
        1 => format!("wrote {file}, without an exchange whose answer is empty"),
        many => format!("wrote {file}, without {many} exchanges whose answers are empty"),
    })
}

/// A line that a user typed is a question or a command.
enum Said {
    Question(String),
    Command { name: String, rest: String },
}

/// Questions and commands from stdin, with a sign that asks for them on a terminal.
struct Input {
    lines: io::Split<StdinLock<'static>>,
    is_terminal: bool,
}

impl Input {
    fn new() -> Self {
        let stdin = io::stdin();
        let is_terminal = stdin.is_terminal();
        Self { lines: stdin.lock().split(b'\n'), is_terminal }
    }

    /// Reads the next question or command; returns none at the end of the input.
    fn next(&mut self, terminal: &Terminal) -> Result<Option<Said>> {
        loop {
            let Some(line) = self.line("> ", terminal)? else { return Ok(None) };
            let said = line.trim();
            if said == QUOTES {
                match self.quoted(terminal)? {
                    Some(question) if question.trim().is_empty() => {}
                    question => return Ok(question.map(Said::Question)),
                }
            } else if said.starts_with('/') {
                let (name, rest) = said.split_once(char::is_whitespace).unwrap_or((said, ""));
                return Ok(Some(Said::Command { name: name.to_string(), rest: rest.trim().to_string() }));
            } else if !said.is_empty() {
                return Ok(Some(Said::Question(line)));
            }
        }
    }

    /// The lines up to the next one of quotes, or up to the end of the input.
    fn quoted(&mut self, terminal: &Terminal) -> Result<Option<String>> {
        let mut lines = Vec::new();
        loop {
            match self.line("... ", terminal)? {
                Some(line) if line.trim() == QUOTES => return Ok(Some(lines.join("\n"))),
                Some(line) => lines.push(line),
                None => {
                    terminal.warn(&format!(
                        "the input ends before the line of `{QUOTES}` that ends a question: the question is left out"
                    ));
                    return Ok(None);
                }
            }
        }
    }

    /// The next line that is text, without its end.
    fn line(&mut self, asks: &str, terminal: &Terminal) -> Result<Option<String>> {
        loop {
            if self.is_terminal {
                sign(asks);
            }
            let Some(line) = self.lines.next() else {
                if self.is_terminal {
                    // The cursor stands behind the sign.
                    sign("\n");
                }
                return Ok(None);
            };
            let Ok(mut line) = String::from_utf8(line.map_err(unreadable_input)?) else {
                terminal.warn("this line is not valid UTF-8 and is left out; say it again in UTF-8");
                continue;
            };
            if line.ends_with('\r') {
                line.pop();
            }
            return Ok(Some(line));
        }
    }
}

/// Names standard input in an error of reading it, which has no path of its own.
fn unreadable_input(error: io::Error) -> Error {
    let what = match error.kind() {
        ErrorKind::IsADirectory => "standard input is a folder, expected lines of text".to_string(),
        _ => format!("standard input cannot be read: {error}"),
    };
    Error::request(what).with_hint(
        "type what you say, or give a file with a line for each question: `peft chat --model MODEL < questions.txt`",
    )
}
