//! The commands that run a model: generate, chat, eval.

use std::io::{BufRead, ErrorKind, IsTerminal};

use super::terminal::{Terminal, message};
use super::{Chat, Dtype, Eval, Generate, ModelArguments, SamplingArguments};
use crate::data::{self, Layout, Message, Role, Row, Source, Text, eval_batches};
use crate::error::{Error, Result};
use crate::eval::evaluate;
use crate::generate::{Ended, Limits, Outcome, Sampling, Session};
use crate::recipe::DtypeChoice;
use crate::run::Loaded;

/// Tokens of a batch in evaluation.
pub(super) const EVAL_TOKENS: usize = 2048;

pub(super) fn generate(arguments: &Generate, terminal: &mut Terminal) -> Result<()> {
    let loaded = open(&arguments.model, terminal)?;
    let text = &loaded.text;
    let prompt = if arguments.raw {
        text.encode_document(&arguments.prompt)?
    } else if text.has_template() {
        text.prompt_tokens(&[Message::new(Role::User, &arguments.prompt)])?
    } else {
        return Err(Error::request("the model has no chat template")
            .with_hint("give the prompt as it is with `--raw`"));
    };
    warn_of_control_tokens(&arguments.prompt, text, terminal);
    match (loaded.layout, arguments.raw) {
        (Some(Layout::Plain), false) => terminal.warn(&format!("{TRAINED_PLAIN}; `--raw` leaves it out")),
        (Some(Layout::Template), true) => terminal.warn(
            "the adapter was trained through the chat template, and `--raw` gives the prompt without it",
        ),
        _ => {}
    }
    let limits = Limits { max_new_tokens: arguments.max_new_tokens, stop: text.eos_ids().to_vec() };
    let sampling = arguments.sampling.sampling();
    let mut session = Session::new(&loaded.model);
    let (_, outcome) = stream(&mut session, text, &prompt, &limits, sampling, terminal)?;
    warn_if_full(outcome.ended, &loaded, terminal);
    say_pace(&outcome, terminal);
    Ok(())
}

