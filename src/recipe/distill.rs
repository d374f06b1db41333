//! `[distill]`: the teacher that the trained model is to be like.

use super::bounds::Bound;
use super::declare::keys;
use super::keys::Written;
use crate::error::Error;
use crate::ops::distillation::Terms;

keys! {
    table "distill" like "a table";

    /// `[distill]`; without a teacher its other keys do nothing.
    #[derive(Default)]
    written pub struct DistillRecipe;

    /// How much a teacher counts.
    planned struct DistillValues {}

    /// The teacher that the model learns from: a folder, a `.gguf` file or a Hub id.
    teacher: String => "no teacher", "\"models/dense\"";
    /// How much the divergence from the teacher's predictions counts in the loss.
    kl: f64 [Bound::NotNegative(1e6)] = 1.0;
    /// The temperature that both predictions are divided by before they are compared.
    temperature: f64 [Bound::Positive(1000.0)] = 1.0;
    /// How much the difference from the teacher's last hidden state counts in the loss.
    hidden: f64 [Bound::NotNegative(1e6)] = 0.0;
}

impl DistillRecipe {
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
    pub(super) fn of(recipe: &DistillRecipe) -> Option<Self> {
        let DistillValues { kl, temperature, hidden } = DistillValues::of_keys(recipe);
        Some(Self { teacher: recipe.teacher.clone()?, terms: Terms { kl, temperature, hidden } })
    }

    /// The table that says it.
    pub(super) fn table(&self) -> DistillRecipe {
        let Terms { kl, temperature, hidden } = self.terms;
        let values = DistillValues { kl, temperature, hidden };
        DistillRecipe { teacher: Some(self.teacher.clone()), ..values.written() }
    }
}
