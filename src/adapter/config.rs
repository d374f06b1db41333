//! The settings of a new adapter: its rank and scale, the layers it goes to, and its first values.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::patterns::Patterns;
use crate::error::{Error, Result};
use crate::model::config::DecoderConfig;

/// LoRA: beside a frozen weight `W [out, in]`, trained `A [rank, in]` and `B [out, rank]`, so that
/// `y = x W^T + scale * dropout(x) A^T B^T`.
///
/// ```
/// use peft::adapter::{LoraConfig, Targets};
///
/// let config = LoraConfig { targets: Targets::names(["q_proj", "v_proj"]), alpha: Some(32.0), ..LoraConfig::default() };
/// assert_eq!(config.scale(config.rank, config.alpha()), 2.0);
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraConfig {
    /// The number of rows of A and of columns of B. With 0 there is no adapter at all.
    pub rank: usize,
    /// The numerator of the scale; left out: the rank.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f64>,
    /// Probability that a value of the adapter's input is dropped in training.
    pub dropout: f64,
    /// The layers that get an adapter.
    pub targets: Targets,
    /// The layers that get none, whatever the targets say.
    #[serde(skip_serializing_if = "Exclude::is_empty")]
    pub exclude: Exclude,
    /// Another rank for the layers whose path a pattern matches; 0: none there.
    #[serde(skip_serializing_if = "Patterns::is_empty")]
    pub rank_pattern: Patterns<usize>,
    /// Another alpha for the layers whose path a pattern matches.
    #[serde(skip_serializing_if = "Patterns::is_empty")]
    pub alpha_pattern: Patterns<f64>,
    /// Restricts the adapter to these layers of the model, counted from zero; `None` allows all. A pattern as target excludes
    /// this setting.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_to_transform: Option<Vec<usize>>,
    /// The names of the module lists, such as `layers`, in which `layers_to_transform` counts. An empty list allows any.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub layers_pattern: Vec<String>,
    /// Whether B has a bias.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub lora_bias: bool,
    /// The first values of A and B.
    pub init: Init,
    /// Whether the scale is `alpha / sqrt(rank)` in place of `alpha / rank`.
    pub rslora: bool,
    /// Where the first values come from.
    pub seed: u64,
    /// Where the dropout masks come from.
    pub dropout_seed: u64,
}

impl Default for LoraConfig {
    fn default() -> Self {
        Self {
            rank: 16,
            alpha: None,
            dropout: 0.0,
            targets: Targets::AllLinear,
            exclude: Exclude::default(),
            rank_pattern: Patterns::default(),
            alpha_pattern: Patterns::default(),
            layers_to_transform: None,
            layers_pattern: Vec::new(),
            lora_bias: false,
            init: Init::Peft,
            rslora: false,
            seed: 0,
            dropout_seed: 1,
        }
    }
}

impl LoraConfig {
    /// Alpha where no pattern says otherwise.
    #[must_use]
    pub fn alpha(&self) -> f64 {
        self.alpha.unwrap_or(self.rank as f64)
    }

    /// Computes the factor that `B A` is multiplied with. All code takes its scales from here.
    #[must_use]
    pub fn scale(&self, rank: usize, alpha: f64) -> f64 {
        if self.rslora { alpha / (rank as f64).sqrt() } else { alpha / rank as f64 }
    }

    /// Refuses values that no model makes right.
    pub(super) fn validate(&self) -> Result<()> {
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(Error::request(format!(
                "`dropout` is {}, expected at least 0 and less than 1",
                self.dropout
            )));
        }
        let alphas =
            self.alpha.iter().map(|alpha| ("alpha".to_string(), *alpha)).chain(
                self.alpha_pattern.iter().map(|(key, alpha)| (format!("alpha_pattern.{key}"), *alpha)),
            );
        for (key, alpha) in alphas {
            if !alpha.is_finite() || alpha <= 0.0 {
                return Err(Error::request(format!("`{key}` is {alpha}, expected a number above 0")));
            }
        }
        if let (Targets::Pattern(pattern), Some(_)) = (&self.targets, &self.layers_to_transform) {
            return Err(Error::request(format!(
                "`layers_to_transform` does not go with the pattern `{pattern}` as target"
            ))
            .with_hint("say the layers in the pattern, as in `.*\\.layers\\.(0|1)\\..*\\.q_proj`"));
        }
        if !self.layers_pattern.is_empty() && self.layers_to_transform.is_none() {
            return Err(Error::request("`layers_pattern` without `layers_to_transform`"));
        }
        Ok(())
    }
}

/// Which layers get an adapter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "ListOrText", into = "ListOrText")]
pub enum Targets {
    /// A layer whose path is one of these, or ends with a dot and one of these.
    Names(Vec<String>),
    /// A layer whose whole path this regular expression matches.
    Pattern(String),
    /// Every linear layer but the output embedding.
    AllLinear,
}

impl Targets {
    /// A list of names.
    pub fn names<N: Into<String>>(names: impl IntoIterator<Item = N>) -> Self {
        Self::Names(names.into_iter().map(Into::into).collect())
    }

