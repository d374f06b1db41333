//! The backward on the CPU.

use std::ops::Range;

use candle_core::Tensor;

use super::{Block, Columns, Heads, Saved, Scratch, blocks, for_each_with_scratch, hide, part, scale_into};
use crate::error::Result;
use crate::ops::Documents;
use crate::ops::kernel::{
    Disjoint, Element, Matrix, Values, exp, for_rows, product, sum_of_pairs, to_tensor, vectorized, written,
};

/// Queries of a block in the backward.
const BACKWARD_ROWS: usize = 128;

/// A task is one query head of one document: what it adds to the gradients of its keys and values stays apart until all
/// heads that share them are done, then it is summed in their order.
pub(super) fn backward_blocks<T: Element>(
    saved: &Saved,
    heads: &Heads,
    documents: &Documents,
    d_o: &Tensor,
) -> Result<(Tensor, Tensor, Tensor)> {
    let (tokens, d, group) = (saved.q.dim(0)?, heads.head_dim, heads.group());
    let (qs, ks, vs) = (Values::<T>::of(&saved.q)?, Values::<T>::of(&saved.k)?, Values::<T>::of(&saved.v)?);
    let (os, d_os) = (Values::<T>::of(&saved.o)?, Values::<T>::of(d_o)?);
    let [qs, os, d_os] = [&qs, &os, &d_os].map(|x| Columns::<T>::new(x, heads.num_heads, d));
    let [ks, vs] = [&ks, &vs].map(|x| Columns::<T>::new(x, heads.num_kv_heads, d));
    let mut tasks: Vec<(Range<usize>, usize)> = documents
        .ranges()
        .flat_map(|range| (0..heads.num_heads).map(move |head| (range.clone(), head)))
        .collect();
    tasks.sort_by_key(|(range, _)| std::cmp::Reverse(range.len()));
    // `[heads, tokens, d]` each.
    let parts = heads.num_heads * tokens * d;
    let (mut dks, mut dvs) = (Vec::new(), Vec::new());
    let compute_all = |dq: &mut [T], dks: &mut [f32], dvs: &mut [f32]| {
        let [dk_parts, dv_parts] = [dks, dvs].map(Disjoint::new);
        let dq = Disjoint::new(dq);
        let compute = |scratch: &mut Scratch<T>, (range, head): &(Range<usize>, usize)| {
            let (first, len, head, kv_head) = (range.start, range.len(), *head, head / group);
            let own = (head * tokens + first) * d;
            // SAFETY: the rows of this document in this head belong to this task alone.
            let (dk, dv) = unsafe { (dk_parts.part(own, len * d), dv_parts.part(own, len * d)) };
            if heads.window.is_some() {
                dk.fill(0.0);
                dv.fill(0.0);
            }
            // The last block sees all keys, if there is no window: it writes what the others add to.
            let mut blocks: Vec<Block> = blocks(heads, len, 0, BACKWARD_ROWS).collect();
            blocks.reverse();
            for (number, block) in blocks.into_iter().enumerate() {
                let beta = if number == 0 && heads.window.is_none() { 0.0 } else { 1.0 };
                let (rows, width) = (block.rows(), block.width());
                let (queries, keys) = (first + block.from, first + block.low);
                let (q, d_o) = (qs.head(queries, rows, head), d_os.head(queries, rows, head));
                let (k, v) = (ks.head(keys, width, kv_head), vs.head(keys, width, kv_head));
                let scores = part(&mut scratch.scores, rows * width);
                let dp = part(&mut scratch.slopes, rows * width);
                product(scores, 0.0, 1.0, q, k.t());
                product(dp, 0.0, 1.0, d_o, v.t());
                let (p, ds) = (part(&mut scratch.p, rows * width), part(&mut scratch.ds, rows * width));
                for row in 0..rows {
                    let seen = block.seen(row, 0, heads);
                    let token = queries + row;
                    let dot = dot(d_os.row(token, head), os.row(token, head));
                    let all = row * width..(row + 1) * width;
                    weights_and_slopes(
                        &mut p[all.clone()],
                        &mut ds[all.clone()],
                        &mut scores[all.clone()],
                        &dp[all],
                        seen,
                        heads.scale as f32,
                        saved.logsumexp[head * tokens + token],
                        dot,
                    );
                }
                let (p, ds) = (Matrix::rows(p, rows, width, width), Matrix::rows(ds, rows, width, width));
                let out = part(&mut scratch.rows, rows * d);
                product(out, 0.0, 1.0, ds, k);
                for (row, out) in out.chunks_exact(d).enumerate() {
                    // SAFETY: every task writes its own tokens in the columns of its own head.
                    let dq = unsafe { dq.part(((queries + row) * heads.num_heads + head) * d, d) };
                    scale_into(dq, out, heads.scale as f32);
                }
                let keys = block.low * d..block.high * d;
                product(&mut dk[keys.clone()], beta, 1.0, ds.t(), q);
                product(&mut dv[keys], beta, 1.0, p.t(), d_o);
            }
        };
        for_each_with_scratch(&tasks, compute);
    };
    let dq = written(qs.values.len(), |dq| {
        dks = written(parts, |dks| dvs = written(parts, |dvs| compute_all(dq, dks, dvs)));
    });
    let shape = saved.k.dims();
    let (dk, dv) = (
        sum_of_heads::<T>(&dks, heads, tokens, heads.scale as f32),
        sum_of_heads::<T>(&dvs, heads, tokens, 1.0),
    );
    Ok((to_tensor(dq, saved.q.dims())?, to_tensor(dk, shape)?, to_tensor(dv, shape)?))
}

