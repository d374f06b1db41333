//! The forward of one query whose keys and values lie in a cache, as in generating token by token: dot products over rows
//! where they lie, nothing packed. Keys are cut into chunks of a fixed size, each with a softmax of its own, which are joined
//! at the end. A chunk is a task for all heads, because what is next to each other in memory is read at once.

use candle_core::Tensor;
use rayon::prelude::*;

use super::Heads;
use crate::error::Result;
use crate::ops::kernel::{Element, Values, ask_for, exp, largest, sum, to_tensor, vectorized, written};

/// Keys of a chunk.
const CHUNK: usize = 64;
/// Multiply-adds from which on other threads are asked: less are done sooner than they are there.
const ALONE: usize = 1 << 17;
/// Products that are summed side by side.
const LANES: usize = 16;
/// Keys whose sums wait until all of them are folded.
const KEYS: usize = 16;
/// Keys between what is read and what is asked for.
const AHEAD: usize = 16;
/// Rows of values that are read for one head after the other: they stay in the L1 cache.
const ROWS: usize = 32;

/// `o [1, heads * d]` for the query at position `start`.
pub(super) fn forward_one<T: Element>(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: &Heads,
    start: usize,
) -> Result<Tensor> {
    let (d, seen) = (heads.head_dim, heads.sees(start));
    let (q_values, ks, vs) = (Values::<T>::of(q)?, Values::<T>::of(k)?, Values::<T>::of(v)?);
    let (ks, vs): (&[T], &[T]) = (&ks, &vs);
    let q_wide: Vec<f32> = q_values.iter().map(|q| q.widen()).collect();
    let stride = heads.num_kv_heads * d;
    // Of each chunk and query head: the largest score, the sum of the powers, and `d` values weighted with the powers.
    let width = d + 2;
    let mut parts = vec![0f32; seen.len().div_ceil(CHUNK) * heads.num_heads * width];
    let compute = |(chunk, parts): (usize, &mut [f32])| {
        let from = seen.start + chunk * CHUNK;
        let rows = from * stride..seen.end.min(from + CHUNK) * stride;
        attend(parts, &q_wide, &ks[rows.clone()], &vs[rows], heads);
    };
    if seen.len() * heads.num_heads * d < ALONE {
        parts.chunks_exact_mut(heads.num_heads * width).enumerate().for_each(compute);
    } else {
        parts.par_chunks_exact_mut(heads.num_heads * width).enumerate().for_each(compute);
    }
    let o = written::<T>(q_wide.len(), |o| {
        for (head, o) in o.chunks_exact_mut(d).enumerate() {
            join(o, parts.chunks_exact(width).skip(head).step_by(heads.num_heads));
        }
    });
    to_tensor(o, q.dims())
}

vectorized! {
    /// For each query head `[max, sum, d values]` in `parts`: of the scores, of `p = exp(score - max)`, and `p v`.
    fn attend<T: Element>(parts: &mut [f32], q: &[f32], k: &[T], v: &[T], heads: &Heads) {
        let (d, group) = (heads.head_dim, heads.group());
        let stride = heads.num_kv_heads * d;
        let keys = k.len() / stride;
        let mut scores = vec![0f32; heads.num_heads * keys];
        score(&mut scores, q, k, v, heads);
        let heads_of_parts = parts.chunks_exact_mut(d + 2);
        for (part, p) in heads_of_parts.zip(scores.chunks_exact_mut(keys)) {
            let max = largest(p);
            for p in p.iter_mut() {
                *p = exp(*p - max);
            }
            (part[0], part[1]) = (max, sum(p, |p| p));
        }
        for (block, rows) in v.chunks(ROWS * stride).enumerate() {
            let within = block * ROWS..block * ROWS + rows.len() / stride;
            for (head, part) in parts.chunks_exact_mut(d + 2).enumerate() {
                let p = &scores[head * keys..][within.clone()];
                mix(&mut part[2..], p, &rows[head / group * d..], stride);
            }
        }
    }
}

