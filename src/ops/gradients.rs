//! Gradients of the trainables, kept in the order of their names so that sums and files do not depend on chance.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Tensor, Var};

use super::{Parameter, Weight};
use crate::error::{Context, Result};

/// The values that training changes, by name. A module holds the same storage, so that an update is seen at once.
pub type Trainables = BTreeMap<Arc<str>, Var>;

/// Gradients in f32 of the wanted parameters, summed over every call of [`Gradients::add`].
#[derive(Debug)]
pub struct Gradients {
    sums: BTreeMap<Arc<str>, Option<Tensor>>,
}

impl Gradients {
    /// Wants the gradients of `trainables`, of which none has arrived yet.
    #[must_use]
    pub fn of(trainables: &Trainables) -> Self {
        Self { sums: trainables.keys().map(|name| (Arc::clone(name), None)).collect() }
    }

    /// Whether a backward has to compute the gradient of `parameter`.
    #[must_use]
    pub fn wants(&self, parameter: &Parameter) -> bool {
        self.sums.contains_key(parameter.name())
    }

    /// The values of `weight` when a backward has to compute their gradient.
    #[must_use]
    pub fn wanted<'w>(&self, weight: &'w Weight) -> Option<&'w Parameter> {
        weight.parameter().filter(|parameter| self.wants(parameter))
    }

    /// Adds `gradient` (any float type, the parameter's shape) to the sum of `parameter`; ignored when not wanted.
    pub fn add(&mut self, parameter: &Parameter, gradient: &Tensor) -> Result<()> {
        let Some(sum) = self.sums.get_mut(parameter.name()) else { return Ok(()) };
        let gradient = gradient.to_dtype(DType::F32)?;
        *sum = Some(match sum.take() {
            None => gradient,
            Some(earlier) => earlier.add(&gradient).in_tensor(parameter.name())?,
        });
        Ok(())
    }

    /// Name and gradient in the order of names; `None` where none has arrived.
    pub fn iter(&self) -> impl Iterator<Item = (&Arc<str>, Option<&Tensor>)> {
        self.sums.iter().map(|(name, gradient)| (name, gradient.as_ref()))
    }

    /// The gradient of one parameter, if it has arrived.
    #[must_use]
    pub fn of_name(&self, name: &str) -> Option<&Tensor> {
        self.sums.get(name).and_then(Option::as_ref)
    }
}
