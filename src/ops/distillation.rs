//! Cross-entropy and the distance to a teacher, by the same chunks of rows as [`super::cross_entropy`]: the logits of neither
//! model exist as a whole.
//!
//! With `l [rows, vocab]` the logits, `t` those of the teacher, `T` a temperature, `q = softmax(l / T)`, `r = softmax(t / T)`,
//! and `h`, `h_t` the hidden states in front of the heads, a row costs
//!
//! `nll + kl T^2 sum r (log r - log q) + hidden |h - h_t|^2 / |h_t|^2`
//!
//! (Hinton et al. 2015, whose `T^2` keeps the size of gradients; hidden states as in Romero et al. 2015, here relative).

use candle_core::{D, DType, Tensor};
use rayon::prelude::*;

use super::cross_entropy::{self, STRETCH, Saved, by_chunks, maximum, powers_and_sum, reference_losses};
use super::kernel::{Element, Values, dispatch, into_values, sum, sum_of_pairs, to_tensor, vectorized};
use super::{Gradients, Op, Weight, differentiate, matmul};
use crate::error::{Error, Result};

/// What a teacher says of the same rows, and how much that counts.
#[derive(Debug, Clone, Copy)]
pub struct Teacher<'a> {
    /// `[rows, d of the teacher]`, in the type of the student's.
    pub hidden: &'a Tensor,
    /// Its head, `[vocab, d of the teacher]`.
    pub head: &'a Weight,
    /// How much each term counts.
    pub terms: Terms,
}

/// How much each term counts beside the negative log-likelihood.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Terms {
    /// Of the divergence of the distributions; 0: not computed.
    pub kl: f64,
    /// What logits are divided by for it.
    pub temperature: f64,
    /// Of the distance of hidden states, which then have one width; 0: not computed.
    pub hidden: f64,
}

/// Terms of each row without their coefficients; empty where a coefficient is 0.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Losses {
    /// Negative log-likelihood of the target.
    pub nll: Vec<f32>,
    /// `T^2 KL(teacher || student)`.
    pub kl: Vec<f32>,
    /// `|h - h_t|^2 / |h_t|^2`.
    pub hidden: Vec<f32>,
}

/// The terms of each row, and the gradients of `scale * sum of losses` as [`cross_entropy::forward`] gives them.
///
/// `dl = scale (softmax(l) - onehot(target) + kl T (q - r))` and `dh += scale hidden 2 (h - h_t) / |h_t|^2`. The teacher gets no
/// gradient.
///
/// # Errors
///
/// Where the teacher has another number of rows or words, or another width and `hidden` counts.
pub fn forward(
    hidden: &Tensor,
    head: &Weight,
    targets: &[u32],
    teacher: &Teacher<'_>,
    scale: f64,
    gradients: &mut Gradients,
) -> Result<(Losses, Saved)> {
    refuse_unequal(hidden, head, teacher)?;
    let Terms { kl, hidden: of_hidden, .. } = teacher.terms;
    let (mut losses, saved) = if kl == 0.0 {
        let (nll, saved) = cross_entropy::forward(hidden, head, targets, scale, gradients)?;
        (Losses { nll, ..Losses::default() }, saved)
    } else {
        divergence(hidden, head, targets, teacher, scale, gradients)?
    };
    if of_hidden == 0.0 {
        return Ok((losses, saved));
    }
    let (distances, d_hidden) = distance(hidden, teacher.hidden, saved.d_hidden, scale * of_hidden)?;
    losses.hidden = distances;
    Ok((losses, Saved { d_hidden }))
}

/// The loss of each row, composed of candle primitives on whole matrices of logits; the heads are plain tensors.
pub fn reference(
    (hidden, head): (&Tensor, &Tensor),
    targets: &[u32],
    (teacher_hidden, teacher_head): (&Tensor, &Tensor),
    terms: Terms,
) -> Result<Tensor> {
    let wide = |x: &Tensor| x.to_dtype(DType::F32);
    let logits = wide(&hidden.matmul(&head.t()?)?)?;
    let teacher = wide(&teacher_hidden.matmul(&teacher_head.t()?)?)?;
    let kl = (reference_divergence(&logits, &teacher, terms.temperature)? * terms.kl)?;
    let hidden = (reference_distance(hidden, teacher_hidden)? * terms.hidden)?;
    Ok(((reference_losses(&logits, targets)? + kl)? + hidden)?)
}

