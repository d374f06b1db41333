//! Causal grouped-query attention inside each document of a flat batch, in blocks of queries: the scores of one block
//! exist at a time, never a matrix of all tokens by all tokens.
//!
//! `q` is `[tokens, heads * d]`, `k` and `v` are `[keys, kv_heads * d]`, rotated already; `o` has the shape of `q`.
//! In training keys are tokens. In decoding there is one document whose earlier keys come from a cache: then query
//! `i` stands at position `start + i`, and `keys = start + tokens`.

use candle_core::{D, DType, Tensor};
use rayon::prelude::*;

use super::kernel::{Disjoint, Element, Matrix, Values, dispatch, product, to_tensor};
use super::{Documents, differentiate};
use crate::error::Result;

/// Queries per block.
const BLOCK: usize = 64;

/// Heads and what a query sees.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Heads {
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// A query sees itself and the `window - 1` tokens before it; `None`: all before it.
    pub window: Option<usize>,
    /// What the scores are multiplied with, commonly `1 / sqrt(head_dim)`.
    pub scale: f64,
}

/// What the backward needs.
#[derive(Debug, Clone)]
pub struct Saved {
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    /// Logsumexp of each query's scores, head after head: `[heads, tokens]`.
    logsumexp: Vec<f32>,
}

/// `o`, and what the backward needs.
pub fn forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: &Heads,
    documents: &Documents,
) -> Result<(Tensor, Saved)> {
    let (q, k, v) = (q.contiguous()?, k.contiguous()?, v.contiguous()?);
    let (o, logsumexp) = if q.device().is_cpu() {
        dispatch!(q.dtype(), forward_blocks(&q, &k, &v, heads, documents))?
    } else {
        (reference(&q, &k, &v, heads, documents)?, Vec::new())
    };
    Ok((o.clone(), Saved { q, k, v, o, logsumexp }))
}

/// `(dq, dk, dv)`.
///
/// With `p = softmax(scale q k^T)` row by row and `o = p v`: `dv = p^T do`, `dp = do v^T`,
/// `ds = scale p (dp - sum(do o))`, `dq = ds k` and `dk = ds^T q`; the scores are computed again from `logsumexp`.
pub fn backward(
    saved: &Saved,
    heads: &Heads,
    documents: &Documents,
    d_o: &Tensor,
) -> Result<(Tensor, Tensor, Tensor)> {
    let d_o = d_o.contiguous()?;
    if saved.q.device().is_cpu() {
        return dispatch!(saved.q.dtype(), backward_blocks(saved, heads, documents, &d_o));
    }
    let inputs = [&saved.q, &saved.k, &saved.v];
    let mut three = differentiate(&inputs, &d_o, |x| reference(&x[0], &x[1], &x[2], heads, documents))?;
    let (dv, dk) = (three.remove(2), three.remove(1));
    Ok((three.remove(0), dk, dv))
}

/// The same composed of candle primitives, document by document, in f32.
pub fn reference(q: &Tensor, k: &Tensor, v: &Tensor, heads: &Heads, documents: &Documents) -> Result<Tensor> {
    let (h, kv, d) = (heads.num_heads, heads.num_kv_heads, heads.head_dim);
    let start = documents.start();
    let mut outputs = Vec::new();
    for range in documents.ranges() {
        let (n, m) = (range.len(), start + range.len());
        let split = |x: &Tensor, from: usize, rows: usize, count: usize| -> Result<Tensor> {
            let x = x.narrow(0, from, rows)?.to_dtype(DType::F32)?;
            Ok(x.reshape((rows, count, d))?.transpose(0, 1)?.contiguous()?) // [count, rows, d]
        };
        let q = split(q, range.start, n, h)?;
        let grouped = |x: Tensor| -> Result<Tensor> {
            let x = x.unsqueeze(1)?.broadcast_as((kv, h / kv, m, d))?;
            Ok(x.reshape((h, m, d))?)
        };
        let (k, v) = (grouped(split(k, range.start, m, kv)?)?, grouped(split(v, range.start, m, kv)?)?);
        let mut mask = vec![0.0f32; n * m];
        for i in 0..n {
            for j in 0..m {
                if !heads.sees(start + i).contains(&j) {
                    mask[i * m + j] = f32::NEG_INFINITY;
                }
            }
        }
        let mask = Tensor::from_vec(mask, (1, n, m), q.device())?;
        let scores = (q.matmul(&k.t()?)? * heads.scale)?.broadcast_add(&mask)?; // [h, n, m]
        let max = scores.max_keepdim(D::Minus1)?.detach();
        let powers = scores.broadcast_sub(&max)?.exp()?;
        let weights = powers.broadcast_div(&powers.sum_keepdim(D::Minus1)?)?;
        outputs.push(weights.matmul(&v)?.transpose(0, 1)?.reshape((n, h * d))?);
    }
    Ok(Tensor::cat(&outputs, 0)?.to_dtype(q.dtype())?)
}

