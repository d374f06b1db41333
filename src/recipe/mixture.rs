//! The keys that are about mixtures of experts: `train.router`, `[routing]` and `[losses]`.

use super::bounds::{self, Bound};
use super::choice::{ExpertChoice, RouterTraining};
use super::declare::keys;
use super::document::Node;
use super::keys::{Kind, Written};
use super::reading::{Faults, KeyValue, leaves};
use super::tables::TrainRecipe;
use super::typed::read_leaf;
use crate::error::{Error, Result};
use crate::model::RouterLosses;
use crate::model::config::{
    DecoderConfig, MoeConfig, Overflow, RouterNoise, RoutingKind, RoutingVariant, Scoring,
};

/// Everything a plan says of a mixture of experts; the default is what a dense model allows.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct MixturePlan {
    /// What of the routers is trained.
    pub router: RouterTraining,
    /// Experts of a token; `None`: as many as the model's configuration says.
    pub active: Option<usize>,
    /// The noise that the router's logits get in training.
    pub noise: RouterNoise,
    /// The most tokens of an expert, as a multiple of an equal share; `None`: there is no limit.
    pub capacity_factor: Option<f64>,
    /// The steps in which the limit comes down to `capacity_factor`.
    pub capacity_warmup: u64,
    /// Says where tokens go whose expert is full.
    pub overflow: Overflow,
    /// Says what experts are chosen by.
    pub kind: RoutingKind,
    /// How much each loss on routers counts.
    pub losses: RouterLosses,
    /// The step of selection biases that follow the load, for logits that deviate by about one; 0: they stay.
    pub bias_update: f64,
}

impl MixturePlan {
    pub(super) fn of(train: &TrainRecipe, routing: &RoutingRecipe, losses: &LossesRecipe) -> Self {
        let RoutingValues { noise, capacity_warmup, overflow, kind } = RoutingValues::of_keys(routing);
        let LossesValues { switch, importance, load, load_std, z, bias_update, pooled } =
            LossesValues::of_keys(losses);
        Self {
            router: train.router.unwrap_or_default(),
            active: routing.active,
            noise,
            capacity_factor: routing.capacity_factor,
            capacity_warmup,
            overflow,
            kind,
            losses: RouterLosses { switch, importance, load, load_std, z, pooled },
            bias_update,
        }
    }

    /// The tables that say it, but for what is trained of routers; none where they say nothing.
    pub(super) fn tables(&self) -> (Option<RoutingRecipe>, Option<LossesRecipe>) {
        let Self { active, noise, capacity_factor, capacity_warmup, overflow, kind, losses, .. } = *self;
        let Self { bias_update, .. } = *self;
        let RouterLosses { switch, importance, load, load_std, z, pooled } = losses;
        let nothing = Self { router: self.router, ..Self::default() };
        let says_losses = (losses, bias_update) != (nothing.losses, nothing.bias_update);
        let says_routing = Self { losses: nothing.losses, bias_update: 0.0, ..*self } != nothing;
        let routing = RoutingValues { noise, capacity_warmup, overflow, kind }.written();
        let routing = RoutingRecipe { active, capacity_factor, ..routing };
        let losses = LossesValues { switch, importance, load, load_std, z, bias_update, pooled }.written();
        (says_routing.then_some(routing), says_losses.then_some(losses))
    }

