//! What is decided for one layer: which neurons are shared, which expert has which, and the router.

use candle_core::{Device, Tensor};
use rayon::prelude::*;

use super::settings::SplitShape;
use super::solve::{Linear, matrix, values};
use crate::error::Result;

/// One layer, cut.
#[derive(Debug, Clone)]
pub(super) struct Slices {
    /// Neurons that are always on. A number that is no neuron of the network stands for one of zeros.
    pub(super) shared: Vec<usize>,
    /// The neurons of each expert.
    pub(super) experts: Vec<Vec<usize>>,
    /// What ranks experts: `[experts]` scores from the input.
    pub(super) router: Linear,
    /// The down projection, `[hidden, neurons]`: the dense one, or what it was fitted to.
    pub(super) down: Tensor,
    /// Experts of a token.
    pub(super) active: usize,
}

/// The neurons that are not shared, filled up with neurons of zeros.
pub(super) fn routed(shape: &SplitShape, shared: &[usize]) -> Vec<usize> {
    let mut is_shared = vec![false; shape.neurons.max(shape.width * (shape.shared + shape.routed))];
    shared.iter().for_each(|neuron| is_shared[*neuron] = true);
    (0..is_shared.len()).filter(|neuron| !is_shared[*neuron]).take(shape.width * shape.routed).collect()
}

impl Slices {
    /// `[tokens, neurons]` of ones and zeros: what the chosen experts, `[tokens * active]`, and the shared slices have.
    pub(super) fn mask(&self, chosen: &[u32], neurons: usize) -> Vec<f32> {
        let tokens = chosen.len() / self.active.max(1);
        let mut base = vec![0f32; neurons];
        self.shared.iter().filter(|neuron| **neuron < neurons).for_each(|neuron| base[*neuron] = 1.0);
        let mut mask = vec![0f32; tokens * neurons];
        mask.par_chunks_mut(neurons).zip(chosen.par_chunks(self.active)).for_each(|(mask, chosen)| {
            mask.copy_from_slice(&base);
            for expert in chosen {
                let own = self.experts[*expert as usize].iter().filter(|neuron| **neuron < neurons);
                own.for_each(|neuron| mask[*neuron] = 1.0);
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

    /// The experts of each token by the router, `[tokens * active]`.
    pub(super) fn choose(&self, x: &Tensor) -> Result<Vec<u32>> {
        Ok(top(&values(&self.router.apply(x)?)?, self.experts.len(), self.active))
    }

    /// Counts the tokens of these inputs that the router sends to each expert.
    pub(super) fn load<'a>(&self, inputs: impl Iterator<Item = &'a Tensor>) -> Result<Vec<usize>> {
        let mut load = vec![0; self.experts.len()];
        for x in inputs {
            self.choose(x)?.into_iter().for_each(|expert| load[expert as usize] += 1);
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

    #[test]
    fn a_mask_has_the_shared_and_the_chosen() {
        let slices = Slices {
            shared: vec![2, 6],
            experts: vec![vec![0, 1], vec![3, 5], vec![4, 7]],
            router: Linear { weight: vec![0.0; 3], bias: vec![0.0; 3] },
            down: Tensor::zeros((1, 6), candle_core::DType::F32, &Device::Cpu).unwrap(),
            active: 1,
        };
        assert_eq!(slices.mask(&[1, 2], 6), [0., 0., 1., 1., 0., 1., 0., 0., 1., 0., 1., 0.]);
    }
}
