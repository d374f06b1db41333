//! What one layer shows on calibration text: inputs, neurons, how much each of them contributes, and which are massive.
//!
//! A neuron `j` contributes `h_j D_j` to the output, of energy `h_j^2 |D_j|^2`. Second moments rank neurons better than
//! first moments do. A few neurons of a model give a few tokens outputs a thousand times as large as all others: those
//! tokens would be all that sums of squares see.

use candle_core::{DType, Tensor};
use rayon::prelude::*;

use super::solve::{matrix, values};
use super::windows::Windows;
use crate::error::{Error, Result};
use crate::model::{Decoder, FeedForward, Stream};
use crate::ops::{Pass, Weight, glu, matmul_f32};

/// A neuron is guarded when it once gives more than so many median outputs.
const GUARD: f32 = 4.0;
/// A token is left out of statistics when its output is so many medians.
const MASSIVE: f32 = 8.0;
/// In fits, tokens above so many medians count less.
const LARGE: f32 = 2.0;

/// A batch at the feed-forward network of a layer.
#[derive(Debug, Clone)]
pub(super) struct Observed {
    /// The normalised input, `[tokens, hidden]`, as it is computed.
    pub(super) x: Tensor,
    /// The neurons, `[tokens, neurons]`, f32.
    pub(super) h: Tensor,
    /// What the network gives, `[tokens, hidden]`, f32.
    pub(super) y: Tensor,
    /// `|y|` of each token.
    pub(super) norms: Vec<f32>,
    /// Whether a token starts its window. Models use the first token as an attention sink, so its activations are not
    /// typical.
    pub(super) first: Vec<bool>,
}

/// The feed-forward network of a layer, which must be a dense one.
pub(super) fn network(model: &Decoder, layer: usize) -> Result<&FeedForward> {
    model
        .feed_forward(layer)
        .ok_or_else(|| Error::request(format!("layer {layer} of the model is a mixture of experts already")))
}

/// The values of a weight in f32.
pub(super) fn plain_values(weight: &Weight) -> Result<Tensor> {
    let tensor = match weight {
        Weight::Dense(parameter) => parameter.tensor().clone(),
        Weight::Quantized(quantized) => quantized.dequantize()?,
    };
    Ok(tensor.to_dtype(DType::F32)?)
}

/// `[tokens, neurons]` in f32: the network before its down projection.
pub(super) fn neurons(network: &FeedForward, x: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
    let (gate, _) = network.gate.forward(x, pass)?;
    let (up, _) = network.up.forward(x, pass)?;
    Ok(glu::forward(gate, up, network.activation)?.0.to_dtype(DType::F32)?)
}

/// Takes a stream up to the network of a layer.
pub(super) fn observe(
    model: &Decoder,
    layer: usize,
    network: &FeedForward,
    down: &Tensor,
    stream: &mut Stream,
    windows: &Windows,
) -> Result<Observed> {
    let x = model.attend(layer, stream)?;
    let h = neurons(network, &x, &Pass::inference(stream.documents()))?;
    let y = matmul_f32(&h, &down.t()?)?;
    let width = y.dim(1)?;
    let norms = values(&y)?.par_chunks(width).map(|row| square_sum(row).sqrt()).collect();
    Ok(Observed { x, h, y, norms, first: windows.is_first() })
}

fn square_sum(row: &[f32]) -> f32 {
    row.iter().map(|value| value * value).sum()
}

/// Sums over tokens of one layer.
#[derive(Debug, Clone)]
pub(super) struct Moments {
    /// `sum of h_j^2` of each neuron.
    squares: Vec<f64>,
    /// `max |h_j|` of each neuron.
    largest: Vec<f32>,
    norms: Vec<f32>,
}

impl Moments {
    pub(super) fn new(neurons: usize) -> Self {
        Self { squares: vec![0.0; neurons], largest: vec![0.0; neurons], norms: Vec::new() }
    }

