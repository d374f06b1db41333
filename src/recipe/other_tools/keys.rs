//! The keys of PEFT, TRL, axolotl, LLaMA-Factory, unsloth, mlx-lm and torchtune, and what means them here.
//!
//! Own keys are in the table too, for people who write one into another table than it belongs to.

mod data;
mod model;
mod train;

use Meaning::{Key, NotBuilt, Said};

/// Names of other tools that mean the same, and what that is here.
#[derive(Debug, Clone, Copy)]
pub struct ForeignKey {
    /// The names; one that ends with `*` stands for all that begin like it.
    pub names: &'static [&'static str],
    /// What means the same here.
    pub meaning: Meaning,
}

/// What means a key of another tool.
#[derive(Debug, Clone, Copy)]
pub enum Meaning {
    /// A recipe has a key for it, which takes the value as the reading says.
    Key(&'static str, Reading),
    /// A recipe says it in another way, or need not say it. Values in the list ask for what happens anyway.
    Said(&'static [&'static str], &'static str),
    /// It is not built, and this happens instead. Values in the list ask for what happens anyway.
    NotBuilt(&'static [&'static str], &'static str),
}

/// How a value of another tool becomes the value of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reading {
    /// It is the same value.
    Same,
    /// It is a share, or a number of documents.
    Share,
    /// It is a number of steps, of which -1 stands for none.
    MaxSteps,
    /// It is a number of steps, or a share of all steps below 1.
    Interval,
    /// It is a number of steps, of which the key takes the share in all steps.
    WarmupSteps,
    /// It is the word `no`, `steps` or `epoch`.
    Strategy,
    /// It is the name of a schedule.
    Schedule,
    /// It is the name of a type of numbers.
    Dtype,
    /// It is `true` for bf16.
    Bf16,
    /// It is a flag or a name for how factors begin.
    Init,
    /// It is a list of layers, also with commas in one string, or `all`.
    Targets,
    /// It is `true` for all linear layers.
    AllLinear,
    /// It is `true` where prompts are learned too.
    PromptLearned,
    /// It is `true` where only answers are learned.
    AnswersLearned,
    /// It is `true` where activations are computed again.
    Recompute,
    /// It names data files.
    Files,
}

impl Reading {
    /// What a hint adds about values.
    fn note(self) -> &'static str {
        match self {
            Self::Same | Self::MaxSteps => "",
            Self::Share => ", a share of the documents such as 0.05",
            Self::Interval => ", a number of steps",
            Self::WarmupSteps => ", a share of the steps such as 0.05 or their number",
            Self::Strategy => ", a number of steps; 0 is only at the end",
            Self::Schedule => ": \"constant\", \"linear\" or \"cosine\"",
            Self::Dtype | Self::Bf16 => ": \"auto\", \"f32\" or \"bf16\"",
            Self::Init => ", a name such as \"peft\" or \"gaussian\"",
            Self::Targets => ", a list of names, a regular expression, or \"all-linear\"",
            Self::AllLinear => ": \"all-linear\" takes every linear layer",
            Self::PromptLearned | Self::AnswersLearned => ": \"completion\" or \"all\"",
            Self::Recompute => ": \"auto\", \"block\" or \"none\"",
            Self::Files => ", a path in a string, or a list of them",
        }
    }
}

/// All keys of other tools that are known.
pub fn foreign_keys() -> impl Iterator<Item = &'static ForeignKey> {
    [model::KEYS, data::KEYS, train::KEYS].into_iter().flatten()
}

/// Finds what means a key of another tool.
pub(super) fn meaning_of(name: &str) -> Option<Meaning> {
    let name = name.replace('-', "_");
    let by = |fits: &dyn Fn(&str) -> bool| {
        foreign_keys().find(|key| key.names.iter().any(|known| fits(known))).map(|key| key.meaning)
    };
    by(&|known| known == name)
        .or_else(|| by(&|known| known.strip_suffix('*').is_some_and(|first| name.starts_with(first))))
}

/// What is done instead of a key that recipes do not have.
pub(super) fn sentence(name: &str) -> Option<&'static str> {
    match meaning_of(name)? {
        Said(_, sentence) | NotBuilt(_, sentence) => Some(sentence),
        Key(..) => None,
    }
}

/// The key of ours that a key of another tool means.
pub(in crate::recipe) fn key_of(name: &str) -> Option<&'static str> {
    match meaning_of(name)? {
        Key(ours, _) => Some(ours),
        Said(..) | NotBuilt(..) => None,
    }
}

/// Says what to write instead of a key of another tool, or where a key of ours belongs.
pub fn hint(name: &str) -> Option<String> {
    let said = match meaning_of(name)? {
        Key(ours, _) if ours == name => format!("`{name}` stands above the first table of a recipe"),
        Key(ours, reading) => match ours.rsplit_once('.') {
            Some((table, last)) if last == name => format!("`{name}` belongs to `[{table}]`: `{ours}`"),
            _ => format!("`{name}` of other tools is `{ours}` here{}", reading.note()),
        },
        Said(_, sentence) => format!("leave `{name}` out: {sentence}"),
        NotBuilt(_, sentence) => format!("leave `{name}` out, which is not built: {sentence}"),
    };
    Some(said)
}

const fn key(names: &'static [&'static str], ours: &'static str, reading: Reading) -> ForeignKey {
    ForeignKey { names, meaning: Key(ours, reading) }
}

const fn same(names: &'static [&'static str], ours: &'static str) -> ForeignKey {
    key(names, ours, Reading::Same)
}

const fn said(names: &'static [&'static str], sentence: &'static str) -> ForeignKey {
    ForeignKey { names, meaning: Said(&[], sentence) }
}

const fn not_built(names: &'static [&'static str], sentence: &'static str) -> ForeignKey {
    ForeignKey { names, meaning: NotBuilt(&[], sentence) }
}

/// As [`not_built`], but for values that ask for what happens anyway.
const fn only(
    names: &'static [&'static str],
    values: &'static [&'static str],
    sentence: &'static str,
) -> ForeignKey {
    ForeignKey { names, meaning: NotBuilt(values, sentence) }
}
