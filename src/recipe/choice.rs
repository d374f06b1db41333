//! The named choices and the small values of a recipe.

use std::fmt::{self, Display};
use std::str::FromStr;

use candle_core::DType;
use serde::de::{self, Deserialize, Deserializer};
use serde::{Serialize, Serializer};

use crate::data::Source;

/// What a recipe is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Task {
    /// Train an adapter, or all weights.
    Finetune,
    /// Turn a dense model into a mixture of experts.
    Upcycle,
}

/// The number format that the frozen weights are kept in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DtypeChoice {
    /// bf16 where the files have that or quantized values, else f32.
    #[default]
    Auto,
    /// 32-bit floats.
    F32,
    /// bfloat16.
    Bf16,
}

impl DtypeChoice {
    /// The type that products are computed in, where `stored` is the one that fits the files of the model.
    #[must_use]
    pub fn or(self, stored: DType) -> DType {
        match self {
            Self::Auto => stored,
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
        }
    }
}

/// The kind of an adapter: so far there is one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Low-rank adapters beside linear layers.
    #[default]
    Lora,
}

/// Which activations are computed again in the backward pass instead of being kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RecomputeChoice {
    /// What the memory allows.
    #[default]
    Auto,
    /// None: the fastest, and the most memory.
    None,
    /// Each block keeps its input and nothing else.
    Block,
}

/// How long the learning rate rises.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Warmup {
    /// This share of the steps, from 0 to 1.
    Share(f64),
    /// So many steps, more than one.
    Steps(u64),
}

impl Warmup {
    /// The updates of it, in a run of so many.
    #[must_use]
    pub fn updates(self, steps: u64) -> u64 {
        match self {
            Self::Share(share) => (share * steps as f64).ceil() as u64,
            Self::Steps(updates) => updates,
        }
    }
}

impl Serialize for Warmup {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Share(share) => serializer.serialize_f64(*share),
            Self::Steps(updates) => serializer.serialize_u64(*updates),
        }
    }
}

/// Which weights a run leaves as its result.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Final {
    /// Those of the evaluation with the lowest loss; without an evaluation the last.
    #[default]
    Best,
    /// Those after the last step.
    Last,
}

/// What of the routers is trained.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RouterTraining {
    /// Nothing.
    #[default]
    Frozen,
    /// A low-rank term beside each, as the adapter has elsewhere.
    Lora,
    /// Their weights.
    Full,
}

/// `adapter.experts`: all, none, or those with these numbers.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(untagged, expecting = "expected `true`, `false` or a list of experts")]
pub enum ExpertChoice {
    /// All or none.
    All(bool),
    /// Those with these numbers, in every layer.
    Some(Vec<usize>),
}

/// What a model is evaluated on while it is trained.
#[derive(Debug, Clone, PartialEq)]
pub enum Evaluation {
    /// Files of their own.
    Files(Vec<Source>),
    /// This share of the training documents, which is then not trained on.
    Share(f64),
    /// [`HELD_OUT`](Self::HELD_OUT) of the training documents, where there are [`MANY`](Self::MANY).
    ShareOfMany,
    /// Nothing.
    Off,
}

impl Evaluation {
    /// The share that is held out where a recipe says nothing.
    pub const HELD_OUT: f64 = 0.05;
    /// The fewest documents of which anything is held out where a recipe says nothing: of fewer, each counts.
    pub const MANY: usize = 50;
}

/// How long a run trains.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Length {
    /// Optimizer steps.
    Steps(u64),
    /// Passes over the training data.
    Epochs(f64),
}

/// How much memory a run may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryBudget {
    /// What the machine has free when the run begins.
    Free,
    /// This much.
    Limit(Bytes),
}

/// An amount of memory: `4GiB` in a recipe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

/// The units of [`Bytes`], the largest first.
const UNITS: [(&str, u64); 5] =
    [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

/// Far more than a machine has.
const MOST_MEMORY: u64 = 1 << 50;

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let unfit = || format!("expected an amount of memory such as `4GiB` or `512MiB`, found `{text}`");
        let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let (_, unit) = UNITS.into_iter().find(|(name, _)| *name == unit.trim()).ok_or_else(unfit)?;
        let bytes = match number.parse::<u64>() {
            Ok(number) => number.checked_mul(unit).ok_or_else(unfit)?,
            Err(_) => (number.parse::<f64>().map_err(|_| unfit())? * unit as f64) as u64,
        };
        if (1..=MOST_MEMORY).contains(&bytes) { Ok(Self(bytes)) } else { Err(unfit()) }
    }
}

impl Display for Bytes {
    /// Exactly: the largest unit that divides it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = UNITS.into_iter().find(|(_, unit)| self.0.is_multiple_of(*unit) && self.0 > 0);
        let (name, unit) = unit.unwrap_or(("B", 1));
        write!(f, "{}{name}", self.0 / unit)
    }
}

impl Serialize for Bytes {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}
