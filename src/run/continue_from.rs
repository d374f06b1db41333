//! Going on with an adapter: what a recipe says of it against what it is.

use std::collections::BTreeSet;

use crate::adapter::{LoraConfig, Targets, hf, tensor_names};
use crate::error::{Error, Result};
use crate::model::DecoderConfig;
use crate::model::config::Site;
use crate::recipe::{AdapterRecipe, ContinuedAdapter, ExpertChoice, RouterTraining};

/// The configuration of an adapter that training goes on with: its own, with the dropout of the recipe. What the recipe
/// says otherwise must not differ from it.
pub(super) fn continued(
    plan: &ContinuedAdapter,
    router: RouterTraining,
    adapter: &hf::Adapter,
    model: &DecoderConfig,
) -> Result<LoraConfig> {
    let AdapterRecipe { rank, alpha, targets, rslora, experts, shared_experts, .. } = &plan.expected;
    let own = &adapter.config;
    let adapted = Adapted::of(adapter, model);
    if router == RouterTraining::Lora && !adapted.routers {
        return Err(Error::request(
            "`train.router` is \"lora\", and the adapter in `adapter.from` has no low-rank terms on routers",
        )
        .with_hint(
            "train the routers' weights with `train.router = \"full\"`, or begin with a fresh adapter",
        ));
    }
    let mut differing = Vec::new();
    if let Some(rank) = rank.filter(|rank| *rank != own.rank) {
        differing.push(format!("`adapter.rank` is {rank}, and its rank is {}", own.rank));
    }
    if let Some(alpha) = alpha.filter(|alpha| *alpha != own.alpha()) {
        differing.push(format!("`adapter.alpha` is {alpha}, and its alpha is {}", own.alpha()));
    }
    if let Some(rslora) = rslora.filter(|rslora| *rslora != own.rslora) {
        differing.push(format!("`adapter.rslora` is {rslora}, and its own is {}", own.rslora));
    }
    if let Some(targets) = targets.clone() {
        let targets = match router {
            RouterTraining::Lora => targets.with_routers(model),
            RouterTraining::Frozen | RouterTraining::Full => targets,
        };
        if !same_targets(&targets, &own.targets) {
            differing.push("`adapter.targets` are not its targets".to_string());
        }
    }
    if experts.as_ref().is_some_and(|experts| adapted.experts != adapted.chosen(experts)) {
        let numbers: Vec<String> = adapted.experts.iter().map(ToString::to_string).collect();
        let its = if numbers.is_empty() { "none".to_string() } else { numbers.join(", ") };
        differing.push(format!("`adapter.experts` are not its experts, which are {its}"));
    }
    let shared_experts = shared_experts.filter(|_| adapted.has_shared);
    if let Some(shared_experts) = shared_experts.filter(|shared| *shared != adapted.shared_experts) {
        let its = if adapted.shared_experts { "has terms" } else { "has no terms" };
        differing
            .push(format!("`adapter.shared_experts` is {shared_experts}, and it {its} on shared experts"));
    }
    if differing.is_empty() {
        let (dropout, dropout_seed) = (plan.dropout, plan.dropout_seed);
        return Ok(LoraConfig { dropout, dropout_seed, ..own.clone() });
    }
    Err(Error::request(format!("the adapter in `adapter.from` is another one: {}", differing.join("; ")))
        .with_hint("leave these keys out: it keeps its own"))
}

/// Which parts of a mixture an adapter has tensors for, in any layer.
struct Adapted {
    experts: BTreeSet<usize>,
    shared_experts: bool,
    routers: bool,
    /// Of the model: how many experts there are, and whether any is shared.
    all: usize,
    has_shared: bool,
}

impl Adapted {
    fn of(adapter: &hf::Adapter, model: &DecoderConfig) -> Self {
        let mut adapted = Self {
            experts: BTreeSet::new(),
            shared_experts: false,
            routers: false,
            all: 0,
            has_shared: false,
        };
        for (_, moe) in model.sparse_layers() {
            adapted.all = adapted.all.max(moe.experts);
            adapted.has_shared |= moe.shared.is_some();
        }
        for linear in model.linears() {
            if !adapter.tensors.contains_key(&tensor_names(&linear.path).a) {
                continue;
            }
            match linear.site {
                Site::Expert(expert) => _ = adapted.experts.insert(expert),
                Site::Shared => adapted.shared_experts = true,
                Site::Router => adapted.routers = true,
                Site::Dense => {}
            }
        }
        adapted
    }

    /// The experts that a recipe asks for.
    fn chosen(&self, experts: &ExpertChoice) -> BTreeSet<usize> {
        match experts {
            ExpertChoice::All(true) => (0..self.all).collect(),
            ExpertChoice::All(false) => BTreeSet::new(),
            ExpertChoice::Some(numbers) => numbers.iter().copied().collect(),
        }
    }
}

/// The same, in whatever order names are.
fn same_targets(one: &Targets, other: &Targets) -> bool {
    match (one, other) {
        (Targets::Names(one), Targets::Names(other)) => {
            BTreeSet::from_iter(one) == BTreeSet::from_iter(other)
        }
        _ => one == other,
    }
}
