//! The keys that are about mixtures of experts. They are known, so that a recipe may say that they are off; this
//! version trains dense models and refuses everything else.

use std::path::PathBuf;

use serde::Deserialize;

use super::{Recipe, bounds};

/// `train.router`
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum RouterTraining {
    #[default]
    Frozen,
    Lora,
    Full,
}

/// `[routing]`
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a table")]
pub(super) struct Routing {
    #[serde(deserialize_with = "bounds::count::<_, 1>")]
    active: Option<usize>,
    noise: Noise,
    #[serde(deserialize_with = "bounds::positive")]
    capacity_factor: Option<f64>,
    overflow: Overflow,
    kind: RoutingKind,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Noise {
    #[default]
    None,
    Gaussian,
    Learned,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Overflow {
    #[default]
    Drop,
    Reroute,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum RoutingKind {
    #[default]
    Model,
    Random,
    Hash,
}

/// `[losses]`
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a table")]
pub(super) struct Losses {
    #[serde(deserialize_with = "bounds::not_negative")]
    switch: Option<f64>,
    #[serde(deserialize_with = "bounds::not_negative")]
    importance: Option<f64>,
    #[serde(deserialize_with = "bounds::not_negative")]
    load: Option<f64>,
    #[serde(deserialize_with = "bounds::not_negative")]
    load_std: Option<f64>,
    #[serde(deserialize_with = "bounds::not_negative")]
    z: Option<f64>,
    #[serde(deserialize_with = "bounds::not_negative")]
    bias_update: Option<f64>,
    pooled: bool,
}

/// `[distill]`; without a teacher its other keys do nothing.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a table")]
pub(super) struct Distill {
    teacher: Option<PathBuf>,
    #[serde(deserialize_with = "bounds::not_negative")]
    kl: Option<f64>,
    #[serde(deserialize_with = "bounds::positive")]
    temperature: Option<f64>,
    #[serde(deserialize_with = "bounds::not_negative")]
    hidden: Option<f64>,
}

impl Recipe {
    /// The first key that asks for something only a mixture of experts has.
    pub(super) fn mixture_key(&self) -> Option<&'static str> {
        let Self { routing, losses, distill, train, .. } = self;
        let on = |coefficient: Option<f64>| coefficient.is_some_and(|c| c > 0.0);
        [
            ("train.router", train.router != RouterTraining::Frozen),
            ("routing.active", routing.active.is_some()),
            ("routing.noise", routing.noise != Noise::None),
            ("routing.capacity_factor", routing.capacity_factor.is_some()),
            ("routing.overflow", routing.overflow != Overflow::Drop),
            ("routing.kind", routing.kind != RoutingKind::Model),
            ("losses.switch", on(losses.switch)),
            ("losses.importance", on(losses.importance)),
            ("losses.load", on(losses.load)),
            ("losses.load_std", on(losses.load_std)),
            ("losses.z", on(losses.z)),
            ("losses.bias_update", on(losses.bias_update)),
            ("losses.pooled", losses.pooled),
            ("distill.teacher", distill.teacher.is_some()),
        ]
        .into_iter()
        .find_map(|(key, set)| set.then_some(key))
    }
}
