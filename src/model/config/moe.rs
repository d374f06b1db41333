//! A sparse feed-forward network: how scores become weights, what is shared, and under which names all of it is stored.

use serde::{Deserialize, Serialize};

use super::Activation;

/// Logits of an upcycled router have a standard deviation of about two to this power. That is small enough to give chosen
/// experts nearly equal weights, and large enough to keep scores from being ties.
pub const EVEN_EXPONENT: i32 = -8;

/// Experts of which a router chooses a few for each token.
#[derive(Debug, Clone, PartialEq)]
pub struct MoeConfig {
    /// Experts to choose from.
    pub experts: usize,
    /// Experts chosen for a token.
    pub active: usize,
    /// Neurons of an expert.
    pub width: usize,
    /// The activation of every gate.
    pub activation: Activation,
    /// How logits become scores.
    pub scoring: Scoring,
    /// Whether the scores of the chosen experts are divided by their sum.
    pub renormalise: bool,
    /// The factor on the weights of chosen experts, applied last.
    pub scale: f64,
    /// Whether a bias is added to the scores for the choice, and for nothing else.
    pub selection_bias: bool,
    /// The expert that every token goes to.
    pub shared: Option<SharedConfig>,
    /// The power of two by which logits are smaller than those of an ordinary router, which deviate by about one:
    /// [`EVEN_EXPONENT`] where `upcycled.router_exponents` of `config.json` says that the router's weight was scaled down for
    /// storage, 0 elsewhere.
    pub router_exponent: i32,
    /// The names of its modules in files.
    pub names: MoeNames,
    /// The ways in which a run chooses experts otherwise than the model does.
    pub variant: RoutingVariant,
}

/// How a run departs from the model's way of choosing experts. Chance is a function of seed, step, layer, document, position
/// and expert, so that recomputation and resumed runs see the same.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct RoutingVariant {
    /// The noise that is added to logits in training.
    pub noise: RouterNoise,
    /// In training an expert takes at most `ceil(factor * tokens * active / experts)` of the tokens computed at once.
    pub capacity_factor: Option<f64>,
    /// The number of steps in which the factor falls to this value. At the first step it is large enough for all tokens.
    pub capacity_warmup: u64,
    /// The treatment of choices that exceed the capacity of their expert.
    pub overflow: Overflow,
    /// The source of the choice of experts.
    pub kind: RoutingKind,
    /// The seed of noise and of random choices.
    pub seed: u64,
}

/// Normal noise that is added to the logits in training, so that experts are tried that would not be chosen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RouterNoise {
    /// None.
    #[default]
    None,
    /// Of deviation `1 / experts` (V-MoE).
    Gaussian,
    /// Of deviation `softplus(W x)`, `W` zero at first and trained (Shazeer et al. 2017, noisy top-k gating).
    Learned,
}

impl RoutingVariant {
    /// Returns the capacity factor at a step. It begins at `experts / active`, with which nothing is dropped, and falls evenly
    /// to its final value during the warm-up.
    #[must_use]
    pub fn capacity_factor_at(&self, step: u64, experts: usize, active: usize) -> Option<f64> {
        let factor = self.capacity_factor?;
        let begun = step as f64 / self.capacity_warmup.max(1) as f64;
        let all = experts as f64 / active as f64;
        Some(if step < self.capacity_warmup { all + (factor - all) * begun } else { factor })
    }
}

/// Says what happens to a choice whose expert has no room left.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Overflow {
    /// It is left out: the residual stream alone goes on.
    #[default]
    Drop,
    /// The best expert that has room takes it.
    Reroute,
}

/// Selects what chooses the experts. Their weights are computed from the router's scores in all cases.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RoutingKind {
    /// The router's scores.
    #[default]
    Model,
    /// Chance.
    Random,
    /// The token's id: always the same experts for a word.
    Hash,
}

/// How the router's logits become the scores that weights are taken from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scoring {
    /// Softmax over all experts, then the choice.
    Softmax,
    /// Sigmoid of each.
    Sigmoid,
    /// The choice, then softmax over those chosen.
    SoftmaxOfActive,
}

/// An expert that every token goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedConfig {
    /// Its neurons.
    pub width: usize,
    /// Whether what it gives is multiplied with the sigmoid of a linear layer of one row.
    pub gated: bool,
}

/// Module paths below the layer's, as Hugging Face's checkpoints of one tensor per expert have them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MoeNames {
    /// The linear layer that gives the logits.
    pub router: &'static str,
    /// What stands before an expert's number.
    pub experts: &'static str,
    /// Gate, up and down of an expert.
    pub projections: [&'static str; 3],
    /// The shared expert.
    pub shared: &'static str,
    /// The layer of one row that gates it.
    pub shared_gate: &'static str,
    /// The tensors of other layouts.
    pub packed: &'static [(&'static str, Bundle)],
    /// What PEFT makes of an adapter on experts.
    pub in_peft: InPeft,
}