    /// Adds a batch. Sums are over fixed pieces in order, so that they do not depend on the number of threads.
    pub(super) fn add(&mut self, observed: &Observed) -> Result<()> {
        const PIECE: usize = 128;
        let width = self.squares.len();
        let h = values(&observed.h)?;
        let pieces: Vec<(Vec<f32>, Vec<f32>)> = h
            .par_chunks(PIECE * width)
            .map(|piece| {
                let (mut squares, mut largest) = (vec![0f32; width], vec![0f32; width]);
                for row in piece.chunks_exact(width) {
                    for ((square, largest), h) in squares.iter_mut().zip(&mut largest).zip(row) {
                        *square += h * h;
                        *largest = largest.max(h.abs());
                    }
                }
                (squares, largest)
            })
            .collect();
        for (squares, largest) in pieces {
            self.squares.iter_mut().zip(squares).for_each(|(sum, square)| *sum += f64::from(square));
            self.largest.iter_mut().zip(largest).for_each(|(most, found)| *most = most.max(found));
        }
        self.norms.extend(&observed.norms);
        Ok(())
    }

    /// Scores the neurons by their contributions. `columns` are the norms of the columns of the down projection.
    pub(super) fn finish(self, columns: &[f32]) -> Scores {
        let tokens = self.norms.len().max(1) as f64;
        let energy = self
            .squares
            .iter()
            .zip(columns)
            .map(|(square, column)| square / tokens * f64::from(column * column));
        let mut norms = self.norms;
        norms.sort_by(f32::total_cmp);
        let median = norms.get(norms.len() / 2).copied().unwrap_or(0.0);
        let guarded = self.largest.iter().zip(columns).map(|(h, column)| h * column > GUARD * median);
        Scores { energy: energy.collect(), guarded: guarded.collect(), median }
    }
}

/// How much each neuron of a layer contributes.
#[derive(Debug, Clone)]
pub(super) struct Scores {
    /// `E[h_j^2] |D_j|^2`
    pub(super) energy: Vec<f64>,
    /// Whether it carries massive activations: always on, never refitted.
    pub(super) guarded: Vec<bool>,
    /// The median of `|y|`.
    pub(super) median: f32,
}

impl Scores {
    /// Ranks the neurons by their contribution, guarded ones first.
    pub(super) fn ranked(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.energy.len()).collect();
        order.sort_by(|x, y| {
            let guarded = self.guarded[*y].cmp(&self.guarded[*x]);
            guarded.then(self.energy[*y].total_cmp(&self.energy[*x])).then(x.cmp(y))
        });
        order
    }

    /// Lists the tokens of a batch that statistics use: not the first of a window, and none with a massive output.
    pub(super) fn plain_tokens(&self, observed: &Observed) -> Vec<u32> {
        let plain =
            |token: &usize| !observed.first[*token] && observed.norms[*token] <= MASSIVE * self.median;
        (0..observed.norms.len()).filter(plain).map(|token| token as u32).collect()
    }

    /// Computes the weight of each token in a fit; tokens with large outputs weigh less.
    pub(super) fn weights(&self, norms: &[f32]) -> Vec<f32> {
        norms.iter().map(|norm| (LARGE * self.median / norm.max(f32::MIN_POSITIVE)).min(1.0)).collect()
    }
}

/// The norm of each column of `down [hidden, neurons]`.
pub(super) fn column_norms(down: &Tensor) -> Result<Vec<f32>> {
    values(&down.sqr()?.sum_keepdim(0)?.sqrt()?)
}

/// Inputs and energies of neurons on the tokens that statistics are taken of.
#[derive(Debug, Clone)]
pub(super) struct Evidence {
    /// `[tokens, hidden]`, f32.
    pub(super) x: Tensor,
    /// `h_j^2 |D_j|^2` of the chosen neurons, `[tokens, chosen]`; those above the width are zero.
    pub(super) energy: Tensor,
}