    /// `train.router`, where it says something.
    pub(super) fn router_key(&self) -> Option<RouterTraining> {
        (self.router != RouterTraining::Frozen).then_some(self.router)
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

keys! {
    table "routing" like "a table";

    /// `[routing]`
    #[derive(Default)]
    written pub struct RoutingRecipe;

    /// The keys of routing that have a value of their own.
    planned struct RoutingValues {}

    /// Experts that a token is sent to.
    active: usize [Bound::Whole(1, bounds::EXPERTS)] => "as many as the model's `config.json` says", "2";
    /// Noise that is added to the router's logits in training.
    noise: RouterNoise = RouterNoise::default();
    /// The most tokens of an expert, as a multiple of an equal share.
    capacity_factor: f64 [Bound::Positive(65_536.0)] => "no limit", "1.25";
    /// Steps in which the limit comes down to `capacity_factor`.
    capacity_warmup: u64 [Bound::Whole(0, bounds::STEPS)] = 0;
    /// Where tokens go whose expert is full.
    overflow: Overflow = Overflow::default();
    /// By what experts are chosen.
    kind: RoutingKind = RoutingKind::default();
}

keys! {
    table "losses" like "a table";

    /// `[losses]`
    #[derive(Default)]
    written pub struct LossesRecipe;

    /// How much each loss on routers counts.
    planned struct LossesValues {}

    /// Coefficient of the load-balancing loss of Switch Transformers.
    switch: f64 [Bound::NotNegative(1e6)] = 0.0;
    /// Coefficient of the variation of the experts' importance, which is the sum of their weights.
    importance: f64 [Bound::NotNegative(1e6)] = 0.0;
    /// Coefficient of the variation of the experts' load under noise.
    load: f64 [Bound::NotNegative(1e6)] = 0.0;
    /// Coefficient of the deviation of the experts' load.
    load_std: f64 [Bound::NotNegative(1e6)] = 0.0;
    /// Coefficient of the z-loss, which keeps the router's logits small.
    z: f64 [Bound::NotNegative(1e6)] = 0.0;
    /// Step of selection biases that follow the load of each expert; 0: they stay.
    bias_update: f64 [Bound::NotNegative(1e6)] = 0.0;
    /// Whether the losses are computed over the tokens of all layers together, as transformers does.
    pooled: bool = false;
}

impl RoutingRecipe {
    /// A key that another key forbids, or needs and has not.
    pub(super) fn contradiction(&self, train: &TrainRecipe) -> Option<(&'static str, Error)> {
        let Self { capacity_factor, capacity_warmup, .. } = *self;
        let noise = self.noise.unwrap_or_default();
        if capacity_warmup.is_some_and(|steps| steps > 0) && capacity_factor.is_none() {
            let error = Error::request("`routing.capacity_warmup` leads to a capacity that is not given");
            return Some(("routing.capacity_warmup", error.with_hint("set `routing.capacity_factor` too")));
        }
        if self.overflow.unwrap_or_default() != Overflow::default() && capacity_factor.is_none() {
            let error =
                Error::request("`routing.overflow` is for experts that are full, and no capacity is given");
            return Some(("routing.overflow", error.with_hint("set `routing.capacity_factor` too")));
        }
        let trains_routers =
            train.router.unwrap_or_default() != RouterTraining::Frozen || train.full == Some(true);
        if noise == RouterNoise::Learned && !trains_routers {
            let error =
                Error::request("learned noise is trained with the routers, and `train.router` is \"frozen\"");
            let hint = "set `train.router` to \"full\" or \"lora\", or `routing.noise` to \"gaussian\"";
            return Some(("routing.noise", error.with_hint(hint)));
        }
        None
    }
}

impl LossesRecipe {
    /// A key that does nothing without another.
    pub(super) fn contradiction(&self) -> Option<(&'static str, Error)> {
        let LossesValues { switch, importance, load, load_std, z, pooled, .. } = LossesValues::of_keys(self);
        let losses = RouterLosses { switch, importance, load, load_std, z, pooled };
        if !pooled || losses.are_on() {
            return None;
        }
        let error =
            Error::request("`losses.pooled` says how losses on routers are computed, and there is none");
        Some(("losses.pooled", error.with_hint("set `losses.switch` too, or leave it out")))
    }
}

leaves!(RouterTraining, RouterNoise, Overflow, RoutingKind);

impl KeyValue for ExpertChoice {
    fn read(node: &Node, faults: &mut Faults) -> Option<Self> {
        faults.kept(read_leaf(node), &node.origin)
    }

    fn kind() -> Kind {
        Kind::Words("`true`, `false` or a list of the numbers of experts".to_string())
    }
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
