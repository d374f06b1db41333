//! Between what is trained and what is stored. Routers of upcycled models are stored times a power of two, so small that a step
//! of training would throw them anywhere; they are trained without it. Both ways are exact, and files are always as they are
//! stored.

use std::collections::BTreeMap;

use candle_core::Tensor;

use crate::adapter::tensor_names;
use crate::error::{Context, Result};
use crate::model::DecoderConfig;
use crate::ops::Trainables;

/// The tensors that are stored otherwise than they are trained, and what they are stored times.
#[derive(Debug, Clone, Default)]
pub(super) struct Units(BTreeMap<String, f64>);

impl Units {
    /// Weights of routers, and of low-rank terms beside them B and its bias: `W + B A` times a number is `W` and `B` times
    /// it.
    pub(super) fn of(config: &DecoderConfig) -> Self {
        let scaled = config.sparse_layers().filter(|(_, moe)| moe.router_exponent != 0);
        let names = scaled.flat_map(|(layer, moe)| {
            let path = moe.router_path(layer);
            let low_rank = tensor_names(&path);
            [format!("{path}.weight"), low_rank.b, low_rank.bias].map(|name| (name, moe.router_unit()))
        });
        Self(names.collect())
    }

    /// As it is stored.
    pub(super) fn stored(&self, name: &str, trained: &Tensor) -> Result<Tensor> {
        match self.0.get(name) {
            None => Ok(trained.clone()),
            Some(unit) => Ok((trained * *unit).in_tensor(name)?),
        }
    }

    /// As it is trained.
    pub(super) fn trained(&self, name: &str, stored: &Tensor) -> Result<Tensor> {
        match self.0.get(name) {
            None => Ok(stored.clone()),
            Some(unit) => Ok((stored / *unit).in_tensor(name)?),
        }
    }

    /// All of them, as they are stored.
    pub(super) fn all_stored(&self, trainables: &Trainables) -> Result<BTreeMap<String, Tensor>> {
        let stored = |(name, variable): (&std::sync::Arc<str>, &candle_core::Var)| {
            Ok((name.to_string(), self.stored(name, variable.as_tensor())?))
        };
        trainables.iter().map(stored).collect()
    }

    /// All of them, as they are trained.
    pub(super) fn all_trained(&self, stored: &BTreeMap<String, Tensor>) -> Result<BTreeMap<String, Tensor>> {
        stored.iter().map(|(name, tensor)| Ok((name.clone(), self.trained(name, tensor)?))).collect()
    }
}
