//! `peft generate`: one prompt as text, or a file of prompts as lines of JSON.

use std::io::{self, IsTerminal, Read};
use std::path::{Path, PathBuf};

use clap::{ArgGroup, Args};
use serde_json::Value;

use super::ModelArguments;
use super::models::open;
use super::terminal::Terminal;
use crate::data::{Asked, Conversation, Layout, Text, read_prompts};
use crate::error::{Context, Error, Result};
use crate::generate::{Ended, Limits, Outcome, Pace, Sampling, Session, check_prompt, generate_all};
use crate::run::Loaded;

/// The most bytes of a prompt from stdin: 16 MiB.
const LARGEST_PROMPT: u64 = 16 << 20;

#[derive(Debug, Args)]
#[command(group = ArgGroup::new("asked").args(["prompt", "prompts"]).required(true))]
pub(super) struct Generate {
    #[command(flatten)]
    model: ModelArguments,
    /// Continue this text; `-` reads it from stdin, without the line break at its end
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// Answer each record of this file, `{"prompt": ".."}` or `{"messages": [..]}`, with a line of JSON
    ///
    /// A line has all keys of the record, and beside them `completion`, `tokens` (how many the completion has) and
    /// `finish_reason` (`stop` or `length`). Several prompts are answered at once; each answer is what it is alone.
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Put this system message before each prompt
    #[arg(long, value_name = "TEXT", value_parser = not_blank, conflicts_with = "raw")]
    system: Option<String>,
    /// The most tokens to generate
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_new_tokens: usize,
    #[command(flatten)]
    sampling: SamplingArguments,
    /// Give the prompt to the model as it is, without the chat template
    #[arg(long)]
    raw: bool,
}

#[derive(Debug, Args)]
pub(super) struct SamplingArguments {
    /// Divides the logits before sampling; 0 takes the most likely token
    #[arg(long, value_name = "T", default_value_t = 0.0, value_parser = not_negative)]
    temperature: f64,
    /// Sample among the K most likely tokens
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u64).range(1..))]
    top_k: Option<u64>,
    /// Sample among the fewest tokens that have this probability together
    #[arg(long, value_name = "P", value_parser = probability)]
    top_p: Option<f64>,
    /// Divides the logits of tokens that occurred; 1 changes nothing
    #[arg(long, value_name = "R", default_value_t = 1.0, value_parser = positive)]
    repetition_penalty: f64,
    /// The seed of sampling
    #[arg(long, default_value_t = 42)]
    seed: u64,
}

pub(super) fn generate(arguments: &Generate, terminal: &mut Terminal) -> Result<()> {
    // What comes from stdin or a file is read before the model is, which takes longer.
    let asked = match (&arguments.prompts, &arguments.prompt) {
        (Some(path), _) => Some((path, read_prompts(path)?)),
        (None, _) => None,
    };
    let prompt = match arguments.prompt.as_deref() {
        Some("-") => Some(prompt_from_stdin()?),
        prompt => prompt.map(str::to_string),
    };
    let loaded = open(&arguments.model, terminal)?;
    if !arguments.raw && !loaded.text.has_template() {
        return Err(Error::request("the model has no chat template")
            .with_hint("give the prompt as it is with `--raw`"));
    }
    if let Some(system) = &arguments.system {
        loaded.text.check_system(system).map_err(without_system)?;
        warn_of_control_tokens(system, &loaded.text, terminal);
    }
    warn_of_layout(&loaded, arguments.raw, terminal);
    match (asked, prompt) {
        (Some((path, asked)), _) => answer_all(arguments, &loaded, path, asked, terminal),
        (None, prompt) => answer_one(arguments, &loaded, prompt.unwrap_or_default(), terminal),
    }
}

