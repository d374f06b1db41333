//! Tokens grouped by the expert they go to: one row for each token and expert, those of an expert side by side.
//!
//! `x` is `[tokens, d]`, grouped rows are `[rows, d]`. [`gather`] and [`sum`] are each other's backward; [`combine`] is
//! `y[t] = sum over the rows r of t of weight[r] x[r]`.

use candle_core::{DType, Tensor};

use super::kernel::{Element, Values, dispatch, for_rows, to_tensor, vectorized, written};
use super::{Op, differentiate};
use crate::error::Result;

/// Which rows are whose.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Groups {
    /// Where the rows of each expert begin, and where the last end.
    offsets: Vec<usize>,
    /// The token of each row.
    tokens: Vec<u32>,
    /// The row of each choice, `[tokens * active]`; [`Groups::NO_ROW`] for one that was dropped.
    rows: Vec<u32>,
    num_tokens: usize,
}

impl Groups {
    /// Stands for the row of a choice that was dropped, and for its expert.
    pub const NO_ROW: u32 = u32::MAX;

    /// Groups `chosen [tokens * active]`, the experts of each token, by a counting sort: rows of an expert are in the
    /// order of their tokens. A choice of [`Groups::NO_ROW`] goes nowhere.
    #[must_use]
    pub fn new(chosen: &[u32], active: usize, experts: usize) -> Self {
        let mut offsets = vec![0; experts + 1];
        for expert in chosen.iter().filter(|expert| **expert != Self::NO_ROW) {
            offsets[*expert as usize + 1] += 1;
        }
        for expert in 0..experts {
            offsets[expert + 1] += offsets[expert];
        }
        let mut next = offsets.clone();
        let mut tokens = vec![0; offsets[experts]];
        let row_of = |(choice, expert): (usize, &u32)| {
            if *expert == Self::NO_ROW {
                return Self::NO_ROW;
            }
            let row = &mut next[*expert as usize];
            tokens[*row] = (choice / active) as u32;
            *row += 1;
            (*row - 1) as u32
        };
        let rows = chosen.iter().enumerate().map(row_of).collect();
        Self { offsets, tokens, rows, num_tokens: chosen.len() / active.max(1) }
    }

    /// Experts.
    #[must_use]
    pub fn len(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Whether there are no experts.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The rows of an expert.
    #[must_use]
    pub fn range(&self, expert: usize) -> std::ops::Range<usize> {
        self.offsets[expert]..self.offsets[expert + 1]
    }

    /// Rows of each expert.
    pub fn counts(&self) -> impl Iterator<Item = usize> + '_ {
        self.offsets.windows(2).map(|pair| pair[1] - pair[0])
    }

    /// Rows of all experts.
    #[must_use]
    pub fn num_rows(&self) -> usize {
        self.tokens.len()
    }

    /// The token of each row.
    #[must_use]
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The rows of a token, in the order of its choices.
    fn rows_of(&self, token: usize) -> &[u32] {
        let active = self.rows.len() / self.num_tokens.max(1);
        &self.rows[token * active..][..active]
    }
}

/// `y[r] = x[token of r]`, `[rows, d]`.
pub fn gather(x: &Tensor, groups: &Groups) -> Result<Tensor> {
    if !x.device().is_cpu() {
        return Ok(x.index_select(&Tensor::new(groups.tokens(), x.device())?, 0)?);
    }
    let x = x.contiguous()?;
    dispatch!(x.dtype(), gathered(&x, groups, None))
}

/// `y[t] = sum over the rows r of t of x[r]`, `[tokens, d]`; added in f32 and rounded once.
pub fn sum(x: &Tensor, groups: &Groups) -> Result<Tensor> {
    combine(x, &vec![1.0; groups.rows.len()], groups)
}

/// `[tokens, d]`; `weights [tokens * active]` are those of the choices. Added in f32 and rounded once.
pub fn combine(x: &Tensor, weights: &[f32], groups: &Groups) -> Result<Tensor> {
    let _time = Op::Experts.begin();
    if !x.device().is_cpu() {
        return reference(x, &Tensor::new(weights, x.device())?, groups);
    }
    let x = x.contiguous()?;
    dispatch!(x.dtype(), combined(&x, weights, groups))
}

