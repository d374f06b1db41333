//! Ridge regression: normal equations from products of tensors, solved in f64 by Cholesky.

use candle_core::{DType, Device, Tensor};
use faer::linalg::solvers::{Llt, Solve};
use faer::{Mat, Side};

use crate::error::{Error, Result};
use crate::ops::{matmul, scores};

/// What a router's ridge adds to the diagonal, as a share of its mean.
const ROUTER_RIDGE: f64 = 1e-3;

/// The values of a matrix, row by row, in f32.
pub(super) fn values(matrix: &Tensor) -> Result<Vec<f32>> {
    Ok(matrix.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
}

/// A matrix of `columns` columns.
pub(super) fn matrix(values: Vec<f32>, columns: usize) -> Result<Tensor> {
    let rows = values.len() / columns;
    Ok(Tensor::from_vec(values, (rows, columns), &Device::Cpu)?)
}

/// The Cholesky factor of `gram + ridge * I`, of which `gram [n, n]` is given row by row.
pub(super) fn factor(gram: &[f32], n: usize, ridge: f64) -> Result<Llt<f64>> {
    let lifted = |i: usize, j: usize| f64::from(gram[i * n + j]) + if i == j { ridge } else { 0.0 };
    Mat::<f64>::from_fn(n, n, lifted).llt(Side::Lower).map_err(|_| {
        Error::invalid("the statistics of the calibration text are degenerate: a Gram matrix is not positive")
            .with_hint("give more, or more varied, calibration text")
    })
}

/// The solution of `(gram + ridge * I) x = right`, both `[n, columns]` row by row.
pub(super) fn solve(factor: &Llt<f64>, right: &[f32], columns: usize) -> Vec<f32> {
    let n = right.len() / columns.max(1);
    let mut x = Mat::<f64>::from_fn(n, columns, |i, j| f64::from(right[i * columns + j]));
    factor.solve_in_place(&mut x);
    (0..n * columns).map(|at| x[(at / columns, at % columns)] as f32).collect()
}

/// The mean of the diagonal of `gram [n, n]`.
pub(super) fn mean_diagonal(gram: &[f32], n: usize) -> f64 {
    (0..n).map(|i| f64::from(gram[i * n + i])).sum::<f64>() / n.max(1) as f64
}

/// A linear map with a bias for each output.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Linear {
    /// `[outputs, inputs]`, row by row.
    pub(super) weight: Vec<f32>,
    /// `[outputs]`
    pub(super) bias: Vec<f32>,
}

impl Linear {
    /// `[tokens, inputs] -> [tokens, outputs]`
    pub(super) fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let inputs = self.weight.len() / self.bias.len();
        let weight = matrix(self.weight.clone(), inputs)?;
        let bias = Tensor::new(self.bias.as_slice(), &Device::Cpu)?;
        Ok(scores(x, &weight)?.broadcast_add(&bias)?)
    }
}

/// Least squares with fixed inputs, which can be fitted to several sets of targets.
pub(super) struct Regression {
    /// `[tokens, inputs]`, without their mean where there is a bias.
    centred: Tensor,
    mean: Tensor,
    factor: Llt<f64>,
}

impl Regression {
    /// Prepares fits from the inputs `x [tokens, inputs]`.
    pub(super) fn new(x: &Tensor, with_bias: bool) -> Result<Self> {
        let n = x.dim(1)?;
        let mean = match with_bias {
            true => x.mean_keepdim(0)?,
            false => Tensor::zeros((1, n), DType::F32, &Device::Cpu)?,
        };
        let centred = x.broadcast_sub(&mean)?;
        let gram = values(&matmul(&centred.t()?, &centred)?)?;
        let factor = factor(&gram, n, ROUTER_RIDGE * mean_diagonal(&gram, n) + f64::MIN_POSITIVE)?;
        Ok(Self { centred, mean, factor })
    }

    /// Fits a linear map to the targets `y [tokens, outputs]`.
    pub(super) fn fit(&self, y: &Tensor) -> Result<Linear> {
        let outputs = y.dim(1)?;
        let right = values(&matmul(&self.centred.t()?, y)?)?; // [inputs, outputs]
        let solution = matrix(solve(&self.factor, &right, outputs), outputs)?;
        let at_mean = values(&matmul(&self.mean, &solution)?)?;
        let mean = values(&y.mean_keepdim(0)?)?;
        let has_bias = values(&self.mean)?.iter().any(|value| *value != 0.0);
        let bias = mean.iter().zip(at_mean).map(|(mean, at)| if has_bias { mean - at } else { 0.0 });
        Ok(Linear { bias: bias.collect(), weight: values(&solution.t()?.contiguous()?)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_linear_map_is_found_again() {
        let x = Tensor::rand(-1f32, 1.0, (400, 5), &Device::Cpu).unwrap();
        let map = Linear { weight: (0..15).map(|n| n as f32 - 7.0).collect(), bias: vec![1.0, -2.0, 0.5] };
        let found = Regression::new(&x, true).unwrap().fit(&map.apply(&x).unwrap()).unwrap();
        for (found, wanted) in found.weight.iter().zip(&map.weight).chain(found.bias.iter().zip(&map.bias)) {
            assert!((found - wanted).abs() < 0.05, "{found} for {wanted}");
        }
    }
}
