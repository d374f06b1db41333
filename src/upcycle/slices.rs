//! What is decided for one layer: which neurons are shared, which expert has which, and the router.

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use super::settings::SplitShape;
use super::solve::{Linear, matrix, values};
use crate::error::{Error, Result};
use crate::model::Rule;
use crate::model::family::{self, Layout, MixtureFormat};
use crate::ops::scores;

/// How the family that is written chooses experts by the scores of a router, and weighs them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Routing {
    rule: Rule,
    /// What the down projections of experts are multiplied with when they are written.
    scale: f32,
    /// Whether a bias is added for the choice.
    pub(super) with_bias: bool,
}

impl Routing {
    /// Returns the routing of a model that is written as `format` with this layout.
    pub(super) fn of(format: MixtureFormat, layout: &Layout) -> Result<Self> {
        let config = family::read(&layout.config)?;
        let Some((_, moe)) = config.sparse_layers().next() else {
            return Err(Error::invalid("the model that would be written has no experts"));
        };
        let (rule, scale) = (Rule::of(moe), layout.routed_scale as f32);
        Ok(Self { rule, scale, with_bias: format.has_selection_bias() })
    }
}

/// The experts of each token and the weights of what they give, both `[tokens * active]`.
#[derive(Debug, Clone)]
pub(super) struct Choice {
    pub(super) experts: Vec<u32>,
    pub(super) weights: Vec<f32>,
}

impl Choice {
    /// These experts, each with its full weight.
    pub(super) fn even(experts: Vec<u32>) -> Self {
        Self { weights: vec![1.0; experts.len()], experts }
    }
}

/// One layer, cut.
#[derive(Debug, Clone)]
pub(super) struct Slices {
    /// Neurons that are always on. A number at or above the number of neurons stands for a neuron whose weights are zero.
    pub(super) shared: Vec<usize>,
    /// The neurons of each expert.
    pub(super) experts: Vec<Vec<usize>>,
    /// Computes a score for each expert from the input.
    pub(super) router: Linear,
    /// The router is written times two to this power.
    pub(super) power: i32,
    /// The way in which the written model chooses and weighs experts by the scores.
    pub(super) routing: Routing,
    /// The down projection, `[hidden, neurons]`: the dense one, or what it was fitted to.
    pub(super) down: Tensor,
    /// Experts of a token.
    pub(super) active: usize,
}

/// Lists the neurons that are not shared, with neurons of zeros added until they fill all experts.
pub(super) fn routed(shape: &SplitShape, shared: &[usize]) -> Vec<usize> {
    let mut is_shared = vec![false; shape.neurons.max(shape.width * (shape.shared + shape.routed))];
    shared.iter().for_each(|neuron| is_shared[*neuron] = true);
    (0..is_shared.len()).filter(|neuron| !is_shared[*neuron]).take(shape.width * shape.routed).collect()
}

impl Slices {
    /// `[tokens, neurons]`: ones for what the shared slices have, the weight of a chosen expert for what that has, else zeros.
    pub(super) fn mask(&self, choice: &Choice, neurons: usize) -> Vec<f32> {
        let tokens = choice.experts.len() / self.active.max(1);
        let mut base = vec![0f32; neurons];
        self.shared.iter().filter(|neuron| **neuron < neurons).for_each(|neuron| base[*neuron] = 1.0);
        let mut mask = vec![0f32; tokens * neurons];
        let chosen = choice.experts.par_chunks(self.active).zip(choice.weights.par_chunks(self.active));
        mask.par_chunks_mut(neurons).zip(chosen).for_each(|(mask, (experts, weights))| {
            mask.copy_from_slice(&base);
            for (expert, weight) in experts.iter().zip(weights) {
                let own = self.experts[*expert as usize].iter().filter(|neuron| **neuron < neurons);
                own.for_each(|neuron| mask[*neuron] = *weight);
            }
        });
        mask
    }

    /// The energy of each expert's slice, `[tokens, experts]`, from `h [tokens, neurons]`.
    pub(super) fn energies(&self, h: &Tensor, columns: &[f32]) -> Result<Tensor> {
        let (h, width) = (values(h)?, columns.len());
        let mut sums = vec![0f32; h.len() / width * self.experts.len()];
        sums.par_chunks_mut(self.experts.len()).zip(h.par_chunks(width)).for_each(|(sums, row)| {
            for (sum, neurons) in sums.iter_mut().zip(&self.experts) {
                let own = neurons.iter().filter(|neuron| **neuron < width);
                *sum = own.map(|neuron| (row[*neuron] * columns[*neuron]).powi(2)).sum();
            }
        });
        matrix(sums, self.experts.len())
    }

    /// The weight of the router, `[experts, hidden]`, and the bias of the choice, both as they are written.
    pub(super) fn written_router(&self) -> Result<(Tensor, Vec<f32>)> {
        let scale = 2f32.powi(self.power);
        let hidden = self.router.weight.len() / self.router.bias.len();
        let weight = self.router.weight.iter().map(|value| value * scale).collect();
        // Near zero a sigmoid rises by a quarter of its argument.
        let bias = self.router.bias.iter().map(|value| value * scale / 4.0).collect();
        Ok((matrix(weight, hidden)?, bias))
    }