/// The whole of stdin.
fn prompt_from_stdin() -> Result<String> {
    let mut bytes = Vec::new();
    let read = io::stdin().lock().take(LARGEST_PROMPT + 1).read_to_end(&mut bytes);
    read.map_err(|error| {
        Error::request(format!("standard input cannot be read: {error}"))
            .with_hint("`--prompt -` reads the prompt from there: send it a text")
    })?;
    if bytes.len() as u64 > LARGEST_PROMPT {
        return Err(Error::request("standard input has more than 16 MiB, expected a prompt"));
    }
    let mut prompt = String::from_utf8(bytes)
        .map_err(|_| Error::request("standard input is not valid UTF-8, expected a prompt in UTF-8"))?;
    if prompt.ends_with('\n') {
        prompt.pop();
        if prompt.ends_with('\r') {
            prompt.pop();
        }
    }
    Ok(prompt)
}

/// Says what to do where the chat template takes no system message.
pub(super) fn without_system(error: Error) -> Error {
    error.with_hint("write into the prompt what the model is to keep to")
}

fn warn_of_layout(loaded: &Loaded, raw: bool, terminal: &Terminal) {
    match (loaded.layout, raw) {
        (Some(Layout::Plain), false) => terminal.warn(&format!("{TRAINED_PLAIN}; `--raw` leaves it out")),
        (Some(Layout::Template), true) => terminal.warn(
            "the adapter was trained through the chat template, and `--raw` gives the prompt without it",
        ),
        _ => {}
    }
}

/// Warns that a prompt goes through the template although the adapter was trained without it.
pub(super) const TRAINED_PLAIN: &str =
    "the adapter was trained on plain text, and what is said goes through the chat template";

/// Writes the answer to one prompt as it comes.
fn answer_one(arguments: &Generate, loaded: &Loaded, prompt: String, terminal: &mut Terminal) -> Result<()> {
    let text = &loaded.text;
    warn_of_control_tokens(&prompt, text, terminal);
    let system = arguments.system.as_deref();
    let tokens = text.tokens_to_answer(&Conversation::Text(prompt), system, arguments.raw)?;
    let limits = arguments.limits(text);
    let sampling = arguments.sampling.sampling();
    let mut session = Session::new(&loaded.model);
    let (_, outcome) = stream(&mut session, text, &tokens, &limits, sampling, terminal)?;
    warn_if_full(outcome.ended, loaded.model.config().max_position_embeddings, terminal);
    say_pace("", &outcome.prompt, &outcome.decoding, terminal);
    Ok(())
}

/// Writes a line of JSON for each prompt of a file, in their order.
fn answer_all(
    arguments: &Generate,
    loaded: &Loaded,
    path: &Path,
    asked: Vec<Asked>,
    terminal: &mut Terminal,
) -> Result<()> {
    let Loaded { model, text, .. } = loaded;
    let tokens = |asked: &Asked| -> Result<Vec<u32>> {
        let tokens = text.tokens_to_answer(&asked.prompt, arguments.system.as_deref(), arguments.raw)?;
        check_prompt(model, &tokens)?;
        Ok(tokens)
    };
    let prompts = asked.iter().map(|asked| tokens(asked).at_line(path, asked.line));
    let prompts = prompts.collect::<Result<Vec<_>>>()?;
    let mut records: Vec<_> = asked.into_iter().map(|asked| asked.record).collect();
    // On a terminal the answers themselves are what moves.
    let counter = (!io::stdout().is_terminal()).then(|| terminal.counter("answering"));
    let (limits, sampling) = (arguments.limits(text), arguments.sampling.sampling());
    let (reading, decoding) = generate_all(model, &prompts, &limits, sampling, |number, answer| {
        let mut record = std::mem::take(&mut records[number]);
        record.insert("completion".into(), decoded(text, &answer.tokens)?.into());
        record.insert("tokens".into(), answer.tokens.len().into());
        let reason = if answer.ended == Ended::Stop { "stop" } else { "length" };
        record.insert("finish_reason".into(), reason.into());
        if let Some(counter) = &counter {
            counter.at(number as u64 + 1, prompts.len() as u64);
        }
        terminal.write(format_args!("{}\n", Value::Object(record)))
    })?;
    drop(counter);
    let before =
        if prompts.len() == 1 { "1 prompt: ".into() } else { format!("{} prompts: ", prompts.len()) };
    say_pace(&before, &reading, &decoding, terminal);
    Ok(())
}