fn refuse_unequal(hidden: &Tensor, head: &Weight, teacher: &Teacher<'_>) -> Result<()> {
    let ((rows, width), (words, _)) = (hidden.dims2()?, head.dims()?);
    let ((of_teacher, teachers_width), (teachers_words, _)) = (teacher.hidden.dims2()?, teacher.head.dims()?);
    let widths_matter = teacher.terms.hidden > 0.0;
    if rows != of_teacher || words != teachers_words || (widths_matter && width != teachers_width) {
        return Err(Error::invalid(format!(
            "the teacher gives {of_teacher} rows of width {teachers_width} over {teachers_words} words, expected {rows} rows \
             of width {width} over {words} words"
        )));
    }
    Ok(())
}

/// The terms `nll` and `kl`.
fn divergence(
    hidden: &Tensor,
    head: &Weight,
    targets: &[u32],
    teacher: &Teacher<'_>,
    scale: f64,
    gradients: &mut Gradients,
) -> Result<(Losses, Saved)> {
    let _time = Op::CrossEntropy.begin();
    let Terms { kl, temperature, .. } = teacher.terms;
    let (parts, saved) = by_chunks(hidden, head, gradients, |rows, logits| {
        let targets = &targets[rows.clone()];
        let theirs = matmul(&teacher.hidden.narrow(0, rows.start, rows.len())?, teacher.head.t())?;
        if logits.device().is_cpu() {
            let factors = Factors { scale: scale as f32, kl: kl as f32, temperature: temperature as f32 };
            return dispatch!(hidden.dtype(), losses_and_gradients(logits, &theirs, targets, factors));
        }
        let (wide, theirs) = (logits.to_dtype(DType::F32)?, theirs.to_dtype(DType::F32)?);
        let nll = reference_losses(&wide, targets)?;
        let of_teacher = reference_divergence(&wide, &theirs, temperature)?;
        let dy = nll.ones_like()?.affine(scale, 0.0)?;
        let d_logits = differentiate(&[&wide], &dy, |v| {
            let of_teacher = reference_divergence(&v[0], &theirs, temperature)?;
            Ok((reference_losses(&v[0], targets)? + (of_teacher * kl)?)?)
        })?;
        let losses = nll.to_vec1::<f32>()?.into_iter().zip(of_teacher.to_vec1::<f32>()?).collect();
        Ok((losses, d_logits[0].to_dtype(hidden.dtype())?))
    })?;
    let (nll, kl) = parts.concat().into_iter().unzip();
    Ok((Losses { nll, kl, hidden: Vec::new() }, saved))
}

#[derive(Clone, Copy)]
struct Factors {
    scale: f32,
    kl: f32,
    temperature: f32,
}

/// `nll` and `kl` of each row, and the gradients of the logits in their place.
fn losses_and_gradients<T: Element>(
    logits: Tensor,
    teacher: &Tensor,
    targets: &[u32],
    factors: Factors,
) -> Result<(Vec<(f32, f32)>, Tensor)> {
    let (shape, vocab) = (logits.dims().to_vec(), logits.dim(1)?);
    let mut values = into_values::<T>(logits)?;
    let theirs = Values::<T>::of(teacher)?;
    let rows = values.par_chunks_mut(vocab).zip(theirs.par_chunks(vocab)).zip(targets);
    let losses = rows
        .map_init(
            || [(); 3].map(|()| vec![0.0f32; vocab]),
            |powers, ((row, theirs), &target)| of_row(row, theirs, target as usize, factors, powers),
        )
        .collect();
    Ok((losses, to_tensor(values, &shape)?))
}

/// `powers` are three buffers as long as a row.
fn of_row<T: Element>(
    row: &mut [T],
    theirs: &[T],
    target: usize,
    Factors { scale, kl, temperature }: Factors,
    [own, soft, of_teacher]: &mut [Vec<f32>; 3],
) -> (f32, f32) {
    let (most, teachers_most, inverse) = (maximum(row), maximum(theirs), temperature.recip());
    let sum = powers_and_sum(own, row, most, 1.0);
    let (soft, soft_sum): (&[f32], f64) = if temperature == 1.0 {
        (own, sum)
    } else {
        let sum = powers_and_sum(soft, row, most, inverse);
        (soft, sum)
    };
    let teachers_sum = powers_and_sum(of_teacher, theirs, teachers_most, inverse);
    let nll = most + sum.ln() as f32 - row[target].widen();
    let gap = mean_gap(of_teacher, (row, most), (theirs, teachers_most)) / teachers_sum;
    let divergence = gap * f64::from(inverse) + (soft_sum / teachers_sum).ln();
    let pull = f64::from(scale * kl * temperature);
    let shares = [f64::from(scale) / sum, pull / soft_sum, pull / teachers_sum].map(|share| share as f32);
    let at =
        |index: usize| own[index] * shares[0] + (soft[index] * shares[1] - of_teacher[index] * shares[2]);
    let of_target = at(target) - scale;
    combined(row, own, soft, of_teacher, shares);
    row[target] = T::narrow(of_target);
    (nll, (f64::from(temperature).powi(2) * divergence) as f32)
}

