//! Causal grouped-query attention inside each document of a flat batch, in blocks of queries: the scores of one block
//! exist at a time, never a matrix of all tokens by all tokens.
//!
//! `q` is `[tokens, heads * d]`, `k` and `v` are `[keys, kv_heads * d]`, rotated already; `o` has the shape of `q`.
//! In training keys are tokens. In decoding there is one document whose earlier keys come from a cache: then query
//! `i` stands at position `start + i`, and `keys = start + tokens`.

use std::ops::Range;

use candle_core::{D, DType, Tensor};
use rayon::prelude::*;

use super::kernel::{
    Disjoint, Element, Matrix, Values, dispatch, exp, for_rows, product, sum_of, to_tensor, vectorized,
    written,
};
use super::{Documents, Op, differentiate};
use crate::error::Result;

/// Rows of a block in the forward: queries times the query heads that share a key head.
const FORWARD_ROWS: usize = 192;
/// Queries of a block in the backward.
const BACKWARD_ROWS: usize = 128;

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
    let _time = Op::Attention.begin();
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
    let _time = Op::Attention.begin();
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

/// Queries that are computed together, and the keys that any of them sees; positions within their document.
#[derive(Clone, Copy)]
struct Block {
    from: usize,
    to: usize,
    low: usize,
    high: usize,
}

impl Block {
    fn rows(&self) -> usize {
        self.to - self.from
    }

    fn width(&self) -> usize {
        self.high - self.low
    }

    /// The keys that the query in row `row` sees, counted from `low`.
    fn seen(&self, row: usize, start: usize, heads: &Heads) -> Range<usize> {
        let seen = heads.sees(start + self.from + row);
        seen.start - self.low..seen.end - self.low
    }
}

fn blocks(heads: &Heads, len: usize, start: usize, size: usize) -> impl Iterator<Item = Block> {
    let heads = *heads;
    (0..len).step_by(size).map(move |from| {
        let to = (from + size).min(len);
        Block { from, to, low: heads.sees(start + from).start, high: start + to }
    })
}

/// `[tokens, heads * d]`, of which heads are looked at.
struct Columns<'a, T> {
    values: &'a [T],
    count: usize,
    d: usize,
}

impl<'a, T: Element> Columns<'a, T> {
    fn new(values: &'a [T], count: usize, d: usize) -> Self {
        Self { values, count, d }
    }

    fn row(&self, token: usize, head: usize) -> &'a [T] {
        &self.values[(token * self.count + head) * self.d..][..self.d]
    }

    /// Rows of one head, where they lie.
    fn head(&self, first: usize, rows: usize, head: usize) -> Matrix<'a, T> {
        let stride = self.count * self.d;
        Matrix::rows(&self.values[first * stride + head * self.d..], rows, self.d, stride)
    }
}

/// Buffers of a task, which grow to what the largest needs.
struct Scratch<T> {
    q: Vec<T>,
    scores: Vec<f32>,
    slopes: Vec<f32>,
    p: Vec<T>,
    ds: Vec<T>,
    rows: Vec<f32>,
    inverse: Vec<f32>,
}

impl<T> Default for Scratch<T> {
    fn default() -> Self {
        Self {
            q: Vec::new(),
            scores: Vec::new(),
            slopes: Vec::new(),
            p: Vec::new(),
            ds: Vec::new(),
            rows: Vec::new(),
            inverse: Vec::new(),
        }
    }
}

/// The first `len` values, whatever they are.
fn part<T: Element>(buffer: &mut Vec<T>, len: usize) -> &mut [T] {
    if buffer.len() < len {
        buffer.resize(len, T::zero());
    }
    &mut buffer[..len]
}

/// Query heads that share a key head are computed together, so that their keys are read once.
fn forward_blocks<T: Element>(
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
        let compute = |scratch: &mut Scratch<T>, (first, kv_head, block): (usize, usize, Block)| {
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
            product(scores, 0.0, heads.scale as f32, q, keys.t());
            let p = part(&mut scratch.p, group * rows * width);
            let inverse = part(&mut scratch.inverse, group * rows);
            for (row, (p, scores)) in p.chunks_exact_mut(width).zip(scores.chunks_exact(width)).enumerate() {
                let seen = block.seen(row % rows, start, heads);
                let (max, sum) = powers(p, scores, seen.start, seen.end);
                inverse[row] = 1.0 / sum;
                // SAFETY: a value for each head and token, and each pair belongs to one task.
                unsafe { sums.part(head(row) * tokens + token(row), 1)[0] = max + sum.ln() };
            }
            let out = part(&mut scratch.rows, group * rows * d);
            let values = vs.head(first + block.low, width, kv_head);
            product(out, 0.0, 1.0, Matrix::rows(p, group * rows, width, width), values);
            for (row, out) in out.chunks_exact(d).enumerate() {
                // SAFETY: every task writes its own tokens in the columns of its own heads.
                let o = unsafe { o.part((token(row) * heads.num_heads + head(row)) * d, d) };
                scale_into(o, out, inverse[row]);
            }
        };
        for_each_with_scratch(tasks, compute);
    });
    Ok((to_tensor(o, q.dims())?, logsumexp))
}

/// On all threads, unless there is one task only.
fn for_each_with_scratch<K: Send, T: Element>(tasks: Vec<K>, f: impl Fn(&mut Scratch<T>, K) + Sync + Send) {
    if tasks.len() == 1 {
        return tasks.into_iter().for_each(|task| f(&mut Scratch::default(), task));
    }
    tasks.into_par_iter().with_max_len(1).for_each_init(Scratch::default, f);
}