fn warn_of_control_tokens(said: &str, text: &Text, terminal: &Terminal) {
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

fn say_pace(outcome: &Outcome, terminal: &Terminal) {
    let Outcome { prompt, decoding, .. } = outcome;
    if prompt.tokens == 0 {
        return;
    }
    let mut summary = format!("{} tokens of prompt, {:.0} tokens/s", prompt.tokens, prompt.per_second());
    if decoding.tokens > 0 {
        summary += &format!("; {} decoded, {:.1} tokens/s", decoding.tokens, decoding.per_second());
    }
    terminal.say(format_args!("{summary}"));
}

/// What is said of a prompt that goes through the template all the same.
const TRAINED_PLAIN: &str =
    "the adapter was trained on plain text, and what is said goes through the chat template";

impl SamplingArguments {
    fn sampling(&self) -> Sampling {
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
fn stream(
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

fn warn_if_full(ended: Ended, loaded: &Loaded, terminal: &Terminal) {
    if ended == Ended::Context {
        let most = loaded.model.config().max_position_embeddings;
        terminal.warn(&format!("the answer ends here because the model sees no more than {most} tokens"));
    }
}

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
    let (stdin, is_terminal) = (std::io::stdin(), std::io::stdin().is_terminal());
    if is_terminal {
        message(format_args!("say something; Ctrl-D ends the chat"));
    }
    let mut session = Session::new(&loaded.model);
    let limits = Limits { max_new_tokens: arguments.max_new_tokens, stop: text.eos_ids().to_vec() };
    let most = loaded.model.config().max_position_embeddings;
    let mut messages = Vec::new();
    for line in stdin.lock().split(b'\n') {
        let Ok(line) = String::from_utf8(line.map_err(unreadable_input)?) else {
            terminal.warn("this line is not valid UTF-8 and is left out; say it again in UTF-8");
            continue;
        };
        let line = line.strip_suffix('\r').unwrap_or(&line);
        if line.trim().is_empty() {
            continue;
        }
        warn_of_control_tokens(line, text, terminal);
        messages.push(Message::new(Role::User, line));
        let Some(prompt) = fitting(&mut messages, text, most, &limits, terminal)? else { continue };
        let sampling = arguments.sampling.sampling();
        let (content, outcome) = stream(&mut session, text, &prompt, &limits, sampling, terminal)?;
        warn_if_full(outcome.ended, &loaded, terminal);
        messages.push(Message::new(Role::Assistant, content));
    }
    Ok(())
}

/// Names standard input in an error of reading it, which has no path of its own.
fn unreadable_input(error: std::io::Error) -> Error {
    let what = match error.kind() {
        ErrorKind::IsADirectory => "standard input is a folder, expected lines of text".to_string(),
        _ => format!("standard input cannot be read: {error}"),
    };
    Error::request(what).with_hint(
        "type what you say, or give a file with a line for each question: `peft chat --model MODEL < questions.txt`",
    )
}

/// The prompt of a conversation that ends with a question, with room left for an answer. The oldest exchanges are
/// forgotten when the model does not see the whole; a question that is too long on its own is taken back.
fn fitting(
    messages: &mut Vec<Message>,
    text: &Text,
    most: usize,
    limits: &Limits,
    terminal: &Terminal,
) -> Result<Option<Vec<u32>>> {
    let room = most.saturating_sub(limits.max_new_tokens.clamp(1, (most / 4).max(1)));
    let question = text.prompt_tokens(&messages[messages.len() - 1..])?.len();
    if question > room {
        messages.pop();
        terminal.warn(&format!(
            "this takes {question} tokens, and the model sees {most} with the answer: it is left out; say less"
        ));
        return Ok(None);
    }
    let mut forgotten = 0;
    let mut prompt = text.prompt_tokens(messages)?;
    while prompt.len() > room {
        messages.drain(..2);
        forgotten += 1;
        prompt = text.prompt_tokens(messages)?;
    }
    if forgotten > 0 {
        let oldest = match forgotten {
            1 => "the oldest exchange is".to_string(),
            more => format!("the {more} oldest exchanges are"),
        };
        terminal.warn(&format!("the model sees {most} tokens, and the chat is longer: {oldest} forgotten"));
    }
    Ok(Some(prompt))
}

pub(super) fn perplexity(arguments: &Eval, terminal: &mut Terminal) -> Result<()> {
    let loaded = open(&arguments.model, terminal)?;
    let rows = rows(arguments, &loaded, terminal)?;
    let evaluation = evaluate(&loaded.model, &eval_batches(&rows, EVAL_TOKENS))?;
    let (nll, perplexity, tokens) = (evaluation.nll(), evaluation.perplexity(), evaluation.tokens);
    if !nll.is_finite() {
        return Err(Error::invalid(format!("the model's loss on this data is {nll}")));
    }
    if arguments.json {
        let document = serde_json::json!({ "nll": nll, "perplexity": perplexity, "tokens": tokens });
        return terminal.write_json(&document);
    }
    terminal.write(format_args!("nll {nll:.6}\nperplexity {perplexity:.4}\ntokens {tokens}\n"))
}

/// The records of the data as the model sees them.
pub(super) fn rows(arguments: &Eval, loaded: &Loaded, terminal: &Terminal) -> Result<Vec<Row>> {
    let most = loaded.model.config().max_position_embeddings;
    let max_length = arguments.max_length.map_or(most, |length| (length as usize).min(most));
    let source = Source { path: arguments.data.clone(), weight: 1.0, format: data::Format::Auto };
    let (rows, counts) = data::load_for_perplexity(&source, &loaded.text, max_length)?;
    if counts.truncated > 0 {
        terminal.warn(&format!("{} records are cut to {max_length} tokens", counts.truncated));
    }
    counts.warnings(&loaded.text).iter().for_each(|warning| terminal.warn(&warning.to_string()));
    let dropped = counts.dropped_by_truncation + counts.dropped_without_labels;
    if dropped > 0 {
        terminal.warn(&format!("{dropped} records have no token to predict and are left out"));
    }
    Ok(rows)
}

pub(super) fn open(arguments: &ModelArguments, terminal: &Terminal) -> Result<Loaded> {
    let dtype = match arguments.dtype {
        Dtype::Auto => DtypeChoice::Auto,
        Dtype::F32 => DtypeChoice::F32,
        Dtype::Bf16 => DtypeChoice::Bf16,
    };
    let loaded = Loaded::open(&arguments.model, arguments.adapter.as_deref(), dtype)?;
    for note in &loaded.notes {
        terminal.say(format_args!("{note}"));
    }
    for warning in &loaded.warnings {
        terminal.warn(warning);
    }
    Ok(loaded)
}
