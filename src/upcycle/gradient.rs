//! What the loss leans on: `|h_j dL/dh_j|` of each neuron, summed over the tokens of each kind of text (LLaMA-MoE, Zhu et al.
//! 2024, after SNIP, Lee et al. 2019). To first order it is what the loss would change by if the neuron were silent.
//!
//! `dL/dh = dL/dy D` with `y` the output of the network and `D` its down projection. Kinds of text are balanced clusters of
//! short pieces, by the mean of their embeddings; there are as many as experts, and the neurons that matter most to a
//! kind make up its expert. What is shared may be chosen likewise: the neurons that matter to most kinds.

use std::cmp::Ordering;

use candle_core::{DType, Device, Tensor};

use super::partition::spherical;
use super::settings::SplitShape;
use super::solve::matrix;
use super::statistics::{network, neurons, plain_values};
use super::windows::{Windows, first_batches};
use super::{Event, Watch};
use crate::data::generator;
use crate::error::{Error, Result};
use crate::model::Decoder;
use crate::ops::{Gradients, Pass, Trainables, cross_entropy, matmul, matmul_f32, rows};

/// Tokens that gradients are taken of.
const TOKENS: usize = 8192;
/// Tokens of a piece of text.
const PIECE: usize = 64;
/// Rounds of k-means.
const ROUNDS: usize = 20;

/// The importance of neurons for kinds of text.
pub(super) struct Importance {
    /// The importance in each layer, `[clusters, neurons]`; `None` for layers that stay dense.
    layers: Vec<Option<Tensor>>,
}

impl Importance {
    /// From the first batches of `text`: one walk forward and one back, a batch at a time.
    pub(super) fn of(
        model: &Decoder,
        shape: &SplitShape,
        text: &[Windows],
        seed: u64,
        watch: &mut Watch<'_>,
    ) -> Result<Self> {
        let text = first_batches(text, TOKENS);
        let clusters = clusters(model, text, shape.routed, seed)?;
        watch(Event::note(format!("gradients of the loss, text in {} clusters", shape.routed)))?;
        let mut layers: Vec<Option<Tensor>> = vec![None; shape.dense.len()];
        for (batch, of_tokens) in text.iter().zip(&clusters) {
            watch(Event::note(format!("gradients of {} tokens", batch.tokens.len())))?;
            let (rows, targets) = batch.targets();
            let d_hidden = |hidden: &Tensor| -> Result<Tensor> {
                let mut none = Gradients::of(&Trainables::new());
                let predicting = rows::gather(hidden, &rows)?;
                let (_, saved) = cross_entropy::forward(&predicting, model.head(), &targets, 1.0, &mut none)?;
                rows::scatter(&cross_entropy::backward(saved), &rows, batch.tokens.len())
            };
            let documents = batch.documents();
            model.walk_back(&batch.tokens, &documents, d_hidden, &mut |layer, x, dy| {
                if shape.dense[layer] {
                    return Ok(());
                }
                let network = network(model, layer)?;
                let h = neurons(network, x, &Pass::inference(&documents))?; // [tokens, neurons]
                let down = plain_values(&network.down.weight)?;
                let dh = matmul_f32(&dy.to_dtype(DType::F32)?, &down)?;
                let sums = matmul(of_tokens, &(h * dh)?.abs()?)?; // [clusters, neurons]
                let earlier = layers[layer].take();
                layers[layer] = Some(match earlier {
                    Some(earlier) => (earlier + sums)?,
                    None => sums,
                });
                Ok(())
            })?;
        }
        Ok(Self { layers })
    }

    /// Ranks the neurons of a layer by the number of kinds of text that have them among their `most` most important ones,
    /// then by their importance for all kinds together. `None` for layers without gradients.
    pub(super) fn most_shared(&self, layer: usize, most: usize) -> Result<Option<Vec<usize>>> {
        let Some(all) = &self.layers[layer] else { return Ok(None) };
        let of_kinds: Vec<Vec<f32>> = all.to_vec2()?;
        let mut counts = vec![0usize; all.dim(1)?];
        for of_kind in &of_kinds {
            let ranked = ranked_by(counts.len(), |one, other| of_kind[other].total_cmp(&of_kind[one]));
            ranked.iter().take(most).for_each(|neuron| counts[*neuron] += 1);
        }
        let sums: Vec<f32> = all.sum(0)?.to_vec1()?;
        let by_count = |one: usize, other: usize| {
            counts[other].cmp(&counts[one]).then(sums[other].total_cmp(&sums[one]))
        };
        Ok(Some(ranked_by(counts.len(), by_count)))
    }

