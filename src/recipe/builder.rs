//! Plans made in code, without a TOML text.

use std::path::PathBuf;

use super::tables::{AdapterRecipe, DataRecipe, ModelRecipe, TrainRecipe};
use super::{Plan, Recipe, Task};
use crate::adapter::Targets;
use crate::data::{Format, Source};
use crate::error::{Error, Result};

/// A fine-tuning plan in the making: what is not said has the default of its key.
#[derive(Debug, Clone)]
pub struct PlanBuilder {
    recipe: Recipe,
}

impl Plan {
    /// Begins the plan of a run that trains an adapter for a model: a folder, a `.gguf` file or a Hub id.
    ///
    /// ```
    /// use peft::recipe::Plan;
    ///
    /// let plan = Plan::finetune("examples/tiny-llama")
    ///     .rank(8)
    ///     .data("datasets/quickstart.jsonl")
    ///     .steps(50)
    ///     .output("runs/first")
    ///     .build()?;
    /// assert_eq!((plan.train.batch_size, plan.data.max_length), (4, 512));
    /// # Ok::<(), peft::Error>(())
    /// ```
    pub fn finetune(model: impl Into<String>) -> PlanBuilder {
        PlanBuilder {
            recipe: Recipe {
                task: Task::Finetune,
                seed: None,
                output: None,
                model: ModelRecipe { source: model.into(), id: None, dtype: None },
                adapter: Some(AdapterRecipe::default()),
                data: DataRecipe {
                    train: Vec::new(),
                    eval: None,
                    eval_share: None,
                    max_length: None,
                    pack: None,
                    train_on: None,
                    template: None,
                    special_tokens: None,
                },
                train: None,
                routing: None,
                losses: None,
                distill: None,
            },
        }
    }
}

impl PlanBuilder {
    /// Adds a file to train on.
    #[must_use]
    pub fn data(mut self, path: impl Into<PathBuf>) -> Self {
        self.recipe.data.train.push(Source { path: path.into(), weight: 1.0, format: Format::default() });
        self
    }

    /// Sets the rank of the adapter.
    #[must_use]
    pub fn rank(self, rank: usize) -> Self {
        self.adapter(|adapter| adapter.rank = Some(rank))
    }

    /// Sets the layers that get an adapter.
    #[must_use]
    pub fn targets(self, targets: Targets) -> Self {
        self.adapter(|adapter| adapter.targets = Some(targets))
    }

    /// Sets the number of updates.
    #[must_use]
    pub fn steps(self, steps: u64) -> Self {
        self.train(|train| train.steps = Some(steps))
    }

    /// Sets the highest learning rate.
    #[must_use]
    pub fn learning_rate(self, rate: f64) -> Self {
        self.train(|train| train.learning_rate = Some(rate))
    }

    /// Sets the seed of everything random.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.recipe.seed = Some(seed);
        self
    }

    /// Sets the run directory, which is `runs/run` otherwise.
    #[must_use]
    pub fn output(mut self, path: impl Into<PathBuf>) -> Self {
        self.recipe.output = Some(path.into());
        self
    }

    /// Changes any key of `[adapter]`.
    #[must_use]
    pub fn adapter(mut self, change: impl FnOnce(&mut AdapterRecipe)) -> Self {
        change(self.recipe.adapter.get_or_insert_default());
        self
    }

    /// Changes any key of `[train]`.
    #[must_use]
    pub fn train(mut self, change: impl FnOnce(&mut TrainRecipe)) -> Self {
        change(self.recipe.train.get_or_insert_default());
        self
    }

    /// Changes any key of any table.
    #[must_use]
    pub fn recipe(mut self, change: impl FnOnce(&mut Recipe)) -> Self {
        change(&mut self.recipe);
        self
    }

    /// Fills in the defaults.
    ///
    /// # Errors
    ///
    /// Fails if keys contradict each other. Values out of their bounds are refused as in a recipe's text.
    pub fn build(self) -> Result<Plan> {
        // Through its text, so that every value is held to its bound.
        let text = super::document::written(&self.recipe)?;
        let document = super::Document::parse("the plan", &text)?;
        let recipe = Recipe::read(&document).map_err(without_lines)?;
        Ok(Plan::of(&recipe, "run"))
    }
}

/// The errors without the places in a text that nobody wrote.
fn without_lines(error: Error) -> Error {
    match error {
        Error::AtLine { source, .. } | Error::At { source, .. } => *source,
        Error::Several(errors) => Error::several(errors.into_iter().map(without_lines).collect()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::Document;

    #[test]
    fn a_plan_made_in_code_is_that_of_the_same_text() {
        let text = "task = \"finetune\"\nmodel.source = \"m\"\nadapter.rank = 8\nadapter.alpha = 32\nseed = 3\n\
                    data.train = [{ path = \"a.jsonl\" }]\ntrain.steps = 5\ntrain.keep = 1\noutput = \"runs/x\"";
        let read = Recipe::read(&Document::parse("t.toml", text).unwrap()).unwrap();
        let made = Plan::finetune("m").rank(8).adapter(|adapter| adapter.alpha = Some(32.0));
        let made = made.data("a.jsonl").seed(3).steps(5).train(|train| train.keep = Some(1)).output("runs/x");
        assert_eq!(made.build().unwrap(), Plan::of(&read, "t"));
    }

    #[test]
    fn values_are_held_to_their_bounds() {
        let error = Plan::finetune("m").rank(1 << 20).steps(0).data("a.jsonl").build().unwrap_err();
        assert_eq!(
            error.to_string(),
            "`adapter.rank`: expected a whole number of at most 65536, found `1048576`\n\
             `train.steps`: expected a whole number of at least 1, found `0`"
        );
        let nothing = Plan::finetune("m").build().unwrap_err();
        assert_eq!(nothing.to_string(), "`data.train` is empty: expected at least one file");
    }
}
