//! The teacher of a run, opened and held against the model before any work.

use candle_core::{DType, Device};
use tokenizers::Tokenizer;

use crate::error::{Context, Error, Result};
use crate::model::{Decoder, Pretrained};
use crate::ops::distillation::Terms;
use crate::recipe::{DistillPlan, Plan};

/// A teacher that fits the model; no weight of it has been read.
#[derive(Debug)]
pub struct PreparedTeacher {
    /// Its files.
    pub base: Pretrained,
    /// How much it counts.
    pub terms: Terms,
    /// Bytes of its weights beside the model's, of which it shares those that are the same.
    pub weights: u64,
}

impl PreparedTeacher {
    /// Opens the teacher of `plan`, where it has one, and refuses one that is no teacher for `model`.
    pub(super) fn of(
        plan: &Plan,
        model: &Pretrained,
        tokenizer: &Tokenizer,
        dtype: DType,
    ) -> Result<Option<Self>> {
        let Some(DistillPlan { teacher, terms }) = &plan.distill else { return Ok(None) };
        let base = Pretrained::open(teacher).at("distill.teacher")?;
        base.check()?;
        refuse_other_size(plan, model, &base, *terms)?;
        refuse_other_tokens(&base, "teacher", tokenizer)?;
        let weights = base.bytes_beside(model, dtype)?;
        Ok(Some(Self { base, terms: *terms, weights }))
    }

    /// Reads its weights, but for those that `model`, read from `of`, has already.
    pub(super) fn open(&self, (model, of): (&Decoder, &Pretrained), dtype: DType) -> Result<Decoder> {
        Decoder::open_beside(&self.base, dtype, &Device::Cpu, (model, of))
    }
}

fn refuse_other_size(plan: &Plan, model: &Pretrained, teacher: &Pretrained, terms: Terms) -> Result<()> {
    let (name, own, theirs) = (teacher.name(), model.config(), teacher.config());
    if own.vocab_size != theirs.vocab_size {
        return Err(Error::request(format!(
            "the teacher `{name}` has a vocabulary of {}, and the model one of {}",
            theirs.vocab_size, own.vocab_size
        ))
        .with_hint("a teacher has to know the same tokens: take the model that this one was made from"));
    }
    if terms.hidden > 0.0 && own.hidden_size != theirs.hidden_size {
        return Err(Error::request(format!(
            "`distill.hidden` compares hidden states, of which the teacher `{name}` has {} values and the model {}",
            theirs.hidden_size, own.hidden_size
        ))
        .with_hint("leave `distill.hidden` out: `distill.kl` compares what both predict"));
    }
    let (most, asked) = (theirs.max_position_embeddings, plan.data.max_length);
    if asked > most {
        return Err(Error::request(format!(
            "`data.max_length` is {asked}, and the teacher `{name}` sees {most} tokens"
        ))
        .with_hint(format!("set `data.max_length` to {most} or less")));
    }
    Ok(())
}

/// The same tokens by the same numbers in another model, a `role` of this one. How text is cut into them is the model's affair:
/// the other one sees its tokens.
pub(super) fn refuse_other_tokens(other: &Pretrained, role: &str, tokenizer: &Tokenizer) -> Result<()> {
    let (name, theirs) = (other.name(), other.text()?.tokenizer);
    let (own, theirs) = (tokenizer.get_vocab(true), theirs.get_vocab(true));
    let mut other: Vec<(&u32, &String)> = own
        .iter()
        .filter(|(token, id)| theirs.get(*token) != Some(*id))
        .map(|(token, id)| (id, token))
        .collect();
    other.sort();
    let Some((id, token)) = other.first() else { return Ok(()) };
    let found = match theirs.get(*token) {
        Some(id) => format!("is number {id}"),
        None => "does not exist".to_string(),
    };
    Err(Error::request(format!(
        "the {role} `{name}` knows other tokens: `{token}`, number {id} of the model, {found} there ({} such tokens)",
        other.len()
    ))
    .with_hint(format!("a {role} has to know the same tokens: take one that came of the same model")))
}
