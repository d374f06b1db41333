//! The attention of a layer: projections, per-head norms where a family has them, rotation, attention, output.

use std::ops::Range;

use candle_core::Tensor;

use super::cache::KeyValues;
use super::linear::Linear;
use super::norm::Norm;
use crate::error::{Error, Result};
use crate::ops::attention::{self, Heads};
use crate::ops::rotary::{self, Angles};
use crate::ops::{Gradients, Pass, linear, rms_norm};

#[derive(Debug, Clone)]
pub(super) struct Attention {
    pub(super) q: Linear,
    pub(super) k: Linear,
    pub(super) v: Linear,
    pub(super) o: Linear,
    /// Norms of q and of k, over each head or over all of them.
    pub(super) qk_norm: Option<(Norm, Norm)>,
    pub(super) heads: Heads,
}

/// What the backward needs.
#[derive(Debug)]
pub(super) struct Saved {
    q: linear::Saved,
    k: linear::Saved,
    v: linear::Saved,
    qk_norm: Option<(rms_norm::Saved, rms_norm::Saved)>,
    /// Nothing behind a cache, where nothing is trained.
    attention: Option<attention::Saved>,
    o: linear::Saved,
}

impl Saved {
    /// Drops the input, which [`Saved::with_input`] gives again. That of the output projection is what attention keeps.
    pub(super) fn trim(&mut self) {
        for saved in [&mut self.q, &mut self.k, &mut self.v] {
            saved.drop_input();
        }
    }

    /// Gives the input again, if it was dropped.
    pub(super) fn with_input(&mut self, input: impl FnOnce() -> Result<Tensor>) -> Result<()> {
        let input = self.q.input_or(input)?;
        for saved in [&mut self.q, &mut self.k, &mut self.v] {
            saved.set_input(&input);
        }
        Ok(())
    }
}

impl Attention {
    /// `[tokens, hidden] -> [tokens, hidden]`. With caches, one for each document, keys and values are appended to them, and a
    /// document sees all of its own.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        angles: &Angles,
        pass: &Pass<'_>,
        caches: &mut [&mut KeyValues],
    ) -> Result<(Tensor, Saved)> {
        // [tokens, heads * d] and twice [tokens, kv_heads * d]
        let [(mut q, q_saved), (mut k, k_saved), (v, v_saved)] =
            Linear::forward_of_all([&self.q, &self.k, &self.v], x, pass)?;
        let mut norms_saved = None;
        if let Some((q_norm, k_norm)) = &self.qk_norm {
            let (new_q, q_norm_saved) = q_norm.forward(&normed_rows(&q, q_norm)?)?; // [tokens * heads, d]
            let (new_k, k_norm_saved) = k_norm.forward(&normed_rows(&k, k_norm)?)?;
            (q, k) = (new_q.reshape(q.shape())?, new_k.reshape(k.shape())?);
            norms_saved = Some((q_norm_saved, k_norm_saved));
        }
        (q, k) = (rotary::forward_in_place(q, angles)?, rotary::forward_in_place(k, angles)?);
        let (mixed, attention) = if caches.is_empty() {
            let (mixed, saved) = attention::forward(q, k, v, &self.heads, pass.documents)?;
            (mixed, Some(saved))
        } else {
            let append = |(cache, range): (&mut &mut KeyValues, Range<usize>)| {
                let rows = |x: &Tensor| x.narrow(0, range.start, range.len());
                cache.append(&rows(&k)?, &rows(&v)?) // [past + tokens, kv_heads * d]
            };
            let all = caches.iter_mut().zip(pass.documents.ranges()).map(append).collect::<Result<_>>()?;
            (attention::forward_behind(&q, all, &self.heads, pass.documents)?, None)
        };
        let (y, o) = self.o.forward(&mixed, pass)?; // [tokens, hidden]
        Ok((y, Saved { q: q_saved, k: k_saved, v: v_saved, qk_norm: norms_saved, attention, o }))
    }

    /// `dx` when `wants_dx`.
    pub(super) fn backward(
        &self,
        saved: Saved,
        angles: &Angles,
        pass: &Pass<'_>,
        dy: &Tensor,
        wants_dx: bool,
        gradients: &mut Gradients,
    ) -> Result<Option<Tensor>> {
        let wants_mixed = wants_dx || self.is_trained_before_output(gradients);
        let Some(d_mixed) = self.o.backward(&saved.o, pass, dy, wants_mixed, gradients)? else {
            return Ok(None);
        };
        let Some(attention) = saved.attention else {
            return Err(Error::invalid("keys that come from a cache have no gradient"));
        };
        let (dq, dk, dv) = attention::backward(&attention, &self.heads, pass.documents, &d_mixed)?;
        drop((attention, saved.o, d_mixed));
        let (mut dq, mut dk) =
            (rotary::backward_in_place(dq, angles)?, rotary::backward_in_place(dk, angles)?);
        if let (Some((q_norm, k_norm)), Some((q_saved, k_saved))) = (&self.qk_norm, &saved.qk_norm) {
            let (q_shape, k_shape) = (dq.shape().clone(), dk.shape().clone());
            dq = q_norm.backward(q_saved, &normed_rows(&dq, q_norm)?, None, gradients)?.reshape(q_shape)?;
            dk = k_norm.backward(k_saved, &normed_rows(&dk, k_norm)?, None, gradients)?.reshape(k_shape)?;
        }
        let towards = [(&self.q, &saved.q, &dq), (&self.k, &saved.k, &dk), (&self.v, &saved.v, &dv)];
        Linear::backward_of_all(&towards, pass, wants_dx, gradients)
    }

    fn is_trained_before_output(&self, gradients: &Gradients) -> bool {
        let norms = self.qk_norm.iter().flat_map(|(q, k)| [&q.weight, &k.weight]);
        [&self.q, &self.k, &self.v].iter().any(|linear| linear.is_trained(gradients))
            || norms.into_iter().any(|weight| gradients.wants(weight))
    }

    /// Whether a gradient of `wanted` is computed from its input.
    pub(super) fn needs_input(&self, wanted: &Gradients) -> bool {
        [&self.q, &self.k, &self.v].iter().any(|linear| linear.needs_input(wanted))
    }

    pub(super) fn is_trained(&self, gradients: &Gradients) -> bool {
        self.o.is_trained(gradients) || self.is_trained_before_output(gradients)
    }

    pub(super) fn linears(&self) -> [&Linear; 4] {
        [&self.q, &self.k, &self.v, &self.o]
    }

    pub(super) fn linears_mut(&mut self) -> [&mut Linear; 4] {
        [&mut self.q, &mut self.k, &mut self.v, &mut self.o]
    }
}

/// As many rows as the norm's weight makes of `x`.
fn normed_rows(x: &Tensor, norm: &Norm) -> Result<Tensor> {
    Ok(x.reshape(((), norm.weight.tensor().elem_count()))?)
}
