//! Tokens grouped by the expert they go to: one row for each token and expert, those of an expert side by side.
//!
//! `x` is `[tokens, d]`, grouped rows are `[rows, d]`. [`gather`] of all rows and [`sum`] are each other's backward; [`combine`] is
//! `y[t] = sum over the rows r of t of weight[r] x[r]`. What else is added to the tokens is added in the same pass.

use std::ops::Range;

use candle_core::{DType, Tensor};

use super::Op;
use super::kernel::{Element, Values, ask_for, dispatch, for_rows, to_tensor, vectorized, written};
use crate::error::{Error, Result};

/// Rows that are asked for before it is their turn.
const AHEAD: usize = 2;

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
    ///
    /// # Panics
    ///
    /// Where `chosen` is not `active` choices for each token, or names an expert that is not there.
    #[must_use]
    pub fn new(chosen: &[u32], active: usize, experts: usize) -> Self {
        let whole = if active == 0 { chosen.is_empty() } else { chosen.len().is_multiple_of(active) };
        assert!(whole, "{} choices of {active} experts for each token", chosen.len());
        let mut offsets = vec![0; experts + 1];
        for expert in chosen.iter().filter(|expert| **expert != Self::NO_ROW) {
            assert!((*expert as usize) < experts, "expert {expert} of {experts}");
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

    /// Experts of a token.
    #[must_use]
    pub fn active(&self) -> usize {
        self.rows.len() / self.num_tokens.max(1)
    }

    /// The rows of a token, in the order of its choices.
    fn rows_of(&self, token: usize) -> &[u32] {
        let active = self.active();
        &self.rows[token * active..][..active]
    }

    fn expert_of(&self, row: usize) -> usize {
        self.offsets.partition_point(|start| *start <= row) - 1
    }

    /// What belongs to each row of `of_choices [tokens * active]`.
    #[must_use]
    pub fn weights_of_rows(&self, of_choices: &[f32]) -> Vec<f32> {
        let mut of_rows = vec![0.0; self.num_rows()];
        for (row, weight) in self.rows.iter().zip(of_choices) {
            if *row != Self::NO_ROW {
                of_rows[*row as usize] = *weight;
            }
        }
        of_rows
    }

    /// What belongs to each choice, `[tokens * active]`; zero for one that was dropped.
    #[must_use]
    pub fn of_choices(&self, of_rows: &[f32]) -> Vec<f32> {
        self.rows.iter().map(|row| if *row == Self::NO_ROW { 0.0 } else { of_rows[*row as usize] }).collect()
    }
}

/// `y[r] = x[token of r]` of some rows, `[rows, d]`.
pub fn gather(x: &Tensor, groups: &Groups, rows: Range<usize>) -> Result<Tensor> {
    let tokens = &groups.tokens()[rows];
    if !x.device().is_cpu() {
        return Ok(x.index_select(&Tensor::new(tokens, x.device())?, 0)?);
    }
    let _time = Op::Experts.begin();
    let x = x.contiguous()?;
    dispatch!(x.dtype(), gathered(&x, tokens))
}

/// `y[t] = sum of others[t] + sum over the rows r of t of x[r]`, `[tokens, d]`; see [`combine`].
pub fn sum(x: &[Tensor], groups: &Groups, others: &[&Tensor]) -> Result<Tensor> {
    combine(x, &vec![1.0; groups.rows.len()], groups, others)
}

/// `y[t] = sum of others[t] + sum over the rows r of t of weight[r] x[r]`, `[tokens, d]`, where the rows are those of all parts
/// of `x` below one another, and `weights [tokens * active]` are those of the choices. All of one type; added in f32 and
/// rounded once.
pub fn combine(x: &[Tensor], weights: &[f32], groups: &Groups, others: &[&Tensor]) -> Result<Tensor> {
    let _time = Op::Experts.begin();
    let Some(first) = x.first() else { return Err(Error::invalid("a sum of no rows")) };
    if !first.device().is_cpu() {
        let rows = Tensor::cat(x, 0)?.to_dtype(DType::F32)?;
        let mut y = reference(&rows, &Tensor::new(weights, first.device())?, groups)?;
        for other in others {
            y = (y + other.to_dtype(DType::F32)?)?;
        }
        return Ok(y.to_dtype(first.dtype())?);
    }
    dispatch!(first.dtype(), combined(x, weights, groups, others))
}

/// `<x[r], y[r]>` of each row, summed in f32: two tensors `[rows, d]`.
pub fn row_products(x: &Tensor, y: &Tensor) -> Result<Vec<f32>> {
    let _time = Op::Experts.begin();
    if !x.device().is_cpu() {
        let products = (x.to_dtype(DType::F32)? * y.to_dtype(DType::F32)?)?;
        return Ok(products.sum(1)?.to_vec1()?);
    }
    let (x, y) = (x.contiguous()?, y.contiguous()?);
    dispatch!(x.dtype(), products(&x, &y))
}

/// `factor[r] x[r]`, `[rows, d]`.
pub fn scale_rows(x: &Tensor, factors: &[f32]) -> Result<Tensor> {
    let _time = Op::Experts.begin();
    if !x.device().is_cpu() {
        let factors = Tensor::new(factors, x.device())?.unsqueeze(1)?;
        return Ok(x.to_dtype(DType::F32)?.broadcast_mul(&factors)?.to_dtype(x.dtype())?);
    }
    let x = x.contiguous()?;
    dispatch!(x.dtype(), scaled(&x, factors))
}

/// Of `x [tokens, columns]` in f32 the `width` columns that each expert has from `starts[expert]` on, for its rows:
/// `[rows, width]`, zero where it has none. On the CPU.
pub(super) fn take_columns(
    x: &Tensor,
    starts: &[Option<usize>],
    width: usize,
    groups: &Groups,
) -> Result<Tensor> {
    let x = x.contiguous()?;
    let (values, columns) = (Values::<f32>::of(&x)?, x.dim(1)?);
    let values: &[f32] = &values;
    let y = written(groups.num_rows() * width, |y| {
        for_rows(y, width, |row, y| match starts[groups.expert_of(row)] {
            Some(start) => {
                y.copy_from_slice(&values[groups.tokens[row] as usize * columns + start..][..width]);
            }
            None => y.fill(0.0),
        });
    });
    to_tensor(y, &[groups.num_rows(), width])
}

/// The other way: `[tokens, columns]` in `dtype`, where each expert's parts `[rows of the expert, width]` in f32 stand from
/// their column on, times `factors` of the rows, and zeros elsewhere. On the CPU.
pub(super) fn put_columns(
    parts: &[Vec<(usize, &Tensor)>],
    columns: usize,
    groups: &Groups,
    factors: Option<&[f32]>,
    dtype: DType,
) -> Result<Tensor> {
    dispatch!(dtype, put(parts, columns, groups, factors))
}

fn put<'t, T: Element>(
    parts: &[Vec<(usize, &'t Tensor)>],
    columns: usize,
    groups: &Groups,
    factors: Option<&[f32]>,
) -> Result<Tensor> {
    let mut values = Vec::with_capacity(parts.len());
    for parts in parts {
        let open = |(start, x): &(usize, &'t Tensor)| Ok((*start, x.dim(1)?, Values::<f32>::of(x)?));
        values.push(parts.iter().map(open).collect::<Result<Vec<_>>>()?);
    }
    let y = written(groups.num_tokens * columns, |y| {
        for_rows(y, columns, |token, y: &mut [T]| {
            y.fill(T::zero());
            for row in groups.rows_of(token).iter().filter(|row| **row != Groups::NO_ROW) {
                let row = *row as usize;
                let (expert, factor) = (groups.expert_of(row), factors.map_or(1.0, |factors| factors[row]));
                for (start, width, values) in &values[expert] {
                    let from = &values[(row - groups.offsets[expert]) * width..][..*width];
                    for (y, x) in y[*start..].iter_mut().zip(from) {
                        *y = T::narrow(x * factor);
                    }
                }
            }
        });
    });
    to_tensor(y, &[groups.num_tokens, columns])
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

/// What belongs to a token: the rows of its choices and their weights, and where its own row begins.
struct OfToken<'a> {
    rows: &'a [u32],
    weights: &'a [f32],
    start: usize,
}

vectorized! {
    fn sum_row<T: Element>(y: &mut [T], x: &[&[T]], token: &OfToken<'_>, others: &[&[T]]) {
        /// Columns whose sums stay in registers.
        const COLUMNS: usize = 64;

        for (chunk, y) in y.chunks_mut(COLUMNS).enumerate() {
            let (column, width) = (chunk * COLUMNS, y.len());
            let mut sums = [0f32; COLUMNS];
            for other in others {
                for (sum, x) in sums.iter_mut().zip(&other[token.start + column..][..width]) {
                    *sum += x.widen();
                }
            }
            for (row, weight) in token.rows.iter().zip(token.weights) {
                if *row == Groups::NO_ROW {
                    continue;
                }
                for (sum, x) in sums.iter_mut().zip(&x[*row as usize][column..][..width]) {
                    *sum = x.widen().mul_add(*weight, *sum);
                }
            }
            for (y, sum) in y.iter_mut().zip(sums) {
                *y = T::narrow(sum);
            }
        }
    }
}

vectorized! {
    pub(super) fn dot<T: Element>(x: &[T], y: &[T]) -> f32 {
        super::kernel::sum_of_pairs(x, y, |x, y| x * y)
    }
}

fn gathered<T: Element>(x: &Tensor, tokens: &[u32]) -> Result<Tensor> {
    let (values, d) = (Values::<T>::of(x)?, x.dim(1)?);
    let values: &[T] = &values;
    let y = written(tokens.len() * d, |y| {
        let of_token = |token: u32| &values[token as usize * d..][..d];
        for_rows(y, d, |row, y| {
            if let Some(token) = tokens.get(row + AHEAD) {
                ask_for(of_token(*token), d);
            }
            y.copy_from_slice(of_token(tokens[row]));
        });
    });
    to_tensor(y, &[tokens.len(), d])
}

fn scaled<T: Element>(x: &Tensor, factors: &[f32]) -> Result<Tensor> {
    let (values, d) = (Values::<T>::of(x)?, x.dim(1)?);
    let values: &[T] = &values;
    let y = written(values.len(), |y| {
        for_rows(y, d, |row, y| scale_row(y, &values[row * d..][..d], factors[row]));
    });
    to_tensor(y, x.dims())
}

fn combined<T: Element>(
    x: &[Tensor],
    weights: &[f32],
    groups: &Groups,
    others: &[&Tensor],
) -> Result<Tensor> {
    let d = x[0].dim(1)?;
    let parts: Vec<Tensor> = x.iter().map(|part| part.contiguous()).collect::<Result<_, _>>()?;
    let parts: Vec<Values<'_, T>> = parts.iter().map(Values::of).collect::<Result<_>>()?;
    let x: Vec<&[T]> = parts.iter().flat_map(|part| part.chunks_exact(d)).collect();
    if x.len() != groups.num_rows() {
        return Err(Error::invalid(format!("{} rows of {}", x.len(), groups.num_rows())));
    }
    let others: Vec<Tensor> = others.iter().map(|other| other.contiguous()).collect::<Result<_, _>>()?;
    let others: Vec<Values<'_, T>> = others.iter().map(Values::of).collect::<Result<_>>()?;
    let others: Vec<&[T]> = others.iter().map(|other| &**other).collect();
    let active = groups.active();
    let y = written(groups.num_tokens * d, |y| {
        for_rows(y, d, |token, y| {
            if token + AHEAD < groups.num_tokens {
                let rows = groups.rows_of(token + AHEAD).iter().filter(|row| **row != Groups::NO_ROW);
                rows.for_each(|row| ask_for(x[*row as usize], d));
            }
            let (rows, weights) = (groups.rows_of(token), &weights[token * active..][..active]);
            sum_row(y, &x, &OfToken { rows, weights, start: token * d }, &others);
        });
    });
    to_tensor(y, &[groups.num_tokens, d])
}

fn products<T: Element>(x: &Tensor, y: &Tensor) -> Result<Vec<f32>> {
    let (xs, ys, d) = (Values::<T>::of(x)?, Values::<T>::of(y)?, x.dim(1)?);
    let (xs, ys): (&[T], &[T]) = (&xs, &ys);
    let mut products = vec![0f32; x.dim(0)?];
    for_rows(&mut products, 1, |row, product| {
        product[0] = dot(&xs[row * d..][..d], &ys[row * d..][..d]);
    });
    Ok(products)
}