/// `[heads, tokens, d]` to `[tokens, kv_heads * d]`: query heads of one key head summed in their order, times `scale`.
fn sum_of_heads<T: Element>(parts: &[f32], heads: &Heads, tokens: usize, scale: f32) -> Vec<T> {
    let (d, group) = (heads.head_dim, heads.group());
    written(tokens * heads.num_kv_heads * d, |sums| {
        for_rows(sums, heads.num_kv_heads * d, |token, row| {
            for (kv_head, sum) in row.chunks_exact_mut(d).enumerate() {
                let first = (kv_head * group * tokens + token) * d;
                sum_rows(sum, &parts[first..], tokens * d, group, scale);
            }
        });
    })
}

vectorized! {
    /// `sum = scale (rows[0] + rows[1] + ..)`, `count` rows whose beginnings are `apart`.
    fn sum_rows<T: Element>(sum: &mut [T], rows: &[f32], apart: usize, count: usize, scale: f32) {
        const LANES: usize = 64;
        let d = sum.len();
        for start in (0..d).step_by(LANES) {
            let end = d.min(start + LANES);
            let mut lanes = [0.0f32; LANES];
            for row in 0..count {
                for (lane, value) in lanes.iter_mut().zip(&rows[row * apart + start..row * apart + end]) {
                    *lane += value;
                }
            }
            for (sum, lane) in sum[start..end].iter_mut().zip(&lanes) {
                *sum = T::narrow(scale * lane);
            }
        }
    }
}

vectorized! {
    fn dot<T: Element>(x: &[T], y: &[T]) -> f32 {
        sum_of_pairs(x, y, |x, y| x * y)
    }
}

vectorized! {
    /// `p = exp(scale score - logsumexp)` and `ds = p (dp - dot)` where it is seen, zeros elsewhere.
    fn weights_and_slopes<T: Element>(
        p: &mut [T],
        ds: &mut [T],
        scores: &mut [f32],
        dp: &[f32],
        seen: Range<usize>,
        scale: f32,
        logsumexp: f32,
        dot: f32,
    ) {
        let within = hide(scores, &seen);
        for zeros in [&mut p[..within.start], &mut ds[..within.start]] {
            zeros.fill(T::zero());
        }
        for zeros in [&mut p[within.end..], &mut ds[within.end..]] {
            zeros.fill(T::zero());
        }
        let (p, ds) = (&mut p[within.clone()], &mut ds[within.clone()]);
        for (((p, ds), score), dp) in p.iter_mut().zip(ds).zip(&scores[within.clone()]).zip(&dp[within]) {
            let weight = exp(scale * *score - logsumexp);
            *p = T::narrow(weight);
            *ds = T::narrow(weight * (dp - dot));
        }
    }
}
