//! Gradients of the trainables, kept in the order of their names so that sums and files do not depend on chance.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor, Var};
use rayon::prelude::*;

use super::kernel::{Values, vectorized};
use super::{Parameter, Weight, add};
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
        *sum = Some(match sum.take() {
            None => gradient.to_dtype(DType::F32)?,
            Some(earlier) => add(&earlier, gradient).in_tensor(parameter.name())?,
        });
        Ok(())
    }

    /// Adds nothing: the gradient of `parameter`, where wanted, is zero unless something else is added.
    pub fn add_nothing(&mut self, parameter: &Parameter) -> Result<()> {
        if let Some(sum @ None) = self.sums.get_mut(parameter.name()) {
            let tensor = parameter.tensor();
            *sum = Some(Tensor::zeros(tensor.dims(), DType::F32, tensor.device())?);
        }
        Ok(())
    }

    /// Takes out what has arrived of those of `parameters` that are wanted, for one of several tasks to add to. They stay
    /// wanted on both sides, and [`Gradients::put_back`] brings the sums together: a part that is not put back is lost.
    #[must_use]
    pub fn take<'p>(&mut self, parameters: impl IntoIterator<Item = &'p Parameter>) -> Self {
        let mut sums = BTreeMap::new();
        for parameter in parameters {
            let Some((name, _)) = self.sums.get_key_value(parameter.name()) else { continue };
            if sums.contains_key(name) {
                continue;
            }
            let name = Arc::clone(name);
            let sum = self.sums.get_mut(&name).and_then(Option::take);
            sums.insert(name, sum);
        }
        Self { sums }
    }

    /// Puts back what was taken out, and what was added to it.
    pub fn put_back(&mut self, part: Self) -> Result<()> {
        for (name, gradient) in part.sums {
            let (Some(gradient), Some(sum)) = (gradient, self.sums.get_mut(&name)) else { continue };
            *sum = Some(match sum.take() {
                None => gradient,
                Some(other) => add(&other, &gradient).in_tensor(&name)?,
            });
        }
        Ok(())
    }

    /// The Euclidean norm of all gradients together, summed in f64 in the order of their names.
    pub fn norm(&self) -> Result<f64> {
        let gradients: Vec<&Tensor> = self.sums.values().flatten().collect();
        let squares: Vec<f64> = gradients.into_par_iter().map(sum_of_squares).collect::<Result<_>>()?;
        Ok(squares.iter().sum::<f64>().sqrt())
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

fn sum_of_squares(gradient: &Tensor) -> Result<f64> {
    let gradient = gradient.to_device(&Device::Cpu)?.contiguous()?;
    Ok(squares(&Values::<f32>::of(&gradient)?))
}

vectorized! {
    fn squares(values: &[f32]) -> f64 {
        let mut lanes = [0.0f64; 16];
        let (whole, rest) = values.split_at(values.len() / 16 * 16);
        for part in whole.chunks_exact(16) {
            for (lane, value) in lanes.iter_mut().zip(part) {
                *lane += f64::from(*value) * f64::from(*value);
            }
        }
        let mut sum = 0.0;
        for lane in lanes {
            sum += lane;
        }
        for value in rest {
            sum += f64::from(*value) * f64::from(*value);
        }
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_comes_back_with_what_was_added() -> Result<()> {
        let cpu = Device::Cpu;
        let var = |values: [f32; 2]| Ok::<_, crate::error::Error>(Var::new(&values, &cpu)?);
        let trainables: Trainables = [("a".into(), var([0.0; 2])?), ("b".into(), var([0.0; 2])?)].into();
        let parameter = |name: &str| Parameter::new(name, trainables[name].as_tensor());
        let (a, b) = (parameter("a"), parameter("b"));
        let mut all = Gradients::of(&trainables);
        all.add(&a, &Tensor::new(&[1f32, 2.0], &cpu)?)?;
        // One that is named twice, and then by another task too.
        let mut one = all.take([&a, &b, &a]);
        let mut other = all.take([&a]);
        assert!(all.wants(&a) && other.wants(&a));
        one.add(&a, &Tensor::new(&[10f32, 10.0], &cpu)?)?;
        other.add(&a, &Tensor::new(&[100f32, 100.0], &cpu)?)?;
        all.put_back(one)?;
        all.put_back(other)?;
        let sum: Vec<f32> = all.of_name("a").map(Tensor::to_vec1).transpose()?.unwrap_or_default();
        assert_eq!(sum, [111.0, 112.0]);
        assert!(all.of_name("b").is_none());
        Ok(())
    }
}
