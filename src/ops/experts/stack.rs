//! The low-rank terms of all experts as one low-rank term over all tokens.
//!
//! On the side where a layer meets tokens, its rows are the tokens' as often as they have experts, and a product of a few
//! columns over so many rows waits for memory. Where ranks are small, the pairs of all experts below one another make a
//! product that is as wide as an ordinary one, over the tokens: more arithmetic, of which most meets zeros, and much less to
//! read. Where it turns was measured: 8 experts with rank 16 train 5% faster apart, 32 with rank 4 2% (in f32 10%) faster as
//! one, and with rank 8 either way is as fast.

use candle_core::{DType, Tensor};

use super::{Groups, Inners, Layer, Pass, rows};
use crate::error::Result;
use crate::ops::{Gradients, LowRank, Op, groups, matmul_f32, scaled_matmul_f32};

/// So many experts for each one that a token goes to are worth it.
const MOST_FOR_EACH: usize = 8;

/// From this rank on they are not.
const WIDE_RANK: usize = 8;

/// Whether the low-rank terms of so many experts, all of `rank` and without dropout, become one, where a token goes to
/// `active`.
#[must_use]
pub fn is_stacked(experts: usize, active: usize, rank: usize) -> bool {
    experts <= MOST_FOR_EACH * active && rank < WIDE_RANK
}

/// Pairs of one rank and scale, below one another.
pub(super) struct Stack<'l> {
    pairs: Vec<&'l LowRank>,
    rank: usize,
    scale: f64,
    /// Where the ranks of a layer begin: of each kind, of each expert.
    starts: Vec<Vec<Option<usize>>>,
}

impl<'l> Stack<'l> {
    /// That of layers that meet the same tokens, if it can be and is worth it.
    pub(super) fn of(kinds: &[&[Layer<'l>]], groups: &Groups, pass: &Pass<'_>) -> Option<Self> {
        let mut pairs: Vec<&LowRank> = Vec::new();
        let mut start = |layer: &Layer<'l>| {
            let low_rank = layer.low_rank?;
            pairs.push(low_rank);
            Some(pairs.len() - 1)
        };
        let mut starts: Vec<Vec<Option<usize>>> =
            kinds.iter().map(|layers| layers.iter().map(&mut start).collect()).collect();
        let first = *pairs.first()?;
        let rank = first.rank();
        let alike = |pair: &&LowRank| {
            let on_cpu = pair.a.tensor().device().is_cpu();
            on_cpu && pair.rank() == rank && pair.scale == first.scale && !pair.dropout.drops(pass)
        };
        if !is_stacked(groups.len(), groups.active(), rank) || !pairs.iter().all(alike) {
            return None;
        }
        starts.iter_mut().flatten().flatten().for_each(|start| *start *= rank);
        Some(Self { pairs, rank, scale: first.scale, starts })
    }

    /// `[all ranks, in]`
    pub(super) fn a(&self) -> Result<Tensor> {
        Ok(Tensor::cat(&self.pairs.iter().map(|pair| pair.a.tensor()).collect::<Vec<_>>(), 0)?)
    }

    /// `[out, all ranks]`
    fn b(&self) -> Result<Tensor> {
        Ok(Tensor::cat(&self.pairs.iter().map(|pair| pair.b.tensor()).collect::<Vec<_>>(), 1)?)
    }

    /// `u = scale x A^T` of each row, for `x [tokens, in]`.
    pub(super) fn inners(&self, x: &Tensor, groups: &Groups) -> Result<Inners> {
        let _time = Op::LowRank.begin();
        self.of_rows(&scaled_matmul_f32(self.scale, x, &self.a()?.t()?)?, groups)
    }

    /// `du = scale dy B` of each row, for `dy [tokens, out]`.
    pub(super) fn d_inners(&self, dy: &Tensor, groups: &Groups) -> Result<Inners> {
        let _time = Op::LowRank.begin();
        self.of_rows(&scaled_matmul_f32(self.scale, dy, &self.b()?)?, groups)
    }

    /// Of `[tokens, all ranks]` what belongs to each expert and its tokens.
    fn of_rows(&self, all: &Tensor, groups: &Groups) -> Result<Inners> {
        let kinds = self.starts.iter().map(|starts| groups::take_columns(all, starts, self.rank, groups));
        let kinds: Vec<Tensor> = kinds.collect::<Result<_>>()?;
        let of_expert = |expert: usize| {
            let part = |(of_rows, starts): (&Tensor, &Vec<Option<usize>>)| {
                starts[expert].map(|_| rows(of_rows, groups, expert)).transpose()
            };
            kinds.iter().zip(&self.starts).map(part).collect::<Result<Vec<_>>>()
        };
        (0..groups.len()).map(of_expert).collect()
    }

    /// Of what belongs to each row `[tokens, all ranks]` in `dtype`, times `factors` of the rows.
    pub(super) fn of_tokens(
        &self,
        inners: &Inners,
        groups: &Groups,
        factors: Option<&[f32]>,
        dtype: DType,
    ) -> Result<Tensor> {
        let _time = Op::LowRank.begin();
        let mut parts = Vec::with_capacity(groups.len());
        for (expert, inners) in inners.iter().enumerate() {
            let of_kinds = inners.iter().zip(&self.starts);
            let placed = of_kinds.filter_map(|(inner, starts)| Some((starts[expert]?, inner.as_ref()?)));
            parts.push(placed.collect());
        }
        groups::put_columns(&parts, self.pairs.len() * self.rank, groups, factors, dtype)
    }

    /// Whether any gradient of `A` is wanted.
    pub(super) fn wants_a(&self, gradients: &Gradients) -> bool {
        self.pairs.iter().any(|pair| gradients.wants(&pair.a))
    }

    /// `dA = du^T x` of each pair, where wanted: `du [tokens, all ranks]`.
    pub(super) fn a_gradients(&self, du: &Tensor, x: &Tensor, gradients: &mut Gradients) -> Result<()> {
        let _time = Op::LowRank.begin();
        let all = matmul_f32(&du.t()?, x)?; // [all ranks, in]
        for (index, pair) in self.pairs.iter().enumerate() {
            gradients.add(&pair.a, &all.narrow(0, index * self.rank, self.rank)?)?;
        }
        Ok(())
    }

    /// `dB = dy^T u` of each pair, where wanted: `u [tokens, all ranks]`.
    pub(super) fn b_gradients(&self, dy: &Tensor, u: &Tensor, gradients: &mut Gradients) -> Result<()> {
        let _time = Op::LowRank.begin();
        if !self.pairs.iter().any(|pair| gradients.wants(&pair.b)) {
            return Ok(());
        }
        let all = matmul_f32(&dy.t()?, u)?; // [out, all ranks]
        for (index, pair) in self.pairs.iter().enumerate() {
            gradients.add(&pair.b, &all.narrow(1, index * self.rank, self.rank)?.contiguous()?)?;
        }
        Ok(())
    }
}