vectorized! {
    /// The sum of `power ((theirs - their most) - (row - most))`.
    fn mean_gap<T: Element>(powers: &[f32], own: (&[T], f32), theirs: (&[T], f32)) -> f64 {
        let ((row, most), (theirs, teachers_most)) = (own, theirs);
        let mut gaps = [0.0f32; STRETCH];
        let mut sum = 0.0f64;
        for ((powers, row), theirs) in
            powers.chunks(STRETCH).zip(row.chunks(STRETCH)).zip(theirs.chunks(STRETCH))
        {
            for (((gap, power), l), t) in gaps.iter_mut().zip(powers).zip(row).zip(theirs) {
                *gap = power * ((t.widen() - teachers_most) - (l.widen() - most));
            }
            sum += f64::from(self::sum(&gaps[..powers.len()], |gap| gap));
        }
        sum
    }
}

vectorized! {
    fn combined<T: Element>(row: &mut [T], own: &[f32], soft: &[f32], theirs: &[f32], shares: [f32; 3]) -> () {
        let powers = own.iter().zip(soft).zip(theirs);
        for (value, ((own, soft), theirs)) in row.iter_mut().zip(powers) {
            *value = T::narrow(own * shares[0] + (soft * shares[1] - theirs * shares[2]));
        }
    }
}

/// `|h - h_t|^2 / |h_t|^2` of each row, and `d_hidden` with the gradient of `scale * sum` added.
fn distance(hidden: &Tensor, teacher: &Tensor, d_hidden: Tensor, scale: f64) -> Result<(Vec<f32>, Tensor)> {
    if hidden.device().is_cpu() {
        return dispatch!(hidden.dtype(), distances(hidden, teacher, d_hidden, scale as f32));
    }
    let distances = reference_distance(hidden, teacher)?;
    let dy = distances.ones_like()?.affine(scale, 0.0)?;
    let further = differentiate(&[hidden], &dy, |v| reference_distance(&v[0], teacher))?;
    Ok((distances.to_vec1()?, (d_hidden + &further[0])?))
}

fn distances<T: Element>(
    hidden: &Tensor,
    teacher: &Tensor,
    d_hidden: Tensor,
    scale: f32,
) -> Result<(Vec<f32>, Tensor)> {
    let (shape, d) = (hidden.dims().to_vec(), hidden.dim(1)?);
    let (own, theirs) = (hidden.contiguous()?, teacher.contiguous()?);
    let (own, theirs) = (Values::<T>::of(&own)?, Values::<T>::of(&theirs)?);
    let mut gradient = into_values::<T>(d_hidden)?;
    let rows = own.par_chunks(d).zip(theirs.par_chunks(d)).zip(gradient.par_chunks_mut(d));
    let distances =
        rows.map(|((own, theirs), gradient)| row_distance(gradient, own, theirs, scale)).collect();
    Ok((distances, to_tensor(gradient, &shape)?))
}

vectorized! {
    fn row_distance<T: Element>(gradient: &mut [T], own: &[T], theirs: &[T], scale: f32) -> f32 {
        let distance = sum_of_pairs(own, theirs, |x, y| (x - y) * (x - y));
        let size = sum(theirs, |y| y * y).max(f32::MIN_POSITIVE);
        let share = 2.0 * scale / size;
        for ((gradient, x), y) in gradient.iter_mut().zip(own).zip(theirs) {
            *gradient = T::narrow(gradient.widen() + share * (x.widen() - y.widen()));
        }
        distance / size
    }
}

/// `T^2 KL(softmax(teacher / T) || softmax(logits / T))` of each row.
fn reference_divergence(logits: &Tensor, teacher: &Tensor, temperature: f64) -> Result<Tensor> {
    let log_softmax = |x: &Tensor| -> Result<Tensor> {
        let x = (x / temperature)?;
        let x = x.broadcast_sub(&x.max_keepdim(D::Minus1)?.detach())?;
        Ok(x.broadcast_sub(&x.exp()?.sum_keepdim(D::Minus1)?.log()?)?)
    };
    let (own, theirs) = (log_softmax(logits)?, log_softmax(teacher)?);
    Ok((((theirs.exp()? * (theirs - own)?)?.sum(D::Minus1)?) * temperature.powi(2))?)
}

fn reference_distance(hidden: &Tensor, teacher: &Tensor) -> Result<Tensor> {
    let (own, theirs) = (hidden.to_dtype(DType::F32)?, teacher.to_dtype(DType::F32)?);
    Ok(((own - &theirs)?.sqr()?.sum(D::Minus1)? / theirs.sqr()?.sum(D::Minus1)?)?)
}