vectorized! {
    /// Writes `exp(score - max)` where it is seen and zeros elsewhere: the largest score and the sum.
    fn powers<T: Element>(p: &mut [T], scores: &[f32], from: usize, to: usize) -> (f32, f32) {
        p[..from].fill(T::zero());
        p[to..].fill(T::zero());
        let (p, scores) = (&mut p[from..to], &scores[from..to]);
        let mut lanes = [f32::NEG_INFINITY; 16];
        let (whole, rest) = scores.split_at(scores.len() / 16 * 16);
        for part in whole.chunks_exact(16) {
            for (lane, value) in lanes.iter_mut().zip(part) {
                *lane = if *value > *lane { *value } else { *lane };
            }
        }
        let mut max = f32::NEG_INFINITY;
        for value in lanes.iter().chain(rest) {
            max = if *value > max { *value } else { max };
        }
        for (p, score) in p.iter_mut().zip(scores) {
            *p = T::narrow(exp(score - max));
        }
        // What is divided by is the sum of what is multiplied with, rounding included.
        (max, sum_of(p.len(), |i| p[i].widen()))
    }
}

vectorized! {
    fn scale_into<T: Element>(to: &mut [T], from: &[f32], factor: f32) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = T::narrow(from * factor);
        }
    }
}

vectorized! {
    fn dot<T: Element>(x: &[T], y: &[T]) -> f32 {
        let y = &y[..x.len()];
        sum_of(x.len(), |i| x[i].widen() * y[i].widen())
    }
}

vectorized! {
    /// `p = exp(score - logsumexp)` and `ds = p (dp - dot)` where it is seen, zeros elsewhere.
    fn weights_and_slopes<T: Element>(
        p: &mut [T],
        ds: &mut [T],
        scores: &[f32],
        dp: &[f32],
        from: usize,
        to: usize,
        logsumexp: f32,
        dot: f32,
    ) {
        for zeros in [&mut p[..from], &mut ds[..from]] {
            zeros.fill(T::zero());
        }
        for zeros in [&mut p[to..], &mut ds[to..]] {
            zeros.fill(T::zero());
        }
        let (p, ds) = (&mut p[from..to], &mut ds[from..to]);
        for (((p, ds), score), dp) in p.iter_mut().zip(ds).zip(&scores[from..to]).zip(&dp[from..to]) {
            let weight = exp(score - logsumexp);
            *p = T::narrow(weight);
            *ds = T::narrow(weight * (dp - dot));
        }
    }
}

/// A task is one query head of one document: what it adds to the gradients of its keys and values stays apart until all
/// heads that share them are done, then it is summed in their order.
fn backward_blocks<T: Element>(
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
    let (mut dks, mut dvs) =
        (vec![0.0f32; heads.num_heads * tokens * d], vec![0.0f32; heads.num_heads * tokens * d]);
    let (dk_parts, dv_parts) = (Disjoint::new(&mut dks), Disjoint::new(&mut dvs));
    let dq = written::<T>(qs.values.len(), |dq| {
        let dq = Disjoint::new(dq);
        let compute = |scratch: &mut Scratch<T>, (range, head): (Range<usize>, usize)| {
            let (first, len, kv_head) = (range.start, range.len(), head / group);
            let own = (head * tokens + first) * d;
            // SAFETY: the rows of this document in this head belong to this task alone.
            let (dk, dv) = unsafe { (dk_parts.part(own, len * d), dv_parts.part(own, len * d)) };
            for block in blocks(heads, len, 0, BACKWARD_ROWS) {
                let (rows, width) = (block.rows(), block.width());
                let (queries, keys) = (first + block.from, first + block.low);
                let (q, d_o) = (qs.head(queries, rows, head), d_os.head(queries, rows, head));
                let (k, v) = (ks.head(keys, width, kv_head), vs.head(keys, width, kv_head));
                let scores = part(&mut scratch.scores, rows * width);
                let dp = part(&mut scratch.slopes, rows * width);
                product(scores, 0.0, heads.scale as f32, q, k.t());
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
                        &scores[all.clone()],
                        &dp[all],
                        seen.start,
                        seen.end,
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
                product(&mut dk[keys.clone()], 1.0, heads.scale as f32, ds.t(), q);
                product(&mut dv[keys], 1.0, 1.0, p.t(), d_o);
            }
        };
        for_each_with_scratch(tasks, compute);
    });
    let shape = saved.k.dims();
    let (dk, dv) = (sum_of_heads::<T>(&dks, heads, tokens), sum_of_heads::<T>(&dvs, heads, tokens));
    Ok((to_tensor(dq, saved.q.dims())?, to_tensor(dk, shape)?, to_tensor(dv, shape)?))
}

/// `[heads, tokens, d]` to `[tokens, kv_heads * d]`, query heads of one key head summed in their order.
fn sum_of_heads<T: Element>(parts: &[f32], heads: &Heads, tokens: usize) -> Vec<T> {
    let (d, group) = (heads.head_dim, heads.group());
    written(tokens * heads.num_kv_heads * d, |sums| {
        for_rows(sums, heads.num_kv_heads * d, |token, row| {
            for (kv_head, sum) in row.chunks_exact_mut(d).enumerate() {
                let rows = (kv_head * group..(kv_head + 1) * group)
                    .map(|head| &parts[(head * tokens + token) * d..][..d]);
                for (i, sum) in sum.iter_mut().enumerate() {
                    *sum = T::narrow(rows.clone().map(|row| row[i]).sum());
                }
            }
        });
    })
}
