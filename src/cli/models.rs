//! Opening a model for the commands that run one, and measuring it.

use std::path::Path;

use super::terminal::Terminal;
use super::{Dtype, Eval, ModelArguments};
use crate::data::{self, Row, Source, eval_batches};
use crate::error::{Error, Result};
use crate::eval::evaluate;
use crate::recipe::DtypeChoice;
use crate::run::Loaded;

/// Tokens of a batch in evaluation.
pub(super) const EVAL_TOKENS: usize = 2048;

pub(super) fn perplexity(arguments: &Eval, terminal: &mut Terminal) -> Result<()> {
    let loaded = open(&arguments.model, terminal)?;
    let rows = rows(&arguments.data, arguments.max_length, &loaded, terminal)?;
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
pub(super) fn rows(
    data: &Path,
    max_length: Option<u64>,
    loaded: &Loaded,
    terminal: &Terminal,
) -> Result<Vec<Row>> {
    let most = loaded.model.config().max_position_embeddings;
    let max_length = max_length.map_or(most, |length| (length as usize).min(most));
    let source = Source { path: data.to_path_buf(), weight: 1.0, format: data::Format::Auto };
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