/// How PEFT 0.21 on transformers 5, which holds all experts in one parameter, reads an adapter with tensors per expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InPeft {
    /// It translates targets and tensors; what is not an expert but has the name of an expert's projection has to be
    /// targeted as a parameter.
    Translated,
    /// It translates tensors only: experts have to be targeted as parameters.
    TensorsTranslated,
    /// It does not: what it is to read is written as it holds it.
    Unknown,
}

/// What a tensor of another layout holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bundle {
    /// `[experts, 2 width, hidden]`: of each expert the gate, then the up projection.
    GateUp,
    /// `[experts, hidden, width]`.
    Down,
    /// `[2 width, hidden]` of the shared expert.
    SharedGateUp,
    /// `[hidden, width]` of the shared expert.
    SharedDown,
    /// `[experts, hidden]`, by another name.
    Router,
}

/// A tensor of another layout, and the tensors in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackedTensor {
    /// Its name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Name and shape of each part, end to end.
    pub parts: Vec<(String, [usize; 2])>,
}

impl MoeNames {
    /// The router's weight as transformers 5 calls it, where that is another name, below the layer's path as all here.
    #[must_use]
    pub fn router_in_transformers(&self) -> Option<&'static str> {
        self.packed.iter().find(|(_, bundle)| *bundle == Bundle::Router).map(|(name, _)| *name)
    }

    /// The module or parameter that holds `bundle` in transformers 5, which comes last of several, below the layer's path.
    #[must_use]
    pub fn in_transformers(&self, bundle: Bundle) -> Option<&'static str> {
        let (name, _) = self.packed.iter().rev().find(|(_, other)| *other == bundle)?;
        Some(name.trim_end_matches(".weight"))
    }
}

impl MoeConfig {
    /// `model.layers.3.mlp.experts.5.gate_proj`: the path of the gate (0), up (1) or down (2) projection of an expert.
    #[must_use]
    pub fn expert_path(&self, layer: usize, expert: usize, projection: usize) -> String {
        let MoeNames { experts, projections, .. } = self.names;
        format!("model.layers.{layer}.{experts}.{expert}.{}", projections[projection])
    }

    /// The same of the shared expert.
    #[must_use]
    pub fn shared_path(&self, layer: usize, projection: usize) -> String {
        const PROJECTIONS: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];
        format!("model.layers.{layer}.{}.{}", self.names.shared, PROJECTIONS[projection])
    }

    /// The path of the router.
    #[must_use]
    pub fn router_path(&self, layer: usize) -> String {
        format!("model.layers.{layer}.{}", self.names.router)
    }

    /// What the router's stored weight is that of an ordinary router times: a power of two, so that both are the same to the
    /// bit.
    #[must_use]
    pub fn router_unit(&self) -> f64 {
        2f64.powi(self.router_exponent)
    }

    /// What a step of the selection bias is multiplied with: 1, but where logits are small so that their scores, sigmoids near
    /// zero, vary by a quarter of what they do.
    #[must_use]
    pub fn selection_unit(&self) -> f64 {
        if self.router_exponent == 0 { 1.0 } else { self.router_unit() / 4.0 }
    }

    /// The path of the shared expert's gate.
    #[must_use]
    pub fn shared_gate_path(&self, layer: usize) -> String {
        format!("model.layers.{layer}.{}", self.names.shared_gate)
    }

    /// The name of the bias that only the choice sees.
    #[must_use]
    pub fn selection_bias_path(&self, layer: usize) -> String {
        format!("{}.e_score_correction_bias", self.router_path(layer))
    }

    /// The tensors of other layouts of one layer.
    pub(super) fn packed_tensors(&self, layer: usize, hidden: usize) -> Vec<PackedTensor> {
        let weight = |path: String| format!("{path}.weight");
        let width = self.width;
        let shared = self.shared.map_or(0, |shared| shared.width);
        let packed = self.names.packed.iter().map(|(name, bundle)| {
            let (shape, parts) = match bundle {
                Bundle::GateUp => {
                    let of = |expert| {
                        [0, 1].map(|p| (weight(self.expert_path(layer, expert, p)), [width, hidden]))
                    };
                    (vec![self.experts, 2 * width, hidden], (0..self.experts).flat_map(of).collect())
                }
                Bundle::Down => {
                    let of = |expert| (weight(self.expert_path(layer, expert, 2)), [hidden, width]);
                    (vec![self.experts, hidden, width], (0..self.experts).map(of).collect())
                }
                Bundle::SharedGateUp => {
                    let of = |p| (weight(self.shared_path(layer, p)), [shared, hidden]);
                    (vec![2 * shared, hidden], vec![of(0), of(1)])
                }
                Bundle::SharedDown => {
                    (vec![hidden, shared], vec![(weight(self.shared_path(layer, 2)), [hidden, shared])])
                }
                Bundle::Router => {
                    let shape = [self.experts, hidden];
                    (shape.to_vec(), vec![(weight(self.router_path(layer)), shape)])
                }
            };
            PackedTensor { name: format!("model.layers.{layer}.{name}"), shape, parts }
        });
        packed.collect()
    }
}