impl Heads {
    /// The key positions that the query at `position` sees.
    fn sees(&self, position: usize) -> std::ops::Range<usize> {
        let first = self.window.map_or(0, |window| (position + 1).saturating_sub(window));
        first..position + 1
    }

    fn group(&self) -> usize {
        self.num_heads / self.num_kv_heads
    }
}

/// One key head of one document: a unit of work that touches its own columns of every output.
struct Task {
    /// First token of the document in the batch, and its tokens.
    first: usize,
    len: usize,
    kv_head: usize,
}

fn tasks(heads: &Heads, documents: &Documents) -> Vec<Task> {
    let mut tasks: Vec<Task> = documents
        .ranges()
        .filter(|range| !range.is_empty())
        .flat_map(|range| {
            (0..heads.num_kv_heads).map(move |kv_head| Task { first: range.start, len: range.len(), kv_head })
        })
        .collect();
    // Long documents first, so that no thread is left with one at the end.
    tasks.sort_by_key(|task| std::cmp::Reverse(task.len));
    tasks
}

/// The columns of one head as f32, `[rows, d]`.
fn head<T: Element>(
    values: &[T],
    first: usize,
    rows: usize,
    index: usize,
    count: usize,
    d: usize,
) -> Vec<f32> {
    let mut out = Vec::with_capacity(rows * d);
    for row in first..first + rows {
        out.extend(values[(row * count + index) * d..][..d].iter().map(|x| x.widen()));
    }
    out
}

/// Writes `[rows, d]` into the columns of one head.
fn put_head<T: Element>(out: Disjoint<T>, from: &[f32], first: usize, index: usize, count: usize, d: usize) {
    for (i, row) in from.chunks_exact(d).enumerate() {
        // SAFETY: every task writes the rows of its own document in the columns of its own heads.
        let target = unsafe { out.part(((first + i) * count + index) * d, d) };
        for (y, x) in target.iter_mut().zip(row) {
            *y = T::narrow(*x);
        }
    }
}

/// A block of queries and the keys that any of them sees.
struct Block {
    from: usize,
    to: usize,
    low: usize,
    high: usize,
}

fn blocks(heads: &Heads, len: usize, start: usize) -> impl Iterator<Item = Block> + '_ {
    (0..len).step_by(BLOCK).map(move |from| {
        let to = (from + BLOCK).min(len);
        Block { from, to, low: heads.sees(start + from).start, high: start + to }
    })
}

fn forward_blocks<T: Element>(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    heads: &Heads,
    documents: &Documents,
) -> Result<(Tensor, Vec<f32>)> {
    let (tokens, d, start) = (q.dim(0)?, heads.head_dim, documents.start());
    let (qs, ks, vs) = (Values::<T>::of(q)?, Values::<T>::of(k)?, Values::<T>::of(v)?);
    let (qs, ks, vs): (&[T], &[T], &[T]) = (&qs, &ks, &vs);
    let mut o = vec![T::zero(); qs.len()];
    let mut logsumexp = vec![0.0f32; heads.num_heads * tokens];
    let (o_parts, l_parts) = (Disjoint::new(&mut o), Disjoint::new(&mut logsumexp));
    tasks(heads, documents).into_par_iter().for_each(|task| {
        let keys = start + task.len;
        let k = head(ks, task.first, keys, task.kv_head, heads.num_kv_heads, d);
        let v = head(vs, task.first, keys, task.kv_head, heads.num_kv_heads, d);
        let mut scores = Vec::new();
        for h in task.kv_head * heads.group()..(task.kv_head + 1) * heads.group() {
            let q = head(qs, task.first, task.len, h, heads.num_heads, d);
            let mut out = vec![0.0f32; task.len * d];
            // SAFETY: row `h` of the document's tokens belongs to this task alone.
            let sums = unsafe { l_parts.part(h * tokens + task.first, task.len) };
            for block in blocks(heads, task.len, start) {
                let (rows, width) = (block.to - block.from, block.high - block.low);
                block_scores(&mut scores, &q, &k, &block, heads);
                for (i, row) in scores.chunks_exact_mut(width).enumerate() {
                    let seen = heads.sees(start + block.from + i);
                    sums[block.from + i] = softmax(row, seen.start - block.low..seen.end - block.low);
                }
                let p = Matrix::rows(&scores, rows, width, width);
                let v = Matrix::rows(&v[block.low * d..], width, d, d);
                product(&mut out[block.from * d..block.to * d], 0.0, 1.0, p, v);
            }
            put_head(o_parts, &out, task.first, h, heads.num_heads, d);
        }
    });
    Ok((to_tensor(o, q.dims())?, logsumexp))
}

