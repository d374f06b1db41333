//! What is asked for: how a dense model is made into a mixture of experts.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::model::DecoderConfig;
use crate::model::config::{Activation, FeedForwardConfig};
use crate::model::family::{MixtureFormat, MixtureShape};

/// Selects how a network becomes experts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Each network is cut into slices: some always on, the others experts of which a router takes a few.
    #[default]
    Split,
    /// The shared slices and as many more as would be active are kept, the rest is dropped: a dense model.
    Prune,
    /// Every expert is a copy of the network.
    Copy,
    /// Copies, of each of which a share of the neurons is drawn anew.
    Drop,
    /// Copies cut into slices, of which the router takes one whole copy's at first.
    VirtualGroups,
    /// New experts are added to a mixture: copies of those that most calibration tokens are routed to.
    Expand,
    /// Every expert is the network of another checkpoint.
    Mix,
}

impl Method {
    /// Whether it cuts the neurons of a network apart.
    #[must_use]
    pub fn cuts(self) -> bool {
        matches!(self, Self::Split | Self::Prune)
    }

    /// Whether it can draw neurons anew.
    #[must_use]
    pub fn draws(self) -> bool {
        matches!(self, Self::Drop | Self::Expand)
    }
}

/// How neurons are shared out among experts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Partition {
    /// Neurons stay in the order of the dense model.
    Sequential,
    /// Neurons are dealt out at random.
    Random,
    /// Neurons with similar gate rows go together.
    Kmeans,
    /// Neurons that are active on the same tokens go together.
    Coactivation,
    /// Neurons that matter to the loss on the same kind of text go together.
    Gradient,
    /// Neurons go together as in `gradient`, and those that matter in most kinds of text are shared.
    GradientSharing,
    /// A linear router and the partition are improved in turns: neurons go where the tokens are that they matter to.
    #[default]
    Alternating,
}

impl Partition {
    /// Whether it needs gradients of the loss.
    #[must_use]
    pub fn takes_gradients(self) -> bool {
        matches!(self, Self::Gradient | Self::GradientSharing)
    }
}

/// Selects what the router is made from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RouterKind {
    /// All values are zero, so that the first experts are always chosen.
    Zero,
    /// Values are drawn from a normal distribution.
    Random,
    /// Each row is the mean of the expert's gate rows.
    GateMean,
    /// Each row is the mean input of the tokens that the expert matters most to; of copies a cluster of windows.
    HiddenKmeans,
    /// Ridge regression predicts the root of each expert's share in the energy of the output, in closed form.
    #[default]
    Ridge,
    /// Gradient descent on the shares of energy, starting from a regression on their logarithms.
    Logistic,
    /// Each row is the mean hidden state of the prompts that are given for the expert.
    Prompts,
}

/// Selects what the down projections are fitted to, so that active neurons make up for the others.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Refit {
    /// They are not fitted and stay slices of the dense model's.
    None,
    /// They are fitted to the output of the dense network for the same input.
    #[default]
    Local,
    /// They are fitted to the difference from the dense model's residual stream.
    Stream,
}

/// Which layers stay dense.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a table such as { first = 1, last = 0, every = 1 }")]
pub struct KeepDense {
    /// So many at the beginning.
    pub first: usize,
    /// So many at the end.
    pub last: usize,
    /// Of the rest each `every`-th is converted: 1 is all of them.
    pub every: usize,
}

impl Default for KeepDense {
    fn default() -> Self {
        Self { first: 0, last: 0, every: 1 }
    }
}

impl KeepDense {
    /// For each of `layers` layers whether it stays dense. Where `every` is 0, all of them do.
    #[must_use]
    pub fn of(self, layers: usize) -> Vec<bool> {
        let end = layers.saturating_sub(self.last);
        let converted = |layer: usize| {
            let of_the_rest = layer.checked_sub(self.first).filter(|_| layer < end && self.every > 0);
            of_the_rest.is_some_and(|layer| layer % self.every == self.every - 1)
        };
        (0..layers).map(|layer| !converted(layer)).collect()
    }
}

/// How a dense model is made into a mixture.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// What becomes of the neurons.
    pub method: Method,
    /// Slices of a split, the shared ones counted in; or copies; or how many experts are added to a mixture.
    pub experts: usize,
    /// Slices that are always on.
    pub shared: usize,
    /// Routed experts of a token; an expanded mixture keeps its number.
    pub active: usize,
    /// How neurons are shared out.
    pub partition: Partition,
    /// Selects what the router is made from.
    pub router: RouterKind,
    /// What the down projections are fitted to.
    pub refit: Refit,
    /// Which layers stay dense.
    pub keep_dense: KeepDense,
    /// The share of neurons drawn anew.
    pub drop_ratio: f64,
    /// Slices of each copy.
    pub groups: usize,
    /// What the mixture is stored as; `None`: the first that can hold it.
    pub format: Option<MixtureFormat>,
    /// Whether what is written is read back, and whether promises hold.
    pub verify: bool,
    /// Whether static pruning and an oracle router are measured beside a split.
    pub baselines: bool,
    /// The seed of everything random.
    pub seed: u64,
}