    /// What the written router decides for these inputs. Its weights are nearly, not exactly, equal, and layers above see
    /// the difference: with many small experts it changes some of their choices.
    pub(super) fn choose(&self, x: &Tensor) -> Result<Choice> {
        let Routing { rule, scale, with_bias } = self.routing;
        let (weight, bias) = self.written_router()?;
        let logits = values(&scores(x, &weight)?)?;
        let (experts, weights) = rule.decide(&logits, with_bias.then_some(bias.as_slice()));
        Ok(Choice { experts, weights: weights.into_iter().map(|weight| weight * scale).collect() })
    }

    /// Counts the tokens of these inputs that the router sends to each expert.
    pub(super) fn load<'a>(&self, inputs: impl Iterator<Item = &'a Tensor>) -> Result<Vec<usize>> {
        let mut load = vec![0; self.experts.len()];
        for x in inputs {
            self.choose(x)?.experts.into_iter().for_each(|expert| load[expert as usize] += 1);
        }
        Ok(load)
    }
}

/// The `active` largest of each row, `[tokens * active]`; of equal ones the first.
pub(super) fn top(scores: &[f32], experts: usize, active: usize) -> Vec<u32> {
    let mut chosen = vec![0u32; scores.len() / experts * active];
    chosen.par_chunks_mut(active).zip(scores.par_chunks(experts)).for_each(|(chosen, row)| {
        let mut order: Vec<u32> = (0..experts as u32).collect();
        order.sort_by(|x, y| row[*y as usize].total_cmp(&row[*x as usize]).then(x.cmp(y)));
        chosen.copy_from_slice(&order[..active]);
    });
    chosen
}

/// For `h [tokens, neurons]` a one for each neuron that is `kept`, the same on all tokens.
pub(super) fn fixed_mask(kept: &[usize], h: &Tensor) -> Result<Vec<f32>> {
    let (tokens, neurons) = h.dims2()?;
    let mut mask = vec![0f32; neurons];
    kept.iter().for_each(|neuron| mask[*neuron] = 1.0);
    Ok(mask.repeat(tokens))
}

/// `h` with what is not active set to zero, and the rest of it.
pub(super) fn masked(h: &Tensor, mask: &[f32]) -> Result<(Tensor, Tensor)> {
    let mask = Tensor::from_slice(mask, h.dims(), &Device::Cpu)?;
    let active = (h * mask)?;
    let rest = (h - &active)?;
    Ok((active, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_equal_scores_the_first_are_taken() {
        assert_eq!(top(&[1.0, 3.0, 3.0, 0.0, 0.0, 0.0], 3, 2), [1, 2, 0, 1]);
    }

    /// Three experts of two neurons, of which `active` are taken, as `mixtral`.
    fn slices(weight: Vec<f32>, power: i32, active: usize) -> Slices {
        let config = serde_json::json!({
            "model_type": "mixtral", "hidden_size": 2, "intermediate_size": 2, "num_hidden_layers": 1,
            "num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": 8, "num_local_experts": 3,
            "num_experts_per_tok": active, "rms_norm_eps": 1e-5, "max_position_embeddings": 8
        });
        let layout = Layout { config, routed_scale: 1.0, shared_scale: 1.0 };
        Slices {
            shared: vec![2, 6],
            experts: vec![vec![0, 1], vec![3, 5], vec![4, 7]],
            router: Linear { weight, bias: vec![0.0; 3] },
            power,
            routing: Routing::of(MixtureFormat::Mixtral, &layout).unwrap(),
            down: Tensor::zeros((1, 6), candle_core::DType::F32, &Device::Cpu).unwrap(),
            active,
        }
    }

    #[test]
    fn a_mask_has_the_shared_and_the_chosen() {
        let mask = slices(vec![0.0; 6], 0, 1).mask(&Choice::even(vec![1, 2]), 6);
        assert_eq!(mask, [0., 0., 1., 1., 0., 1., 0., 0., 1., 0., 1., 0.]);
        let choice = Choice { experts: vec![0], weights: vec![0.75] };
        assert_eq!(slices(vec![0.0; 6], 0, 1).mask(&choice, 6), [0.75, 0.75, 1., 0., 0., 0.]);
    }

    /// Logits of 2 and 1, after the power, whose softmax is multiplied with the scale.
    #[test]
    fn a_choice_has_the_weights_of_the_written_router() {
        let x = Tensor::new(&[[1f32, 0.0]], &Device::Cpu).unwrap();
        let mut slices = slices(vec![0.0, 0.0, 4.0, 0.0, 2.0, 0.0], -1, 2);
        slices.routing.scale = 2.0;
        let found = slices.choose(&x).unwrap();
        assert_eq!(found.experts, [1, 2]);
        let first = 2.0 / (1.0 + (-1f32).exp());
        assert!(
            (found.weights[0] - first).abs() < 1e-6 && (found.weights[1] - 2.0 + first).abs() < 1e-6,
            "{found:?}"
        );
    }
}