impl Generate {
    fn limits(&self, text: &Text) -> Limits {
        Limits { max_new_tokens: self.max_new_tokens, stop: text.eos_ids().to_vec() }
    }
}

impl SamplingArguments {
    pub(super) fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_k: self.top_k.map(|k| k as usize),
            top_p: self.top_p.unwrap_or(1.0),
            repetition_penalty: self.repetition_penalty,
            seed: self.seed,
        }
    }
}

/// Writes an answer to stdout while it is generated, and gives it whole.
pub(super) fn stream(
    session: &mut Session<'_>,
    text: &Text,
    prompt: &[u32],
    limits: &Limits,
    sampling: Sampling,
    terminal: &mut Terminal,
) -> Result<(String, Outcome)> {
    let mut decoder = text.decode_stream(true);
    let mut answer = String::new();
    let outcome = session.generate(prompt, limits, sampling, |token| {
        let piece = decoder.push(token)?;
        terminal.write(format_args!("{piece}"))?;
        answer.push_str(&piece);
        Ok(true)
    })?;
    let rest = decoder.finish()?;
    terminal.write(format_args!("{rest}\n"))?;
    answer.push_str(&rest);
    Ok((answer, outcome))
}

/// The text of an answer, as [`stream`] writes it.
fn decoded(text: &Text, tokens: &[u32]) -> Result<String> {
    let mut decoder = text.decode_stream(true);
    let mut answer = String::new();
    for token in tokens {
        answer.push_str(&decoder.push(*token)?);
    }
    answer.push_str(&decoder.finish()?);
    Ok(answer)
}

pub(super) fn warn_if_full(ended: Ended, most: usize, terminal: &Terminal) {
    if ended == Ended::Context {
        terminal.warn(&format!("the answer ends here because the model sees no more than {most} tokens"));
    }
}

pub(super) fn warn_of_control_tokens(said: &str, text: &Text, terminal: &Terminal) {
    if text.takes_control_tokens_for_text() {
        return;
    }
    if let (count @ 1.., Some(first)) = text.control_tokens(said) {
        let these = if count == 1 { "a control token stands" } else { "control tokens stand" };
        terminal.warn(&format!(
            "{these} in the prompt (`{first}`): the model reads it as its own, and not as text"
        ));
    }
}

/// Says how fast prompts were read and answers came, with what goes before that.
fn say_pace(before: &str, prompt: &Pace, decoding: &Pace, terminal: &Terminal) {
    if prompt.tokens == 0 {
        return;
    }
    let mut summary =
        format!("{before}{} tokens of prompt, {:.0} tokens/s", prompt.tokens, prompt.per_second());
    if decoding.tokens > 0 {
        summary += &format!("; {} decoded, {:.1} tokens/s", decoding.tokens, decoding.per_second());
    }
    terminal.say(format_args!("{summary}"));
}

/// A text with something in it.
pub(super) fn not_blank(text: &str) -> Result<String, String> {
    if text.trim().is_empty() { Err("expected a text that is not blank".into()) } else { Ok(text.into()) }
}

fn not_negative(text: &str) -> Result<f64, String> {
    number(text, "a number of at least 0", |x| x >= 0.0)
}

fn positive(text: &str) -> Result<f64, String> {
    number(text, "a number above 0", |x| x > 0.0)
}

fn probability(text: &str) -> Result<f64, String> {
    number(text, "a number above 0 and at most 1", |x| x > 0.0 && x <= 1.0)
}

fn number(text: &str, expected: &str, fits: fn(f64) -> bool) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() && fits(number) => Ok(number),
        _ => Err(format!("expected {expected}")),
    }
}