    /// Returns the importance of some neurons of a layer, `[neurons, clusters]`; zeros for numbers that are no neuron.
    pub(super) fn of_neurons(&self, layer: usize, neurons: &[usize]) -> Result<Option<Tensor>> {
        let Some(all) = &self.layers[layer] else { return Ok(None) };
        let last = all.dim(1)?;
        let index: Vec<u32> = neurons.iter().map(|neuron| (*neuron).min(last) as u32).collect();
        let padded = all.t()?.contiguous()?.pad_with_zeros(0, 0, 1)?;
        Ok(Some(padded.index_select(&Tensor::new(index, &Device::Cpu)?, 0)?))
    }
}

/// The numbers below `count` in an order; of equal ones the smaller comes first.
fn ranked_by(count: usize, order: impl Fn(usize, usize) -> Ordering) -> Vec<usize> {
    let mut ranked: Vec<usize> = (0..count).collect();
    ranked.sort_by(|one, other| order(*one, *other).then(one.cmp(other)));
    ranked
}

/// Returns a matrix `[clusters, tokens]` for each batch, with a one where a token belongs to a cluster. All clusters have the
/// same number of pieces; pieces that are left over belong to none.
fn clusters(model: &Decoder, text: &[Windows], count: usize, seed: u64) -> Result<Vec<Tensor>> {
    let mut means = Vec::new();
    let mut pieces = Vec::new();
    for (number, batch) in text.iter().enumerate() {
        let embedded = model.begin_stream(&batch.tokens, batch.documents())?;
        let embedded = embedded.residual().to_dtype(DType::F32)?;
        for window in batch.offsets.windows(2) {
            for start in (window[0]..window[1]).step_by(PIECE) {
                let len = PIECE.min(window[1] - start);
                means.push(embedded.narrow(0, start, len)?.mean_keepdim(0)?);
                pieces.push((number, start, len));
            }
        }
    }
    let each = pieces.len() / count;
    if each == 0 {
        return Err(Error::request(format!(
            "`upcycle.partition = \"gradient\"` puts text into {count} clusters, and there are {} pieces of {PIECE} tokens",
            pieces.len()
        ))
        .with_hint("raise `calibration.tokens`"));
    }
    pieces.truncate(each * count);
    let means = Tensor::cat(&means[..each * count], 0)?;
    let centred = means.broadcast_sub(&means.mean_keepdim(0)?)?;
    let found = spherical(&centred, count, ROUNDS, &mut generator("upcycle/texts", &[seed]))?;
    let mut ones: Vec<Vec<f32>> = text.iter().map(|batch| vec![0.0; count * batch.tokens.len()]).collect();
    for ((number, start, len), cluster) in pieces.into_iter().zip(found) {
        let width = text[number].tokens.len();
        ones[number][cluster * width + start..][..len].fill(1.0);
    }
    ones.into_iter().zip(text).map(|(ones, batch)| matrix(ones, batch.tokens.len())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_are_neurons_that_matter_to_most_kinds() {
        // The lists of two: {1, 0}, {1, 2}, {2, 3}; neuron 4 matters much to one kind alone, and less than others there.
        let kinds = [[3f32, 9., 1., 0., 2.], [1., 4., 8., 0., 3.], [0., 1., 5., 7., 4.]];
        let importance = Importance { layers: vec![None, Some(Tensor::new(&kinds, &Device::Cpu).unwrap())] };
        assert_eq!(importance.most_shared(0, 2).unwrap(), None);
        // 1 and 2 are in two lists, of 14 each, so in their order; 0 and 3 in one, of 4 and 7.
        assert_eq!(importance.most_shared(1, 2).unwrap(), Some(vec![1, 2, 3, 0, 4]));
    }
}
