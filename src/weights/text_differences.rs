//! What differs between the tokenizer and chat template of an adapter and those of its model, as parts of a sentence.

use serde_json::Value;
use tokenizers::Tokenizer;

use super::text::TextFiles;
use crate::error::Result;

/// The most tokens or files that a message names.
pub(super) const NAMED: usize = 3;

/// Says what differs between the text files of an adapter and those of its model, whose embedding has `rows`. Of a tokenizer
/// that is rebuilt from a GGUF file only the tokens are compared.
pub(super) fn compared(
    own: &TextFiles,
    model: &TextFiles,
    rows: usize,
    is_gguf: bool,
) -> Result<Vec<String>> {
    let mut differences = Vec::new();
    match &model.chat_template {
        None if own.chat_template.is_some() => differences.push("it has a chat template".to_string()),
        _ if (&own.chat_template, &own.tool_template) != (&model.chat_template, &model.tool_template) => {
            differences.push("its chat template is another".to_string());
        }
        _ => {}
    }
    let tokens =
        [("bos_token", &own.bos_token, &model.bos_token), ("eos_token", &own.eos_token, &model.eos_token)];
    for (name, own, model) in tokens {
        if own != model {
            let own = own.as_ref().map_or("not set".to_string(), |token| format!("`{token}`"));
            differences.push(format!("its `{name}` is {own}"));
        }
    }
    if own.add_bos_token != model.add_bos_token {
        let verb = if own.add_bos_token { "begins" } else { "does not begin" };
        differences.push(format!("its tokenizer {verb} texts with the `bos_token`"));
    }
    let lacking = lacking(all_tokens(&own.tokenizer), &model.tokenizer);
    differences.extend(named(&lacking, "the model's tokenizer lacks"));
    // Trainers add a token to pad with, which no text has, so that the adapter works all the same.
    let without_row: Vec<_> = lacking.into_iter().filter(|(_, id)| *id as usize >= rows).collect();
    differences
        .extend(named(&without_row, "the model's embedding has no row for, which texts must not have"));
    let theirs = if is_gguf {
        let added = model.tokenizer.get_added_tokens_decoder().into_iter();
        added.map(|(id, token)| (token.content, id)).collect()
    } else {
        all_tokens(&model.tokenizer)
    };
    differences.extend(named(&self::lacking(theirs, &own.tokenizer), "only the model's tokenizer has"));
    if !is_gguf {
        differences.extend(other_parts(own, model)?);
    }
    Ok(differences)
}

/// Says what else two tokenizers do otherwise, beside tokens that one of them lacks and the first token of texts.
fn other_parts(own: &TextFiles, model: &TextFiles) -> Result<Vec<String>> {
    let shared = |one: &TextFiles, other: &TextFiles| -> Result<Value> {
        let mut parts = parts_of(&one.tokenizer)?;
        let is_shared = |token: &Value| {
            let content = token["content"].as_str().unwrap_or_default();
            other.tokenizer.token_to_id(content).map(u64::from) == token["id"].as_u64()
        };
        if let Some(added) = parts["added_tokens"].as_array_mut() {
            added.retain(is_shared);
        }
        // Its tokens are compared by their numbers; of a list of tokens the scores count too.
        if let Some(merging) = parts["model"].as_object_mut()
            && merging.get("vocab").is_some_and(Value::is_object)
        {
            merging.shift_remove("vocab");
        }
        if own.add_bos_token != model.add_bos_token {
            parts["post_processor"] = Value::Null;
        }
        Ok(parts)
    };
    let (mut own, mut model) = (shared(own, model)?, shared(model, own)?);
    let decoders = (own["decoder"].take(), model["decoder"].take());
    let mut differences = Vec::new();
    if own != model {
        differences.push("its tokenizer splits texts otherwise".to_string());
    }
    if decoders.0 != decoders.1 {
        differences.push("its tokenizer joins tokens otherwise".to_string());
    }
    Ok(differences)
}

/// The parts of a tokenizer, as its file has them. Truncation and padding were left out when it was read.
pub(super) fn parts_of(tokenizer: &Tokenizer) -> Result<Value> {
    Ok(serde_json::to_value(tokenizer)?)
}

fn all_tokens(tokenizer: &Tokenizer) -> Vec<(String, u32)> {
    tokenizer.get_vocab(true).into_iter().collect()
}

/// The tokens that a tokenizer does not have under their numbers, by number.
fn lacking(mut tokens: Vec<(String, u32)>, tokenizer: &Tokenizer) -> Vec<(String, u32)> {
    tokens.retain(|(token, id)| tokenizer.token_to_id(token) != Some(*id));
    tokens.sort_by(|(token, id), (other, theirs)| (id, token).cmp(&(theirs, other)));
    tokens
}

/// Counts tokens and names the first of them; `None` where there are none.
fn named(tokens: &[(String, u32)], whose: &str) -> Option<String> {
    let first: Vec<String> = tokens.iter().take(NAMED).map(|(token, _)| format!("`{token}`")).collect();
    let more = if tokens.len() > NAMED { ", .." } else { "" };
    let noun = if tokens.len() == 1 { "token" } else { "tokens" };
    (!tokens.is_empty()).then(|| format!("{} {noun} that {whose} ({}{more})", tokens.len(), first.join(", ")))
}
