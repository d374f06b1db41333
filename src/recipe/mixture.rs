//! The keys that are about mixtures of experts: `train.router`, `[routing]` and `[losses]`.

use serde::{Deserialize, Serialize};

use super::{Recipe, bounds};
use crate::error::{Error, Result};
use crate::model::RouterLosses;
use crate::model::config::{
    DecoderConfig, MoeConfig, Overflow, RouterNoise, RoutingKind, RoutingVariant, Scoring,
};

/// What of the routers is trained.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RouterTraining {
    /// Nothing.
    #[default]
    Frozen,
    /// A low-rank term beside each, as the adapter has elsewhere.
    Lora,
    /// Their weights.
    Full,
}

/// Everything a plan says of a mixture of experts; the default is what a dense model allows.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct MixturePlan {
    /// What of the routers is trained.
    pub router: RouterTraining,
    /// Experts of a token; `None`: as many as the model's configuration says.
    pub active: Option<usize>,
    /// What logits get in training.
    pub noise: RouterNoise,
    /// The most tokens of an expert by an equal share; `None`: no limit.
    pub capacity_factor: Option<f64>,
    /// Steps until the limit is that.
    pub capacity_warmup: u64,
    /// Where the others go.
    pub overflow: Overflow,
    /// By what experts are chosen.
    pub kind: RoutingKind,
    /// How much each loss on routers counts.
    pub losses: RouterLosses,
    /// The step of selection biases that follow the load, for logits that deviate by about one; 0: they stay.
    pub bias_update: f64,
}

impl MixturePlan {
    pub(super) fn of(recipe: &Recipe) -> Self {
        let Routing { active, noise, capacity_factor, capacity_warmup, overflow, kind } = recipe.routing;
        let Losses { switch, importance, load, load_std, z, bias_update, pooled } = recipe.losses;
        let [switch, importance, load, load_std, z] =
            [switch, importance, load, load_std, z].map(|coefficient| coefficient.unwrap_or(0.0));
        Self {
            router: recipe.train.router,
            active,
            noise,
            capacity_factor,
            capacity_warmup: capacity_warmup.unwrap_or(0),
            overflow,
            kind,
            losses: RouterLosses { switch, importance, load, load_std, z, pooled },
            bias_update: bias_update.unwrap_or(0.0),
        }
    }

    /// The tables that say it.
    pub(super) fn tables(&self) -> (Routing, Losses) {
        let Self {
            active, noise, capacity_factor, capacity_warmup, overflow, kind, losses, bias_update, ..
        } = *self;
        let RouterLosses { switch, importance, load, load_std, z, pooled } = losses;
        let on = |coefficient: f64| (coefficient > 0.0).then_some(coefficient);
        let capacity_warmup = (capacity_warmup > 0).then_some(capacity_warmup);
        let routing = Routing { active, noise, capacity_factor, capacity_warmup, overflow, kind };
        let losses = Losses {
            switch: on(switch),
            importance: on(importance),
            load: on(load),
            load_std: on(load_std),
            z: on(z),
            bias_update: on(bias_update),
            pooled,
        };
        (routing, losses)
    }

    /// The first key that asks for something only a mixture of experts has.
    fn key(&self) -> Option<&'static str> {
        let Self {
            router,
            active,
            noise,
            capacity_factor,
            capacity_warmup,
            overflow,
            kind,
            losses,
            bias_update,
        } = self;
        [
            ("train.router", *router != RouterTraining::Frozen),
            ("routing.active", active.is_some()),
            ("routing.noise", *noise != RouterNoise::None),
            ("routing.capacity_factor", capacity_factor.is_some()),
            ("routing.capacity_warmup", *capacity_warmup > 0),
            ("routing.overflow", *overflow != Overflow::Drop),
            ("routing.kind", *kind != RoutingKind::Model),
            ("losses.switch", losses.switch > 0.0),
            ("losses.importance", losses.importance > 0.0),
            ("losses.load", losses.load > 0.0),
            ("losses.load_std", losses.load_std > 0.0),
            ("losses.z", losses.z > 0.0),
            ("losses.bias_update", *bias_update > 0.0),
            ("losses.pooled", losses.pooled),
        ]
        .into_iter()
        .find_map(|(key, set)| set.then_some(key))
    }

    /// Changes the routing of `model` as the plan says; refuses what a dense model has no place for, and routers that nothing
    /// would reach. `seed` is the run's, and with `full` all weights are trained.
    pub(crate) fn apply(&self, model: &mut DecoderConfig, name: &str, seed: u64, full: bool) -> Result<()> {
        if model.sparse_layers().next().is_none() {
            return match self.key() {
                None => Ok(()),
                Some(key) => {
                    Err(Error::request(format!("`{key}` is for mixtures of experts, and `{name}` is dense"))
                        .with_hint("leave it out"))
                }
            };
        }
        if self.bias_update > 0.0 && !model.sparse_layers().all(|(_, moe)| moe.selection_bias) {
            return Err(Error::request(format!(
                "`losses.bias_update` moves a bias of the choice of experts, and `{name}` has none"
            ))
            .with_hint("balance with `losses.switch`"));
        }
        let Self { active, noise, capacity_factor, capacity_warmup, overflow, kind, .. } = *self;
        let variant = RoutingVariant { noise, capacity_factor, capacity_warmup, overflow, kind, seed };
        model.reroute(active, variant)?;
        self.refuse_constant_weights(model, name, full)
    }

    /// The weight of an expert that is the only one, divided by their sum, is 1 whatever the router says.
    fn refuse_constant_weights(&self, model: &DecoderConfig, name: &str, full: bool) -> Result<()> {
        let trains_routers = full || self.router != RouterTraining::Frozen;
        let is_constant =
            |moe: &MoeConfig| moe.active == 1 && (moe.renormalise || moe.scoring == Scoring::SoftmaxOfActive);
        let any = model.sparse_layers().any(|(_, moe)| is_constant(moe));
        if !any || !trains_routers || self.losses.are_on() {
            return Ok(());
        }
        let frozen = if full { "" } else { ", or leave `train.router` \"frozen\"" };
        Err(Error::request(format!(
            "routers would get no gradient: one expert of a token is active, and its weight in `{name}` is always 1, \
             as the weights of the chosen sum to one"
        ))
        .with_hint(format!("train with `losses.switch`, or with two active experts or more{frozen}")))
    }
}