/// `(dx, d_weights)` of [`combine`]: `dx[r] = weight[r] dy[t]`, and `d_weight[r] = <x[r], dy[t]>` where wanted, which is zero
/// for a choice that was dropped.
pub fn combine_backward(
    x: &Tensor,
    weights: &[f32],
    groups: &Groups,
    dy: &Tensor,
    wants_weights: bool,
) -> Result<(Tensor, Option<Vec<f32>>)> {
    let _time = Op::Experts.begin();
    if !x.device().is_cpu() {
        let both =
            differentiate(&[x, &Tensor::new(weights, x.device())?], dy, |v| reference(&v[0], &v[1], groups))?;
        return Ok((both[0].clone(), if wants_weights { Some(both[1].to_vec1()?) } else { None }));
    }
    let (x, dy) = (x.contiguous()?, dy.contiguous()?);
    let mut of_rows = vec![0.0; groups.num_rows()];
    for (row, weight) in groups.rows.iter().zip(weights) {
        if *row != Groups::NO_ROW {
            of_rows[*row as usize] = *weight;
        }
    }
    let dx = dispatch!(dy.dtype(), gathered(&dy, groups, Some(&of_rows)))?;
    let d_weights = if wants_weights { Some(dispatch!(x.dtype(), products(&x, groups, &dy))?) } else { None };
    Ok((dx, d_weights))
}

/// [`combine`] composed of candle primitives.
pub fn reference(x: &Tensor, weights: &Tensor, groups: &Groups) -> Result<Tensor> {
    let wide = x.to_dtype(DType::F32)?;
    let mut y = Tensor::zeros((groups.num_tokens, x.dim(1)?), DType::F32, x.device())?;
    let chosen: Vec<usize> =
        (0..groups.rows.len()).filter(|choice| groups.rows[*choice] != Groups::NO_ROW).collect();
    let list = |f: &dyn Fn(usize) -> u32| -> Result<Tensor> {
        let all: Vec<u32> = chosen.iter().map(|choice| f(*choice)).collect();
        Ok(Tensor::new(all, x.device())?)
    };
    let rows = list(&|choice| groups.rows[choice])?;
    let tokens = list(&|choice| groups.tokens[groups.rows[choice] as usize])?;
    let weights = weights.index_select(&list(&|choice| choice as u32)?, 0)?.unsqueeze(1)?;
    let parts = wide.index_select(&rows, 0)?.broadcast_mul(&weights)?;
    y = y.index_add(&tokens, &parts, 0)?;
    Ok(y.to_dtype(x.dtype())?)
}

vectorized! {
    fn scale_row<T: Element>(y: &mut [T], x: &[T], factor: f32) {
        for (y, x) in y.iter_mut().zip(x) {
            *y = T::narrow(x.widen() * factor);
        }
    }
}

vectorized! {
    fn add_row<T: Element>(y: &mut [f32], x: &[T], factor: f32) {
        for (y, x) in y.iter_mut().zip(x) {
            *y += x.widen() * factor;
        }
    }
}

vectorized! {
    fn dot<T: Element>(x: &[T], y: &[T]) -> f32 {
        super::kernel::sum_of_pairs(x, y, |x, y| x * y)
    }
}

fn gathered<T: Element>(x: &Tensor, groups: &Groups, factors: Option<&[f32]>) -> Result<Tensor> {
    let (values, d) = (Values::<T>::of(x)?, x.dim(1)?);
    let values: &[T] = &values;
    let y = written(groups.num_rows() * d, |y| {
        for_rows(y, d, |row, y| {
            let from = &values[groups.tokens[row] as usize * d..][..d];
            match factors {
                None => y.copy_from_slice(from),
                Some(factors) => scale_row(y, from, factors[row]),
            }
        });
    });
    to_tensor(y, &[groups.num_rows(), d])
}

fn combined<T: Element>(x: &Tensor, weights: &[f32], groups: &Groups) -> Result<Tensor> {
    let (values, d) = (Values::<T>::of(x)?, x.dim(1)?);
    let values: &[T] = &values;
    let active = weights.len() / groups.num_tokens.max(1);
    let y = written(groups.num_tokens * d, |y| {
        for_rows(y, d, |token, y| {
            let mut sum = vec![0f32; d];
            for (row, weight) in groups.rows_of(token).iter().zip(&weights[token * active..][..active]) {
                if *row != Groups::NO_ROW {
                    add_row(&mut sum, &values[*row as usize * d..][..d], *weight);
                }
            }
            for (y, sum) in y.iter_mut().zip(sum) {
                *y = T::narrow(sum);
            }
        });
    });
    to_tensor(y, &[groups.num_tokens, d])
}

fn products<T: Element>(x: &Tensor, groups: &Groups, dy: &Tensor) -> Result<Vec<f32>> {
    let (values, dys, d) = (Values::<T>::of(x)?, Values::<T>::of(dy)?, x.dim(1)?);
    let (values, dys): (&[T], &[T]) = (&values, &dys);
    let active = groups.rows.len() / groups.num_tokens.max(1);
    let mut products = vec![0f32; groups.rows.len()];
    for_rows(&mut products, active, |token, products| {
        for (row, product) in groups.rows_of(token).iter().zip(products) {
            if *row != Groups::NO_ROW {
                *product = dot(&values[*row as usize * d..][..d], &dys[token * d..][..d]);
            }
        }
    });
    Ok(products)
}
