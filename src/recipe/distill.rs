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
    /// Finds a teacher of whom nothing is learned, or a key that asks for something of a teacher who is not there.
    pub(super) fn contradiction(&self) -> Option<(&'static str, Error)> {
        let values = DistillValues::of_keys(self);
        if self.teacher.is_some() {
            return (values.kl == 0.0 && values.hidden == 0.0).then(|| {
                let message = "`distill.teacher` has nothing to say: `distill.kl` and `distill.hidden` are 0";
                let hint = "leave the teacher out, or set `distill.kl = 1.0`";
                ("distill.kl", Error::request(message).with_hint(hint))
            });
        }
        let nothing = DistillValues::of_keys(&Self::default());
        let asked = [
            ("distill.kl", values.kl != nothing.kl),
            ("distill.temperature", values.temperature != nothing.temperature),
            ("distill.hidden", values.hidden != nothing.hidden),
        ];
        let (key, _) = asked.into_iter().find(|(_, is_asked)| *is_asked)?;
        let error = Error::request(format!("`{key}` is for a teacher, and there is none"));
        Some((key, error.with_hint("name the teacher in `distill.teacher`, or leave the key out")))
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