/// `scores [heads, keys] = scale q k^T`. Sums of several keys are kept in lanes and folded at once, by halves, because to fold
/// those of one takes longer than its products.
#[inline(always)]
fn score<T: Element>(scores: &mut [f32], q: &[f32], k: &[T], v: &[T], heads: &Heads) {
    let (d, group) = (heads.head_dim, heads.group());
    let stride = heads.num_kv_heads * d;
    let keys = k.len() / stride;
    let mut lanes = vec![0f32; heads.num_heads * KEYS * LANES];
    let mut half = vec![0f32; lanes.len() / 2];
    for (block, rows) in k.chunks(KEYS * stride).enumerate() {
        let count = rows.len() / stride;
        let (sums, _) = lanes.as_chunks_mut::<LANES>();
        for (key, row) in rows.chunks_exact(stride).enumerate() {
            let here = (block * KEYS + key) * stride;
            ask_for(&k[(here + AHEAD * stride).min(k.len())..], stride);
            ask_for(&v[here..], stride);
            for (kv_head, k) in row.chunks_exact(d).enumerate() {
                for head in kv_head * group..(kv_head + 1) * group {
                    multiply(&mut sums[head * KEYS + key], &q[head * d..][..d], k);
                }
            }
        }
        let mut len = lanes.len();
        for _ in 0..LANES.ilog2() / 2 {
            halve(&mut half[..len / 2], &lanes);
            halve(&mut lanes[..len / 4], &half);
            len /= 4;
        }
        for (scores, sums) in scores.chunks_exact_mut(keys).zip(lanes.chunks_exact(KEYS)) {
            for (score, sum) in scores[block * KEYS..][..count].iter_mut().zip(sums) {
                *score = heads.scale as f32 * sum;
            }
        }
    }
}

/// `q k`, in lanes that are still to be summed.
#[inline(always)]
fn multiply<T: Element>(lanes: &mut [f32; LANES], q: &[f32], k: &[T]) {
    let ((whole_q, rest_q), (whole_k, rest_k)) = (q.as_chunks::<LANES>(), k.as_chunks::<LANES>());
    let mut sums = [0f32; LANES];
    for (q, k) in whole_q.iter().zip(whole_k) {
        for lane in 0..LANES {
            sums[lane] += q[lane] * k[lane].widen();
        }
    }
    for (sum, (q, k)) in sums.iter_mut().zip(rest_q.iter().zip(rest_k)) {
        *sum += q * k.widen();
    }
    *lanes = sums;
}

/// The sums of pairs.
#[inline(always)]
fn halve(out: &mut [f32], x: &[f32]) {
    for (out, [a, b]) in out.iter_mut().zip(x.as_chunks::<2>().0) {
        *out = a + b;
    }
}

/// `out += p v` for rows of `v` that begin `stride` apart.
#[inline(always)]
fn mix<T: Element>(out: &mut [f32], p: &[f32], v: &[T], stride: usize) {
    /// Columns at once: what registers hold.
    const COLUMNS: usize = 64;

    let (whole, rest) = out.as_chunks_mut::<COLUMNS>();
    let end = COLUMNS * whole.len();
    for (block, out) in whole.iter_mut().enumerate() {
        let mut sums = *out;
        for (p, v) in p.iter().zip(v.chunks(stride)) {
            let (v, _) = v[block * COLUMNS..].as_chunks::<COLUMNS>();
            for (sum, v) in sums.iter_mut().zip(&v[0]) {
                *sum += p * v.widen();
            }
        }
        *out = sums;
    }
    for (p, v) in p.iter().zip(v.chunks(stride)) {
        for (out, v) in rest.iter_mut().zip(&v[end..]) {
            *out += p * v.widen();
        }
    }
}

/// The chunks of one head, each scaled to the largest score of all.
fn join<'a, T: Element>(o: &mut [T], parts: impl Iterator<Item = &'a [f32]> + Clone) {
    let max = parts.clone().map(|part| part[0]).fold(f32::NEG_INFINITY, f32::max);
    let (mut total, mut sums) = (0.0, vec![0f32; o.len()]);
    for part in parts {
        let factor = (part[0] - max).exp();
        total += factor * part[1];
        for (sum, value) in sums.iter_mut().zip(&part[2..]) {
            *sum += factor * value;
        }
    }
    for (o, sum) in o.iter_mut().zip(sums) {
        *o = T::narrow(sum / total);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::kernel::with_each_vectors;

    #[test]
    fn every_machine_computes_the_same_bits() {
        for (num_heads, num_kv_heads, head_dim, keys) in [(1, 1, 7, 3), (6, 2, 17, 64), (9, 3, 64, 33)] {
            let heads = Heads { num_heads, num_kv_heads, head_dim, window: None, scale: 0.3 };
            let values = |count: usize, step: usize| {
                (0..count).map(|i| (i * step % 101) as f32 / 50.0 - 1.0).collect()
            };
            let q: Vec<f32> = values(num_heads * head_dim, 37);
            let [k, v]: [Vec<f32>; 2] = [29, 53].map(|step| values(keys * num_kv_heads * head_dim, step));
            let mut first = None;
            with_each_vectors(|vectors| {
                let mut parts = vec![0f32; num_heads * (head_dim + 2)];
                attend(&mut parts, &q, &k, &v, &heads);
                let bits: Vec<u32> = parts.iter().map(|part| part.to_bits()).collect();
                assert_eq!(&bits, first.get_or_insert_with(|| bits.clone()), "{heads:?} by {vectors:?}");
            });
        }
    }
}
