//! The forward on the CPU. A task is a block of queries in all query heads that share a key head.

use std::ops::Range;

use candle_core::Tensor;

use super::{Block, Columns, Heads, Scratch, blocks, for_each_with_scratch, hide, part, scale_into};
use crate::error::Result;
use crate::ops::Documents;
use crate::ops::kernel::{
    Disjoint, Element, Matrix, Values, exp, largest, product, sum, to_tensor, vectorized, written,
};

/// Rows of a block in the forward: queries times the query heads that share a key head.
const FORWARD_ROWS: usize = 192;

/// Query heads that share a key head are computed together, so that their keys are read once.
pub(super) fn forward_blocks<T: Element>(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: &Heads,
    documents: &Documents,
) -> Result<(Tensor, Vec<f32>)> {
    let (tokens, d, start, group) = (q.dim(0)?, heads.head_dim, documents.start(), heads.group());
    let (qs, ks, vs) = (Values::<T>::of(q)?, Values::<T>::of(k)?, Values::<T>::of(v)?);
    let qs = Columns::<T>::new(&qs, heads.num_heads, d);
    let (ks, vs) =
        (Columns::<T>::new(&ks, heads.num_kv_heads, d), Columns::<T>::new(&vs, heads.num_kv_heads, d));
    let size = (FORWARD_ROWS / group).clamp(16, FORWARD_ROWS);
    let mut tasks: Vec<(usize, usize, Block)> = documents
        .ranges()
        .flat_map(|range| blocks(heads, range.len(), start, size).map(move |block| (range.start, block)))
        .flat_map(|(first, block)| (0..heads.num_kv_heads).map(move |kv_head| (first, kv_head, block)))
        .collect();
    // Large ones first, so that no thread is left with one at the end.
    tasks.sort_by_key(|(_, _, block)| std::cmp::Reverse(block.rows() * block.width()));
    let mut logsumexp = vec![0.0f32; heads.num_heads * tokens];
    let sums = Disjoint::new(&mut logsumexp);
    let o = written::<T>(qs.values.len(), |o| {
        let o = Disjoint::new(o);
        let compute = |scratch: &mut Scratch<T>, &(first, kv_head, block): &(usize, usize, Block)| {
            let (rows, width) = (block.rows(), block.width());
            let token = |row: usize| first + block.from + row % rows;
            let head = |row: usize| kv_head * group + row / rows;
            let q = part(&mut scratch.q, group * rows * d);
            for (row, q) in q.chunks_exact_mut(d).enumerate() {
                q.copy_from_slice(qs.row(token(row), head(row)));
            }
            let scores = part(&mut scratch.scores, group * rows * width);
            let keys = ks.head(first + block.low, width, kv_head);
            let q = Matrix::rows(q, group * rows, d, d);
            product(scores, 0.0, 1.0, q, keys.t());
            let p = part(&mut scratch.p, group * rows * width);
            let inverse = part(&mut scratch.inverse, group * rows);
            let rows_of_scores = scores.chunks_exact_mut(width);
            for (row, (p, scores)) in p.chunks_exact_mut(width).zip(rows_of_scores).enumerate() {
                let seen = block.seen(row % rows, start, heads);
                let (max, sum) = powers(p, scores, seen, heads.scale as f32);
                inverse[row] = 1.0 / sum;
                // SAFETY: a value for each head and token, and each pair belongs to one task: `Documents` never overlap.
                unsafe { sums.part(head(row) * tokens + token(row), 1)[0] = max + sum.ln() };
            }
            let out = part(&mut scratch.rows, group * rows * d);
            let values = vs.head(first + block.low, width, kv_head);
            product(out, 0.0, 1.0, Matrix::rows(p, group * rows, width, width), values);
            for (row, out) in out.chunks_exact(d).enumerate() {
                // SAFETY: every task writes its own tokens in the columns of its own heads, as above.
                let o = unsafe { o.part((token(row) * heads.num_heads + head(row)) * d, d) };
                scale_into(o, out, inverse[row]);
            }
        };
        for_each_with_scratch(&tasks, compute);
    });
    Ok((to_tensor(o, q.dims())?, logsumexp))
}

vectorized! {
    /// Writes `exp(scale (score - max))` where it is seen and zeros elsewhere: the largest score, scaled, and the sum.
    fn powers<T: Element>(p: &mut [T], scores: &mut [f32], seen: Range<usize>, scale: f32) -> (f32, f32) {
        let within = hide(scores, &seen);
        p[..within.start].fill(T::zero());
        p[within.end..].fill(T::zero());
        let (p, scores) = (&mut p[within.clone()], &scores[within]);
        let max = scale * largest(scores);
        for (p, score) in p.iter_mut().zip(scores) {
            *p = T::narrow(exp(scale * *score - max));
        }
        // What is divided by is the sum of what is multiplied with, rounding included.
        (max, sum(p, |p| p))
    }
}
