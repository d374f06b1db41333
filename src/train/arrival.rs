//! The live check that training reaches everything it is meant to: a trainable without a gradient is an error, not a
//! silent constant.

use crate::error::{Error, Result};
use crate::ops::{Gradients, Trainables};

/// Which trainables have had a gradient that is not zero.
#[derive(Debug)]
pub(super) struct Arrival {
    waiting: Vec<std::sync::Arc<str>>,
}

impl Arrival {
    pub(super) fn of(trainables: &Trainables) -> Self {
        Self { waiting: trainables.keys().cloned().collect() }
    }

    /// Looks at the gradients of a step before its update. What has a gradient waits no longer; what has none must have
    /// a reason: while `B` is zero, the gradient of its `A` is zero too.
    pub(super) fn check(&mut self, trainables: &Trainables, gradients: &Gradients) -> Result<()> {
        let mut still = Vec::new();
        for name in self.waiting.drain(..) {
            if !arrived(gradients, &name)? {
                still.push(name);
            }
        }
        self.waiting = still;
        let mut lost = Vec::new();
        for name in &self.waiting {
            if !is_silenced(trainables, name)? {
                lost.push(format!("`{name}`"));
            }
        }
        if lost.is_empty() {
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
