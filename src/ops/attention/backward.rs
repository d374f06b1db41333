//! The backward on the CPU.

use std::ops::Range;

use candle_core::Tensor;

use super::{Block, Columns, Heads, Saved, Scratch, blocks, for_each_with_scratch, hide, part, scale_into};
use crate::error::Result;
use crate::ops::Documents;
use crate::ops::kernel::{
    Disjoint, Element, Matrix, Values, exp, for_rows, product, sum_of_pairs, to_tensor, vectorized, written,
};

/// Rows of a block in the backward: queries times the query heads that share a key head.
const BACKWARD_ROWS: usize = 192;

/// As many tasks as query heads for each document: those of one key head take turns with its blocks of queries, in all heads
/// that share it. What a task adds to the gradients of keys and values stays apart until all are done, then it is summed in
/// their order.
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
    let size = (BACKWARD_ROWS / group).clamp(16, BACKWARD_ROWS);
    let mut tasks: Vec<(Range<usize>, usize)> = documents
        .ranges()
        .flat_map(|range| (0..heads.num_heads).map(move |part| (range.clone(), part)))
        .collect();
    tasks.sort_by_key(|(range, _)| std::cmp::Reverse(range.len()));
    // `[heads, tokens, d]` each.
    let parts = heads.num_heads * tokens * d;
    let (mut dks, mut dvs) = (Vec::new(), Vec::new());
    let compute_all = |dq: &mut [T], dks: &mut [f32], dvs: &mut [f32]| {
        let [dk_parts, dv_parts] = [dks, dvs].map(Disjoint::new);
        let dq = Disjoint::new(dq);
        let compute = |scratch: &mut Scratch<T>, (range, part_number): &(Range<usize>, usize)| {
            let (first, len, kv_head) = (range.start, range.len(), part_number / group);
            let own = (part_number * tokens + first) * d;
            // SAFETY: the rows of this document in this part belong to this task alone: `Documents` never overlap.
            let (dk, dv) = unsafe { (dk_parts.part(own, len * d), dv_parts.part(own, len * d)) };
            let blocks: Vec<Block> = blocks(heads, len, 0, size).collect();
            // The last block sees most keys, if there is no window: it writes what the others add to.
            let mut is_first = heads.window.is_none();
            let seen = blocks.iter().rev().skip(part_number % group).step_by(group);
            let end = seen.clone().next().filter(|_| is_first).map_or(0, |block| block.high);
            dk[end * d..].fill(0.0);
            dv[end * d..].fill(0.0);
            for block in seen {
                let beta = if std::mem::take(&mut is_first) { 0.0 } else { 1.0 };
                let (each, width) = (block.rows(), block.width());
                let rows = group * each;
                let token = |row: usize| first + block.from + row % each;
                let head = |row: usize| kv_head * group + row / each;
                let keys = first + block.low;
                let (k, v) = (ks.head(keys, width, kv_head), vs.head(keys, width, kv_head));
                let [q, d_o] = [(&qs, &mut scratch.q), (&d_os, &mut scratch.d_o)].map(|(all, own)| {
                    let own = part(own, rows * d);
                    for (row, own) in own.chunks_exact_mut(d).enumerate() {
                        own.copy_from_slice(all.row(token(row), head(row)));
                    }
                    Matrix::rows(own, rows, d, d)
                });
                let scores = part(&mut scratch.scores, rows * width);
                let dp = part(&mut scratch.slopes, rows * width);
                product(scores, 0.0, 1.0, q, k.t());
                product(dp, 0.0, 1.0, d_o, v.t());
                let (p, ds) = (part(&mut scratch.p, rows * width), part(&mut scratch.ds, rows * width));
                for row in 0..rows {
                    let (token, head) = (token(row), head(row));
                    let all = row * width..(row + 1) * width;
                    weights_and_slopes(
                        &mut p[all.clone()],
                        &mut ds[all.clone()],
                        &mut scores[all.clone()],
                        &dp[all],
                        block.seen(row % each, 0, heads),
                        heads.scale as f32,
                        saved.logsumexp[head * tokens + token],
                        dot(d_os.row(token, head), os.row(token, head)),
                    );
                }
                let (p, ds) = (Matrix::rows(p, rows, width, width), Matrix::rows(ds, rows, width, width));
                let out = part(&mut scratch.rows, rows * d);
                product(out, 0.0, 1.0, ds, k);
                for (row, out) in out.chunks_exact(d).enumerate() {
                    // SAFETY: every task writes its own tokens in the columns of its own heads, as above.
                    let dq = unsafe { dq.part((token(row) * heads.num_heads + head(row)) * d, d) };
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
        sum_of_parts::<T>(&dks, heads, tokens, heads.scale as f32),
        sum_of_parts::<T>(&dvs, heads, tokens, 1.0),
    );
    Ok((to_tensor(dq, saved.q.dims())?, to_tensor(dk, shape)?, to_tensor(dv, shape)?))
}

/// `[heads, tokens, d]` to `[tokens, kv_heads * d]`: the parts of one key head summed in their order, times `scale`.
fn sum_of_parts<T: Element>(parts: &[f32], heads: &Heads, tokens: usize, scale: f32) -> Vec<T> {
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
