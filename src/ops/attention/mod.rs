//! Causal grouped-query attention inside each document of a flat batch, in blocks of queries: the scores of one block
//! exist at a time, never a matrix of all tokens by all tokens.
//!
//! `q` is `[tokens, heads * d]`, `k` and `v` are `[keys, kv_heads * d]`, rotated already; `o` has the shape of `q`.
//! In training keys are tokens. In decoding there is one document whose earlier keys come from a cache: then query
//! `i` stands at position `start + i`, and `keys = start + tokens`.

mod backward;
mod decode;
mod forward;

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{D, DType, Tensor};
use rayon::prelude::*;

use super::kernel::{Element, Matrix, dispatch, vectorized};
use super::{Documents, Op, differentiate};
use crate::error::{Error, Result};
use backward::backward_blocks;
use decode::forward_one;
use forward::forward_blocks;

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
///
/// # Errors
///
/// Where shapes, heads and documents do not belong together.
pub fn forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: &Heads,
    documents: &Documents,
) -> Result<(Tensor, Saved)> {
    let _time = Op::Attention.begin();
    heads.check(&q, &k, &v, documents)?;
    let (q, k, v) = (q.contiguous()?, k.contiguous()?, v.contiguous()?);
    let (o, logsumexp) = if q.device().is_cpu() && documents.num_tokens() == 1 && documents.start() > 0 {
        // Behind a cache nothing is trained, so nothing is kept for it.
        (dispatch!(q.dtype(), forward_one(&q, &k, &v, heads, documents.start()))?, Vec::new())
    } else if q.device().is_cpu() {
        dispatch!(q.dtype(), forward_blocks(&q, &k, &v, heads, documents))?
    } else {
        (reference(&q, &k, &v, heads, documents)?, Vec::new())
    };
    Ok((o.clone(), Saved { q, k, v, o, logsumexp }))
}

/// `o` of documents that each continue behind keys and values of their own: `caches` are all rows of each that are there by
/// now. A document's values are those that it has alone.
///
/// # Errors
///
/// Where shapes, heads and documents do not belong together.
pub fn forward_behind(
    q: &Tensor,
    caches: Vec<(Tensor, Tensor)>,
    heads: &Heads,
    documents: &Documents,
) -> Result<Tensor> {
    let singles: Vec<_> = documents.singles().collect();
    if singles.len() != caches.len() {
        let (documents, caches) = (singles.len(), caches.len());
        return Err(Error::invalid(format!("{documents} documents continue behind {caches} caches")));
    }
    let one = |((range, document), (k, v)): ((Range<usize>, Documents), (Tensor, Tensor))| {
        let q = q.narrow(0, range.start, range.len())?;
        Ok(forward(q, k, v, heads, &document)?.0)
    };
    let of_each = singles.into_par_iter().zip(caches).map(one).collect::<Result<Vec<_>>>()?;
    match &of_each[..] {
        [only] => Ok(only.clone()),
        all => Ok(Tensor::cat(all, 0)?),
    }
}

/// `(dq, dk, dv)`.
///
/// With `p = softmax(scale q k^T)` row by row and `o = p v`: `dv = p^T do`, `dp = do v^T`,
/// `ds = scale p (dp - sum(do o))`, `dq = ds k` and `dk = ds^T q`; the scores are computed again from `logsumexp`.
///
/// # Errors
///
/// Where `heads`, `documents` or the shape of `d_o` are not those of the forward, or keys came from a cache.
pub fn backward(
    saved: &Saved,
    heads: &Heads,
    documents: &Documents,
    d_o: &Tensor,
) -> Result<(Tensor, Tensor, Tensor)> {
    let _time = Op::Attention.begin();
    heads.check(&saved.q, &saved.k, &saved.v, documents)?;
    if documents.start() > 0 {
        return Err(Error::invalid("keys that come from a cache have no gradient"));
    }
    if d_o.dims() != saved.q.dims() {
        let (found, expected) = (d_o.dims(), saved.q.dims());
        return Err(Error::invalid(format!(
            "the gradient of attention has shape {found:?}, expected {expected:?}"
        )));
    }
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
    /// Holds inputs to these heads and to documents: tasks write the rows of documents and heads without further looks.
    fn check(&self, q: &Tensor, k: &Tensor, v: &Tensor, documents: &Documents) -> Result<()> {
        let Self { num_heads, num_kv_heads, head_dim, window, .. } = *self;
        if num_kv_heads == 0 || num_heads == 0 || head_dim == 0 || !num_heads.is_multiple_of(num_kv_heads) {
            return Err(Error::invalid(format!(
                "{num_heads} query heads over {num_kv_heads} key heads of width {head_dim}; expected none of them zero, and \
                 whole groups"
            )));
        }
        if window == Some(0) {
            return Err(Error::invalid("a window of 0 tokens; a query sees at least itself"));
        }
        let (tokens, start) = (documents.num_tokens(), documents.start());
        if start > 0 && documents.ranges().len() != 1 {
            return Err(Error::invalid("only a single document continues behind a cache"));
        }
        let expect = |name: &str, x: &Tensor, rows: Option<usize>, heads: usize| {
            let shape = rows.zip(heads.checked_mul(head_dim));
            match (shape, x.dims()) {
                (Some((rows, width)), [found_rows, found_width])
                    if (rows, width) == (*found_rows, *found_width) =>
                {
                    Ok(())
                }
                (_, found) => Err(Error::invalid(format!(
                    "`{name}` of attention has shape {found:?}, expected {} rows of {heads} heads of width {head_dim}",
                    rows.map_or_else(|| "countless".to_string(), |rows| rows.to_string())
                ))),
            }
        };
        let keys = start.checked_add(tokens);
        expect("q", q, Some(tokens), num_heads)?;
        expect("k", k, keys, num_kv_heads)?;
        expect("v", v, keys, num_kv_heads)
    }

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
    fn head(&self, first: usize, rows: usize, head: usize) -> Matrix<'a> {
        let stride = self.count * self.d;
        Matrix::rows(&self.values[first * stride + head * self.d..], rows, self.d, stride)
    }
}

/// Buffers of a task, which grow to what the largest needs.
struct Scratch<T> {
    q: Vec<T>,
    d_o: Vec<T>,
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
            d_o: Vec::new(),
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

/// On all threads, each with buffers of its own; the tasks are taken in their order.
fn for_each_with_scratch<K: Sync, T: Element>(tasks: &[K], f: impl Fn(&mut Scratch<T>, &K) + Sync) {
    if tasks.len() == 1 {
        return f(&mut Scratch::default(), &tasks[0]);
    }
    let next = AtomicUsize::new(0);
    rayon::broadcast(|_| {
        let mut scratch = Scratch::default();
        while let Some(task) = tasks.get(next.fetch_add(1, Ordering::Relaxed)) {
            f(&mut scratch, task);
        }
    });
}

/// Scores that no query sees become minus infinity as far as whole vectors reach, so that rows have no ends that are
/// computed one by one: from where to where there is something to compute.
#[inline(always)]
fn hide(scores: &mut [f32], seen: &Range<usize>) -> Range<usize> {
    let (from, to) = (seen.start / 16 * 16, seen.end.next_multiple_of(16).min(scores.len()));
    scores[from..seen.start].fill(f32::NEG_INFINITY);
    scores[seen.end..to].fill(f32::NEG_INFINITY);
    from..to
}

vectorized! {
    fn scale_into<T: Element>(to: &mut [T], from: &[f32], factor: f32) {
        for (to, from) in to.iter_mut().zip(from) {
            *to = T::narrow(from * factor);
        }
    }
}
