//! The named choices and the small values of a recipe.

use std::fmt::{self, Display};
use std::str::FromStr;

use serde::de::{self, Deserialize, Deserializer, SeqAccess, Visitor};
use serde::{Serialize, Serializer};

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
    /// What the files have, and what the machine multiplies fast.
    #[default]
    Auto,
    /// 32-bit floats.
    F32,
    /// bfloat16.
    Bf16,
}

/// How a recipe trains: so far there is one method.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Low-rank adapters beside linear layers.
    #[default]
    Lora,
}

/// How a fresh adapter begins; `B` is zero in all of them but `nju`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum InitName {
    /// As Hugging Face PEFT begins.
    #[default]
    Peft,
    /// Kaiming, uniform.
    KaimingUniform,
    /// Kaiming, normal.
    KaimingNormal,
    /// Xavier, uniform.
    XavierUniform,
    /// Xavier, normal.
    XavierNormal,
    /// Normal with a deviation of one over the rank.
    Gaussian,
    /// Both factors drawn.
    Nju,
}

/// The course of the learning rate after its warm-up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// It stays.
    Constant,
    /// A straight line down to 0.
    Linear,
    /// Half a cosine down to 0.
    #[default]
    Cosine,
}

/// Which activations are computed again in the backward pass instead of being kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Recompute {
    /// What the memory allows.
    #[default]
    Auto,
    /// None: the fastest, and the most memory.
    None,
    /// Each block keeps its input and nothing else.
    Block,
}

/// Which linear layers get an adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Targets {
    /// Layers whose path is, or ends in a dot and, one of these names.
    Names(Vec<String>),
    /// Layers whose whole path matches this regular expression.
    Pattern(String),
    /// Every linear layer but the head.
    AllLinear,
}

impl Default for Targets {
    /// The feed-forward layers, where most of a model's weights are.
    fn default() -> Self {
        Self::Names(["gate_proj", "up_proj", "down_proj"].map(str::to_string).to_vec())
    }
}

impl Serialize for Targets {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Names(names) => names.serialize(serializer),
            Self::Pattern(pattern) => pattern.serialize(serializer),
            Self::AllLinear => "all-linear".serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for Targets {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TargetsVisitor;

        impl<'de> Visitor<'de> for TargetsVisitor {
            type Value = Targets;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of names, a regular expression in a string, or \"all-linear\"")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Targets, E> {
                match text {
                    "" => Err(E::invalid_value(de::Unexpected::Str(text), &self)),
                    "all-linear" => Ok(Targets::AllLinear),
                    _ => Ok(Targets::Pattern(text.to_string())),
                }
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut names: A) -> Result<Targets, A::Error> {
                let mut targets = Vec::new();
                while let Some(name) = names.next_element::<String>()? {
                    targets.push(name);
                }
                if targets.is_empty() {
                    return Err(de::Error::custom(
                        "the list of targets is empty, so nothing would be trained",
                    ));
                }
                Ok(Targets::Names(targets))
            }
        }

        deserializer.deserialize_any(TargetsVisitor)
    }
}

/// An amount of memory: `4GiB` in a recipe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

/// The units of [`Bytes`], the largest first.
const UNITS: [(&str, u64); 5] =
    [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

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
        if bytes == 0 { Err(unfit()) } else { Ok(Self(bytes)) }
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
