//! The commands that run a model: generate, chat, eval.

use std::io::{BufRead, IsTerminal};

use super::terminal::{Terminal, message};
use super::{Chat, Dtype, Eval, Generate, Measure, ModelArguments};
use crate::data::{self, Message, Role, Source, Text, eval_batches};
use crate::error::{Error, Result};
use crate::eval::evaluate;
use crate::generate::{Limits, Sampling, Session};
use crate::recipe::{DtypeChoice, Loaded};

/// Tokens of a batch in evaluation.
const EVAL_TOKENS: usize = 2048;
/// The most tokens of an answer in a chat.
const ANSWER_TOKENS: usize = 1024;

pub(super) fn generate(arguments: &Generate, terminal: &mut Terminal) -> Result<()> {
    let loaded = open(&arguments.model, DtypeChoice::Auto, terminal)?;
    let text = &loaded.text;
    let prompt = if arguments.raw {
        text.encode_document(&arguments.prompt)?
    } else if text.has_template() {
        text.prompt_tokens(&[Message::new(Role::User, &arguments.prompt)])?
    } else {
        return Err(Error::request("the model has no chat template")
            .with_hint("give the prompt as it is with `--raw`"));
    };
    let limits = Limits { max_new_tokens: arguments.max_new_tokens, stop: text.eos_ids().to_vec() };
    let sampling = Sampling {
        temperature: arguments.temperature,
        top_k: arguments.top_k.map(|k| k as usize),
        top_p: arguments.top_p.unwrap_or(1.0),
        repetition_penalty: arguments.repetition_penalty,
        seed: arguments.seed,
    };
    stream(&mut Session::new(&loaded.model), text, &prompt, &limits, sampling, terminal)?;
    Ok(())
}

/// Writes an answer to stdout while it is generated, and gives it whole.
fn stream(
    session: &mut Session<'_>,
    text: &Text,
    prompt: &[u32],
    limits: &Limits,
    sampling: Sampling,
    terminal: &mut Terminal,
) -> Result<String> {
    let mut decoder = text.decode_stream(true);
    let mut answer = String::new();
    session.generate(prompt, limits, sampling, |token| {
        let piece = decoder.push(token)?;
        terminal.write(format_args!("{piece}"))?;
        answer.push_str(&piece);
        Ok(true)
    })?;
    let rest = decoder.finish()?;
    terminal.write(format_args!("{rest}\n"))?;
    answer.push_str(&rest);
    Ok(answer)
}

pub(super) fn chat(arguments: &Chat, terminal: &mut Terminal) -> Result<()> {
    let loaded = open(&arguments.model, DtypeChoice::Auto, terminal)?;
    let text = &loaded.text;
    if !text.has_template() {
        return Err(Error::request("the model has no chat template")
            .with_hint("`peft generate --raw` continues a text without one"));
    }
    let (stdin, is_terminal) = (std::io::stdin(), std::io::stdin().is_terminal());
    if is_terminal {
        message(format_args!("say something; an empty line or Ctrl-D ends the chat"));
    }
    let mut session = Session::new(&loaded.model);
    let limits = Limits { max_new_tokens: ANSWER_TOKENS, stop: text.eos_ids().to_vec() };
    let mut messages = Vec::new();
    for line in stdin.lock().lines() {
        let line = line?;
        if line.trim().is_empty() {
            break;
        }
        messages.push(Message::new(Role::User, line));
        let prompt = text.prompt_tokens(&messages)?;
        let content = stream(&mut session, text, &prompt, &limits, Sampling::default(), terminal)?;
        messages.push(Message::new(Role::Assistant, content));
    }
    Ok(())
}

pub(super) fn eval(arguments: &Eval, terminal: &mut Terminal) -> Result<()> {
    match arguments.measure {
        Measure::Perplexity => perplexity(arguments, terminal),
        Measure::Choices => Err(Error::request("`peft eval choices` is not built in this version")),
        Measure::Routing => Err(Error::request("`peft eval routing` is not built in this version")),
    }
}

fn perplexity(arguments: &Eval, terminal: &mut Terminal) -> Result<()> {
    let dtype = match arguments.dtype {
        Dtype::Auto => DtypeChoice::Auto,
        Dtype::F32 => DtypeChoice::F32,
        Dtype::Bf16 => DtypeChoice::Bf16,
    };
    let loaded = open(&arguments.model, dtype, terminal)?;
    let most = loaded.model.config().max_position_embeddings;
    let max_length = arguments.max_length.map_or(most, |length| (length as usize).min(most));
    let source = Source { path: arguments.data.clone(), weight: 1.0, format: data::Format::Auto };
    let (rows, counts) = data::load_for_perplexity(&source, &loaded.text, max_length)?;
    if counts.truncated > 0 {
        terminal.warn(&format!("{} records are cut to {max_length} tokens", counts.truncated));
    }
    let dropped = counts.dropped_by_truncation + counts.dropped_without_labels;
    if dropped > 0 {
        terminal.warn(&format!("{dropped} records have no token to predict and are left out"));
    }
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

fn open(arguments: &ModelArguments, dtype: DtypeChoice, terminal: &Terminal) -> Result<Loaded> {
    let loaded = Loaded::open(&arguments.model, arguments.adapter.as_deref(), dtype)?;
    for warning in &loaded.warnings {
        terminal.warn(warning);
    }
    Ok(loaded)
}
