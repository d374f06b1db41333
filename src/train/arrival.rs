//! The live check that training reaches everything it is meant to: a trainable without a gradient is an error, not a
//! silent constant.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::ops::{Gradients, Trainables};

/// Steps in which a gradient may be zero: the first batches can be too short for attention to have a choice.
const PATIENCE: usize = 10;

/// Which trainables have had a gradient that is not zero.
#[derive(Debug)]
pub(super) struct Arrival {
    waiting: Vec<Arc<str>>,
    /// Those of routed experts, which may wait for a token for as long as it takes.
    routed: BTreeSet<Arc<str>>,
    /// Steps looked at in which something had a gradient of zero without a reason.
    zeros: usize,
}

impl Arrival {
    pub(super) fn of(trainables: &Trainables, routed: &BTreeSet<Arc<str>>) -> Self {
        Self { waiting: trainables.keys().cloned().collect(), routed: routed.clone(), zeros: 0 }
    }

    /// Looks at the gradients of a step before its update. One that is missing is an error at once. One that is zero must
    /// have a reason (while `B` is zero, the gradient of its `A` is zero too), or become another within a few steps.
    pub(super) fn check(&mut self, trainables: &Trainables, gradients: &Gradients) -> Result<()> {
        let mut still = Vec::new();
        for name in self.waiting.drain(..) {
            if !arrived(gradients, &name)? {
                still.push(name);
            }
        }
        self.waiting = still;
        let (mut missing, mut lost) = (false, Vec::new());
        for name in &self.waiting {
            let is_missing = gradients.of_name(name).is_none();
            missing |= is_missing;
            let may_wait = !is_missing && self.routed.contains(name);
            if !may_wait && !is_silenced(trainables, name)? {
                lost.push(format!("`{name}`"));
            }
        }
        self.zeros += usize::from(!lost.is_empty());
        if lost.is_empty() || (!missing && self.zeros < PATIENCE) {
            return Ok(());
        }
        let (count, first) = (lost.len(), lost[..lost.len().min(4)].join(", "));
        Err(Error::invalid(format!("{count} of the trained tensors get no gradient: {first}"))
            .with_hint("leave these targets out if the data cannot reach them (documents of two tokens?)"))
    }

    pub(super) fn is_done(&self) -> bool {
        self.waiting.is_empty()
    }
}

/// Whether `name` is an `A` whose `B` is still zero.
fn is_silenced(trainables: &Trainables, name: &str) -> Result<bool> {
    let partner = name.strip_suffix("lora_A.weight").map(|path| format!("{path}lora_B.weight"));
    match partner.and_then(|partner| trainables.get(partner.as_str())) {
        Some(b) => Ok(b.abs()?.max_all()?.to_scalar::<f32>()? == 0.0),
        None => Ok(false),
    }
}

fn arrived(gradients: &Gradients, name: &str) -> Result<bool> {
    let Some(gradient) = gradients.of_name(name) else { return Ok(false) };
    Ok(gradient.abs()?.max_all()?.to_scalar::<f32>()? > 0.0)
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor, Var};

    use super::*;
    use crate::ops::Parameter;

    fn pair(b: f32) -> Trainables {
        let variable = |value| Var::from_tensor(&Tensor::new(&[value], &Device::Cpu).unwrap()).unwrap();
        Trainables::from([
            (Arc::from("q.lora_A.weight"), variable(1.0)),
            (Arc::from("q.lora_B.weight"), variable(b)),
        ])
    }

    fn gradients(trainables: &Trainables, values: &[(&str, f32)]) -> Gradients {
        let mut gradients = Gradients::of(trainables);
        for (name, value) in values {
            let tensor = Tensor::new(&[*value], &Device::Cpu).unwrap();
            gradients.add(&Parameter::new(*name, &tensor), &tensor).unwrap();
        }
        gradients
    }

    #[test]
    fn an_a_may_wait_for_its_b_and_no_longer() {
        let fresh = pair(0.0);
        let mut arrival = Arrival::of(&fresh, &BTreeSet::new());
        let first = [("q.lora_A.weight", 0.0), ("q.lora_B.weight", 1.0)];
        arrival.check(&fresh, &gradients(&fresh, &first)).unwrap();
        assert!(!arrival.is_done());
        let moved = pair(0.5);
        arrival.check(&moved, &gradients(&moved, &[("q.lora_A.weight", 1.0)])).unwrap();
        assert!(arrival.is_done());
    }

    #[test]
    fn a_gradient_that_stays_zero_or_is_missing_is_an_error() {
        let moved = pair(0.5);
        let mut arrival = Arrival::of(&moved, &BTreeSet::new());
        let zero = [("q.lora_A.weight", 0.0), ("q.lora_B.weight", 1.0)];
        for _ in 1..PATIENCE {
            arrival.check(&moved, &gradients(&moved, &zero)).unwrap();
        }
        let error = arrival.check(&moved, &gradients(&moved, &zero)).unwrap_err().to_string();
        assert!(error.contains("1 of the trained tensors get no gradient: `q.lora_A.weight`"), "{error}");
        let missing = gradients(&moved, &[("q.lora_B.weight", 1.0)]);
        Arrival::of(&moved, &BTreeSet::new()).check(&moved, &missing).unwrap_err();
    }
}