impl Settings {
    /// For each of `layers` layers whether it stays dense, which one at least may not.
    pub(super) fn dense_layers(&self, layers: usize) -> Result<Vec<bool>> {
        let dense = self.keep_dense.of(layers);
        if dense.iter().all(|dense| *dense) {
            return Err(Error::request(format!(
                "`upcycle.keep_dense` keeps all {layers} layers dense, so nothing would be converted"
            ))
            .with_hint("lower `first`, `last` or `every`"));
        }
        Ok(dense)
    }
}

/// The numbers of neurons, slices and layers in a split model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SplitShape {
    /// Neurons of the dense network.
    pub neurons: usize,
    /// Neurons of a slice; where slices do not divide the network, the last ones are filled up with zeros.
    pub width: usize,
    /// Slices that are always on.
    pub shared: usize,
    /// Slices that are routed to.
    pub routed: usize,
    /// The number of routed slices that a token uses.
    pub active: usize,
    /// For each layer whether it stays dense.
    pub dense: Vec<bool>,
    /// The activation of every gate.
    pub activation: Activation,
}

impl SplitShape {
    /// Computes the shape that `settings` give for a model.
    pub fn of(settings: &Settings, config: &DecoderConfig) -> Result<Self> {
        let (neurons, activation) = dense_network(config)?;
        let Settings { experts, shared, active, .. } = *settings;
        if active == 0 || shared.checked_add(active).is_none_or(|both| both > experts) {
            return Err(Error::request(format!(
                "{experts} slices, of which {shared} are shared and {active} active, are no split"
            ))
            .with_hint(
                "`upcycle.active` is at least 1, and `shared` and `active` together are at most `experts`",
            ));
        }
        if experts > neurons {
            return Err(Error::request(format!(
                "`upcycle.experts` is {experts}, and the networks of the model have {neurons} neurons"
            ))
            .with_hint("a slice has one neuron at least"));
        }
        let dense = settings.dense_layers(config.layers.len())?;
        let width = neurons.div_ceil(experts);
        Ok(Self { neurons, width, shared, routed: experts - shared, active, dense, activation })
    }

    /// Neurons of the shared slices.
    #[must_use]
    pub fn shared_width(&self) -> usize {
        self.shared * self.width
    }

    /// Neurons that a token goes through.
    #[must_use]
    pub fn active_width(&self) -> usize {
        ((self.shared + self.active) * self.width).min(self.neurons)
    }

    /// Returns the shape of the mixture that is written.
    #[must_use]
    pub fn mixture(&self) -> MixtureShape {
        MixtureShape {
            experts: self.routed,
            active: self.active,
            width: self.width,
            shared: self.shared,
            averaged: false,
            dense: self.dense.clone(),
        }
    }
}

/// Width and activation of the feed-forward networks, which have to be dense, alike and without bias.
pub fn dense_network(config: &DecoderConfig) -> Result<(usize, Activation)> {
    let mut found = None;
    for (index, layer) in config.layers.iter().enumerate() {
        let FeedForwardConfig::Dense { width, bias, activation } = layer.feed_forward else {
            return Err(Error::request(format!(
                "layer {index} of the model is a mixture of experts already"
            ))
            .with_hint("give a dense model"));
        };
        if bias {
            return Err(Error::request(
                "the feed-forward networks of the model have biases, which experts of the \
                 families that can be written have not",
            ));
        }
        if found.is_some_and(|found| found != (width, activation)) {
            return Err(Error::request(format!(
                "the feed-forward network of layer {index} has {width} neurons, unlike those before it"
            )));
        }
        found = Some((width, activation));
    }
    found.ok_or_else(|| Error::invalid("the model has no layers"))
}

/// The family to write: the one asked for, or the first that can hold the mixture.
pub fn choose_format(
    asked: Option<MixtureFormat>,
    config: &DecoderConfig,
    shape: &MixtureShape,
) -> Result<MixtureFormat> {
    use MixtureFormat::{Glm4Moe, GraniteMoeShared, Mixtral, Qwen2Moe, Qwen3Moe};

    let order = match shape.averaged {
        true => [Mixtral, Qwen3Moe, Glm4Moe, GraniteMoeShared, Qwen2Moe],
        false => [Glm4Moe, Qwen2Moe, Qwen3Moe, GraniteMoeShared, Mixtral],
    };
    if let Some(format) = asked {
        format.refuse_unfit(config, shape)?;
        return Ok(format);
    }
    let fits = order.into_iter().find(|format| format.obstacle(config, shape).is_none());
    fits.ok_or_else(|| {
        let reasons: Vec<String> = order
            .iter()
            .filter_map(|format| Some(format!("`{}`: {}", format.name(), format.obstacle(config, shape)?)))
            .collect();
        Error::request(format!("no family can hold a mixture of this model: {}", reasons.join("; ")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_stay_dense_as_asked_whatever_the_numbers() {
        let of = |first, last, every| KeepDense { first, last, every }.of(5);
        assert_eq!(of(0, 0, 1), [false; 5]);
        assert_eq!(of(1, 1, 2), [true, true, false, true, true]);
        assert_eq!(of(0, 0, 0), [true; 5]);
        assert_eq!(of(usize::MAX, usize::MAX, usize::MAX), [true; 5]);
        assert!(KeepDense::default().of(0).is_empty());
    }
}
