//! `[distill]`: the teacher that the trained model is to be like.

use serde::{Deserialize, Serialize};

use super::bounds;
use crate::error::Error;
use crate::ops::distillation::Terms;

/// `[distill]`; without a teacher its other keys do nothing.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a table")]
pub(super) struct Distill {
    #[serde(skip_serializing_if = "Option::is_none")]
    teacher: Option<String>,
    #[serde(
        deserialize_with = "bounds::not_negative::<_, 1_000_000>",
        skip_serializing_if = "Option::is_none"
    )]
    kl: Option<f64>,
    #[serde(deserialize_with = "bounds::positive::<_, 1000>", skip_serializing_if = "Option::is_none")]
    temperature: Option<f64>,
    #[serde(
        deserialize_with = "bounds::not_negative::<_, 1_000_000>",
        skip_serializing_if = "Option::is_none"
    )]
    hidden: Option<f64>,
}

impl Distill {
    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// A teacher of whom nothing is learned.
    pub(super) fn contradiction(&self) -> Option<Error> {
        let plan = DistillPlan::of(self)?;
        (plan.terms.kl == 0.0 && plan.terms.hidden == 0.0).then(|| {
            Error::request("`distill.teacher` has nothing to say: `distill.kl` and `distill.hidden` are 0")
                .with_hint("leave the teacher out, or set `distill.kl = 1.0`")
        })
    }
}

/// A teacher, and how much it counts.
#[derive(Debug, Clone, PartialEq)]
pub struct DistillPlan {
    /// A folder, a `.gguf` file or a Hub id.
    pub teacher: String,
    /// The coefficient of each term, and the temperature.
    pub terms: Terms,
}

impl DistillPlan {
    pub(super) fn of(recipe: &Distill) -> Option<Self> {
        let Distill { teacher, kl, temperature, hidden } = recipe;
        let terms = Terms {
            kl: kl.unwrap_or(1.0),
            temperature: temperature.unwrap_or(1.0),
            hidden: hidden.unwrap_or(0.0),
        };
        Some(Self { teacher: teacher.clone()?, terms })
    }

    /// The table that says it.
    pub(super) fn table(&self) -> Distill {
        let Terms { kl, temperature, hidden } = self.terms;
        let teacher = Some(self.teacher.clone());
        Distill { teacher, kl: Some(kl), temperature: Some(temperature), hidden: Some(hidden) }
    }
}