/// `[routing]`
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a table")]
pub(super) struct Routing {
    #[serde(
        deserialize_with = "bounds::count::<_, 1, { bounds::EXPERTS }>",
        skip_serializing_if = "Option::is_none"
    )]
    active: Option<usize>,
    noise: RouterNoise,
    #[serde(deserialize_with = "bounds::positive::<_, 65_536>", skip_serializing_if = "Option::is_none")]
    capacity_factor: Option<f64>,
    #[serde(
        deserialize_with = "bounds::between::<_, 0, { bounds::STEPS }>",
        skip_serializing_if = "Option::is_none"
    )]
    capacity_warmup: Option<u64>,
    overflow: Overflow,
    kind: RoutingKind,
}

impl Routing {
    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// `[losses]`
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a table")]
pub(super) struct Losses {
    #[serde(
        deserialize_with = "bounds::not_negative::<_, 1_000_000>",
        skip_serializing_if = "Option::is_none"
    )]
    switch: Option<f64>,
    #[serde(
        deserialize_with = "bounds::not_negative::<_, 1_000_000>",
        skip_serializing_if = "Option::is_none"
    )]
    importance: Option<f64>,
    #[serde(
        deserialize_with = "bounds::not_negative::<_, 1_000_000>",
        skip_serializing_if = "Option::is_none"
    )]
    load: Option<f64>,
    #[serde(
        deserialize_with = "bounds::not_negative::<_, 1_000_000>",
        skip_serializing_if = "Option::is_none"
    )]
    load_std: Option<f64>,
    #[serde(
        deserialize_with = "bounds::not_negative::<_, 1_000_000>",
        skip_serializing_if = "Option::is_none"
    )]
    z: Option<f64>,
    #[serde(
        deserialize_with = "bounds::not_negative::<_, 1_000_000>",
        skip_serializing_if = "Option::is_none"
    )]
    bias_update: Option<f64>,
    pooled: bool,
}

impl Losses {
    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl Recipe {
    /// A key of `[routing]` that another key forbids, or needs and has not.
    pub(super) fn contradiction_of_routing(&self) -> Option<(&'static str, Error)> {
        let Routing { noise, capacity_factor, capacity_warmup, .. } = self.routing;
        if capacity_warmup.is_some_and(|steps| steps > 0) && capacity_factor.is_none() {
            let error = Error::request("`routing.capacity_warmup` leads to a capacity that is not given");
            return Some(("routing.capacity_warmup", error.with_hint("set `routing.capacity_factor` too")));
        }
        let trains_routers = self.train.router != RouterTraining::Frozen || self.train.full == Some(true);
        if noise == RouterNoise::Learned && !trains_routers {
            let error =
                Error::request("learned noise is trained with the routers, and `train.router` is \"frozen\"");
            let hint = "set `train.router` to \"full\" or \"lora\", or `routing.noise` to \"gaussian\"";
            return Some(("routing.noise", error.with_hint(hint)));
        }
        None
    }
}

/// `adapter.experts`: all, none, or those with these numbers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected `true`, `false` or a list of experts")]
pub enum ExpertChoice {
    /// All or none.
    All(bool),
    /// Those with these numbers, in every layer.
    Some(Vec<usize>),
}

/// The pattern on paths that leaves out what is not to have an adapter; none where everything may have one.
pub(super) fn excluded(experts: &ExpertChoice, shared_experts: bool) -> Option<String> {
    let of_experts = match experts {
        ExpertChoice::All(true) => None,
        ExpertChoice::All(false) => Some(r".*\.experts\.\d+\..*".to_string()),
        ExpertChoice::Some(list) => {
            let list: Vec<String> = list.iter().map(ToString::to_string).collect();
            Some(format!(r".*\.experts\.(?!(?:{})\.)\d+\..*", list.join("|")))
        }
    };
    let of_shared = (!shared_experts).then(|| r".*\.shared_.*".to_string());
    let patterns: Vec<String> = [of_experts, of_shared].into_iter().flatten().collect();
    (!patterns.is_empty()).then(|| patterns.join("|"))
}