impl Evidence {
    /// Collects inputs and energies of the neurons `chosen` on the plain tokens of the batches. With `evened`, each token's
    /// energies are divided by the root of their sum. A token of large outputs then counts more than others, but not by the
    /// square of its outputs, because the next norm makes it as large as the others.
    pub(super) fn of(
        batches: &[Observed],
        scores: &Scores,
        columns: &[f32],
        chosen: &[usize],
        evened: bool,
    ) -> Result<Self> {
        let plain: Vec<Vec<u32>> = batches.iter().map(|observed| scores.plain_tokens(observed)).collect();
        let count: usize = plain.iter().map(Vec::len).sum();
        let (mut inputs, mut energies) = (Vec::new(), Vec::with_capacity(count * chosen.len()));
        for (observed, tokens) in batches.iter().zip(plain) {
            if tokens.is_empty() {
                continue;
            }
            let index = Tensor::new(tokens.as_slice(), observed.x.device())?;
            inputs.push(observed.x.index_select(&index, 0)?.to_dtype(DType::F32)?);
            energies.extend(energies_of(&observed.h, &tokens, columns, chosen)?);
        }
        if evened {
            energies.par_chunks_mut(chosen.len()).for_each(|energies| {
                let root = energies.iter().sum::<f32>().sqrt().max(f32::MIN_POSITIVE);
                energies.iter_mut().for_each(|energy| *energy /= root);
            });
        }
        let x = if inputs.is_empty() {
            Tensor::zeros((0, 1), DType::F32, &candle_core::Device::Cpu)?
        } else {
            Tensor::cat(&inputs, 0)?
        };
        Ok(Self { x, energy: matrix(energies, chosen.len())? })
    }
}

/// `h_j^2 |D_j|^2` of some neurons on some tokens.
pub(super) fn energies_of(h: &Tensor, tokens: &[u32], columns: &[f32], chosen: &[usize]) -> Result<Vec<f32>> {
    let (h, width) = (values(h)?, columns.len());
    let mut energies = vec![0f32; tokens.len() * chosen.len()];
    energies.par_chunks_mut(chosen.len()).zip(tokens).for_each(|(energies, token)| {
        let row = &h[*token as usize * width..][..width];
        for (energy, neuron) in energies.iter_mut().zip(chosen) {
            *energy = row.get(*neuron).map_or(0.0, |h| (h * columns[*neuron]).powi(2));
        }
    });
    Ok(energies)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn observed(h: &[[f32; 3]]) -> Observed {
        let h = Tensor::from_slice(h.as_flattened(), (h.len(), 3), &Device::Cpu).unwrap();
        let tokens = h.dim(0).unwrap();
        Observed { x: h.clone(), y: h.clone(), h, norms: vec![1.0; tokens], first: vec![false; tokens] }
    }

    #[test]
    fn evened_energies_count_by_the_root_of_their_sum() {
        let scores = Scores { energy: vec![1.0; 3], guarded: vec![false; 3], median: 1.0 };
        let batches = [observed(&[[3.0, 4.0, 0.0], [0.0; 3]]), observed(&[[30.0, 40.0, 0.0]])];
        // A neuron that is none has no energy.
        let of = |evened| Evidence::of(&batches, &scores, &[1.0; 3], &[0, 1, 7], evened).unwrap();
        let rows = |evidence: Evidence| evidence.energy.to_vec2::<f32>().unwrap();
        assert_eq!(rows(of(false)), [[9.0, 16.0, 0.0], [0.0; 3], [900.0, 1600.0, 0.0]]);
        let root = |sum: f32, value: f32| value / sum.sqrt();
        assert_eq!(
            rows(of(true)),
            [[root(25., 9.), root(25., 16.), 0.0], [0.0; 3], [root(2500., 900.), root(2500., 1600.), 0.0]]
        );
        let mut massive = observed(&[[1.0; 3]]);
        massive.norms = vec![100.0];
        let none = Evidence::of(&[massive], &scores, &[1.0; 3], &[0, 1], true).unwrap();
        assert_eq!(none.energy.dim(0).unwrap(), 0);
    }
}