/// Scaled scores of a block, `[rows, keys of the block]`, unmasked.
fn block_scores(scores: &mut Vec<f32>, q: &[f32], k: &[f32], block: &Block, heads: &Heads) {
    let (rows, width, d) = (block.to - block.from, block.high - block.low, heads.head_dim);
    scores.resize(rows * width, 0.0);
    let q = Matrix::rows(&q[block.from * d..], rows, d, d);
    let k = Matrix::rows(&k[block.low * d..], width, d, d);
    product(scores, 0.0, heads.scale as f32, q, k.t());
}

/// Turns the seen part of a row of scores into weights and the rest into zeros; returns the logsumexp.
fn softmax(row: &mut [f32], seen: std::ops::Range<usize>) -> f32 {
    row[..seen.start].fill(0.0);
    row[seen.end..].fill(0.0);
    let row = &mut row[seen];
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for value in row.iter_mut() {
        *value = (*value - max).exp();
        sum += *value;
    }
    let inverse = 1.0 / sum;
    for value in row.iter_mut() {
        *value *= inverse;
    }
    max + sum.ln()
}

fn backward_blocks<T: Element>(
    saved: &Saved,
    heads: &Heads,
    documents: &Documents,
    d_o: &Tensor,
) -> Result<(Tensor, Tensor, Tensor)> {
    let (tokens, d) = (saved.q.dim(0)?, heads.head_dim);
    let (qs, ks, vs) = (Values::<T>::of(&saved.q)?, Values::<T>::of(&saved.k)?, Values::<T>::of(&saved.v)?);
    let (os, d_os) = (Values::<T>::of(&saved.o)?, Values::<T>::of(d_o)?);
    let [qs, ks, vs, os, d_os]: [&[T]; 5] = [&qs, &ks, &vs, &os, &d_os];
    let (mut dq, mut dk, mut dv) =
        (vec![T::zero(); qs.len()], vec![T::zero(); ks.len()], vec![T::zero(); vs.len()]);
    let (dq_parts, dk_parts, dv_parts) =
        (Disjoint::new(&mut dq), Disjoint::new(&mut dk), Disjoint::new(&mut dv));
    let (h_count, kv_count) = (heads.num_heads, heads.num_kv_heads);
    tasks(heads, documents).into_par_iter().for_each(|task| {
        let (first, len) = (task.first, task.len);
        let k = head(ks, first, len, task.kv_head, kv_count, d);
        let v = head(vs, first, len, task.kv_head, kv_count, d);
        let (mut dk, mut dv) = (vec![0.0f32; len * d], vec![0.0f32; len * d]);
        let (mut p, mut dp) = (Vec::new(), Vec::new());
        for h in task.kv_head * heads.group()..(task.kv_head + 1) * heads.group() {
            let q = head(qs, first, len, h, h_count, d);
            let o = head(os, first, len, h, h_count, d);
            let d_o = head(d_os, first, len, h, h_count, d);
            let mut dq = vec![0.0f32; len * d];
            for block in blocks(heads, len, 0) {
                let (rows, width) = (block.to - block.from, block.high - block.low);
                let queries = block.from * d..block.to * d;
                let keys = block.low * d..block.high * d;
                let d_o_block = Matrix::rows(&d_o[queries.clone()], rows, d, d);
                block_scores(&mut p, &q, &k, &block, heads);
                dp.resize(rows * width, 0.0);
                product(&mut dp, 0.0, 1.0, d_o_block, Matrix::rows(&v[keys.clone()], width, d, d).t());
                for i in 0..rows {
                    let token = block.from + i;
                    let seen = heads.sees(token);
                    let seen = seen.start - block.low..seen.end - block.low;
                    let (p, dp) = (&mut p[i * width..][..width], &mut dp[i * width..][..width]);
                    let dot: f32 =
                        d_o[token * d..][..d].iter().zip(&o[token * d..][..d]).map(|(x, y)| x * y).sum();
                    let logsumexp = saved.logsumexp[h * tokens + first + token];
                    for j in 0..width {
                        if seen.contains(&j) {
                            p[j] = (p[j] - logsumexp).exp();
                            dp[j] = p[j] * (dp[j] - dot);
                        } else {
                            (p[j], dp[j]) = (0.0, 0.0);
                        }
                    }
                }
                let (p, ds) = (Matrix::rows(&p, rows, width, width), Matrix::rows(&dp, rows, width, width));
                let scale = heads.scale as f32;
                let k_block = Matrix::rows(&k[keys.clone()], width, d, d);
                product(&mut dq[queries.clone()], 0.0, scale, ds, k_block);
                product(&mut dk[keys.clone()], 1.0, scale, ds.t(), Matrix::rows(&q[queries], rows, d, d));
                product(&mut dv[keys], 1.0, 1.0, p.t(), d_o_block);
            }
            put_head(dq_parts, &dq, first, h, h_count, d);
        }
        put_head(dk_parts, &dk, first, task.kv_head, kv_count, d);
        put_head(dv_parts, &dv, first, task.kv_head, kv_count, d);
    });
    Ok((to_tensor(dq, saved.q.dims())?, to_tensor(dk, saved.k.dims())?, to_tensor(dv, saved.v.dims())?))
}