    /// Adds the routers of a model to these targets. Routers have to be added by name, because `all-linear` leaves them out.
    #[must_use]
    pub fn with_routers(self, model: &DecoderConfig) -> Self {
        let Some((_, moe)) = model.sparse_layers().next() else { return self };
        let router = moe.names.router.to_string();
        match self {
            Self::Names(names) => Self::Names(names.into_iter().chain([router]).collect()),
            Self::Pattern(pattern) => {
                Self::Pattern(format!("(?:{pattern})|.*\\.{}", router.replace('.', "\\.")))
            }
            Self::AllLinear => {
                let linears = model.linears();
                let all = linears.iter().filter(|linear| !linear.projection.is_special());
                let names: BTreeSet<String> = all.map(|linear| linear.name().to_string()).collect();
                Self::Names(names.into_iter().chain([router]).collect())
            }
        }
    }
}

/// Selects the layers that get no adapter, as [`Targets`] selects those that do. It is empty by default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "ListOrText", into = "ListOrText")]
pub enum Exclude {
    /// A layer whose path is one of these, or ends with a dot and one of these.
    Names(Vec<String>),
    /// A layer whose whole path this regular expression matches.
    Pattern(String),
}

impl Exclude {
    /// Whether nothing is excluded.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        match self {
            Self::Names(names) => names.is_empty(),
            Self::Pattern(pattern) => pattern.is_empty(),
        }
    }
}

impl Default for Exclude {
    fn default() -> Self {
        Self::Names(Vec::new())
    }
}

/// The first values of A and B. All but `nju` leave B zero: training begins at the base model.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Init {
    /// PEFT's default: A uniform within `1 / sqrt(in)` (Kaiming with a = sqrt 5), B zero.
    #[default]
    Peft,
    /// A uniform within `sqrt(6 / in)`, B zero.
    KaimingUniform,
    /// A normal with deviation `sqrt(2 / in)`, B zero.
    KaimingNormal,
    /// A uniform within `sqrt(6 / (in + rank))`, B zero.
    XavierUniform,
    /// A normal with deviation `sqrt(2 / (in + rank))`, B zero.
    XavierNormal,
    /// A normal with deviation `1 / rank`, B zero.
    Gaussian,
    /// A and B uniform, so that training does not begin at the base model: Xavier where the layer's gate is a sigmoid
    /// or the identity, Kaiming elsewhere.
    Nju,
}

#[derive(Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a list of names, or a regular expression in a string")]
enum ListOrText {
    List(Vec<String>),
    Text(String),
}

impl From<ListOrText> for Targets {
    fn from(value: ListOrText) -> Self {
        match value {
            ListOrText::List(names) => Self::Names(names),
            ListOrText::Text(text) if text.eq_ignore_ascii_case("all-linear") => Self::AllLinear,
            ListOrText::Text(pattern) => Self::Pattern(pattern),
        }
    }
}

impl From<Targets> for ListOrText {
    fn from(targets: Targets) -> Self {
        match targets {
            Targets::Names(names) => Self::List(names),
            Targets::Pattern(pattern) => Self::Text(pattern),
            Targets::AllLinear => Self::Text("all-linear".to_string()),
        }
    }
}

impl From<ListOrText> for Exclude {
    fn from(value: ListOrText) -> Self {
        match value {
            ListOrText::List(names) => Self::Names(names),
            ListOrText::Text(pattern) => Self::Pattern(pattern),
        }
    }
}

impl From<Exclude> for ListOrText {
    fn from(exclude: Exclude) -> Self {
        match exclude {
            Exclude::Names(names) => Self::List(names),
            Exclude::Pattern(pattern) => Self::Text(pattern),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recipe_table_says_everything() {
        let config: LoraConfig = toml::from_str(
            r#"
            rank = 8
            alpha = 12
            targets = "All-Linear"
            exclude = ["lm_head"]
            rank_pattern = { "down_proj" = 4, "a.*" = 0 }
            init = "kaiming-normal"
            rslora = true
            "#,
        )
        .unwrap();
        assert_eq!(config.targets, Targets::AllLinear);
        assert_eq!(config.rank_pattern, Patterns::from_iter([("down_proj", 4), ("a.*", 0)]));
        assert_eq!(config.init, Init::KaimingNormal);
        assert_eq!(config.scale(9, 12.0), 4.0);
        let again: LoraConfig = toml::from_str(&toml::to_string(&config).unwrap()).unwrap();
        assert_eq!(again, config);
    }

    #[test]
    fn alpha_left_out_is_the_rank() {
        let config = LoraConfig { rank: 6, ..LoraConfig::default() };
        assert_eq!(config.scale(config.rank, config.alpha()), 1.0);
    }

    #[test]
    fn impossible_values_are_refused() {
        let good = LoraConfig::default();
        for (bad, message) in [
            (LoraConfig { dropout: 1.0, ..good.clone() }, "`dropout` is 1"),
            (LoraConfig { dropout: f64::NAN, ..good.clone() }, "`dropout` is NaN"),
            (LoraConfig { alpha: Some(0.0), ..good.clone() }, "`alpha` is 0"),
            (
                LoraConfig { alpha_pattern: Patterns::from_iter([("k", -1.0)]), ..good.clone() },
                "`alpha_pattern.k` is -1",
            ),
            (
                LoraConfig {
                    targets: Targets::Pattern("x".into()),
                    layers_to_transform: Some(vec![0]),
                    ..good.clone()
                },
                "`layers_to_transform` does not go with",
            ),
            (
                LoraConfig { layers_pattern: vec!["layers".into()], ..good.clone() },
                "`layers_pattern` without",
            ),
        ] {
            let error = bad.validate().unwrap_err().to_string();
            assert!(error.starts_with(message), "{error}");
        }
        good.validate().unwrap();
    }
}
