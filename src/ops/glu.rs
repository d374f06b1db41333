//! Gated linear unit: `y = activation(gate) * up`, all `[tokens, width]`. With SiLU it is SwiGLU.

use candle_core::Tensor;

use super::kernel::{
    Element, Values, dispatch, exp, for_row_triples, for_rows, to_tensor, vectorized, written,
};
use super::{Op, differentiate};
use crate::error::Result;

/// The activation of a gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`: SwiGLU.
    Silu,
    /// `x * Phi(x)`, with the error function.
    Gelu,
    /// The tanh approximation of `Gelu`.
    GeluTanh,
    /// `max(x, 0)`.
    Relu,
    /// `1 / (1 + exp(-x))`: the original GLU.
    Sigmoid,
    /// `x`: a bilinear unit.
    Identity,
}

/// What the backward needs.
#[derive(Debug, Clone)]
pub struct Saved {
    gate: Tensor,
    up: Tensor,
}

/// `y`, and what the backward needs.
pub fn forward(gate: Tensor, up: Tensor, activation: Activation) -> Result<(Tensor, Saved)> {
    let saved = Saved { gate: gate.contiguous()?, up: up.contiguous()? };
    Ok((value(&saved, activation)?, saved))
}

/// `y` again, from what the backward needs.
pub fn value(saved: &Saved, activation: Activation) -> Result<Tensor> {
    let _time = Op::Glu.begin();
    let Saved { gate, up } = saved;
    if gate.device().is_cpu() {
        dispatch!(gate.dtype(), forward_rows(gate, up, activation))
    } else {
        reference(gate, up, activation)
    }
}

/// `(y, d_gate, d_up)`, with `y` once more, `d_up = dy activation(gate)` and `d_gate = dy up activation'(gate)`; where there are
/// `factors`, `dy` is multiplied with those of its rows first.
pub fn backward(
    saved: &Saved,
    activation: Activation,
    dy: &Tensor,
    factors: Option<&[f32]>,
) -> Result<(Tensor, Tensor, Tensor)> {
    let _time = Op::Glu.begin();
    let (gate, up, dy) = (&saved.gate, &saved.up, dy.contiguous()?);
    if gate.device().is_cpu() {
        return dispatch!(gate.dtype(), backward_rows(gate, up, (&dy, factors), activation));
    }
    let dy = match factors {
        Some(factors) => super::groups::scale_rows(&dy, factors)?,
        None => dy,
    };
    let mut both = differentiate(&[gate, up], &dy, |v| reference(&v[0], &v[1], activation))?;
    let d_up = both.remove(1);
    Ok((reference(gate, up, activation)?, both.remove(0), d_up))
}

/// The same composed of candle primitives, in f32.
pub fn reference(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    let x = gate.to_dtype(candle_core::DType::F32)?;
    let sigmoid = |x: &Tensor| -> Result<Tensor> { Ok((x.neg()?.exp()? + 1.0)?.recip()?) };
    let active = match activation {
        Activation::Silu => (&x * sigmoid(&x)?)?,
        Activation::Gelu => x.gelu_erf()?,
        Activation::GeluTanh => x.gelu()?,
        Activation::Relu => x.relu()?,
        Activation::Sigmoid => sigmoid(&x)?,
        Activation::Identity => x,
    };
    Ok((active * up.to_dtype(candle_core::DType::F32)?)?.to_dtype(gate.dtype())?)
}

/// `activation(x)` and its derivative.
#[inline(always)]
fn value_and_slope(activation: Activation, x: f32) -> (f32, f32) {
    match activation {
        Activation::Silu => {
            let s = 1.0 / (1.0 + exp(-x));
            (x * s, s * (1.0 + x * (1.0 - s)))
        }
        Activation::Gelu => {
            let phi = 0.5 * (1.0 + libm::erff(x * std::f32::consts::FRAC_1_SQRT_2));
            let density = 0.398_942_3 * exp(-0.5 * x * x);
            (x * phi, phi + x * density)
        }
        Activation::GeluTanh => {
            const C: f32 = 0.797_884_6;
            let inner = C * (x + 0.044_715 * x * x * x);
            // tanh by the exponential of what is negative, which cannot overflow.
            let power = exp(-2.0 * inner.abs());
            let t = ((1.0 - power) / (1.0 + power)).copysign(inner);
            let slope = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * C * (1.0 + 0.134_145 * x * x);
            (0.5 * x * (1.0 + t), slope)
        }
        // Written so that NaN passes through, which `max` would swallow.
        Activation::Relu => (if x < 0.0 { 0.0 } else { x }, if x > 0.0 { 1.0 } else { 0.0 }),
        Activation::Sigmoid => {
            let s = 1.0 / (1.0 + exp(-x));
            (s, s * (1.0 - s))
        }
        Activation::Identity => (x, 1.0),
    }
}

/// Calls `$function(activation, ..)` with an activation that is known in each call, so that its loop has no choice in it.
macro_rules! for_each_activation {
    ($activation:expr, $function:ident ( $($argument:expr),* )) => {
        match $activation {
            Activation::Silu => $function(Activation::Silu, $($argument),*),
            Activation::Gelu => $function(Activation::Gelu, $($argument),*),
            Activation::GeluTanh => $function(Activation::GeluTanh, $($argument),*),
            Activation::Relu => $function(Activation::Relu, $($argument),*),
            Activation::Sigmoid => $function(Activation::Sigmoid, $($argument),*),
            Activation::Identity => $function(Activation::Identity, $($argument),*),
        }
    };
}

#[inline(always)]
fn forward_with<T: Element>(activation: Activation, y: &mut [T], gate: &[T], up: &[T]) {
    for ((y, gate), up) in y.iter_mut().zip(gate).zip(up) {
        *y = T::narrow(value_and_slope(activation, gate.widen()).0 * up.widen());
    }
}

vectorized! {
    fn forward_row<T: Element>(activation: Activation, y: &mut [T], gate: &[T], up: &[T]) {
        for_each_activation!(activation, forward_with(y, gate, up));
    }
}

#[inline(always)]
fn backward_with<T: Element>(
    activation: Activation,
    [y, d_gate, d_up]: [&mut [T]; 3],
    [gate, up, dy]: [&[T]; 3],
    factor: f32,
) {
    let d = y.len();
    let (d_gate, d_up, gate, up, dy) = (&mut d_gate[..d], &mut d_up[..d], &gate[..d], &up[..d], &dy[..d]);
    for i in 0..d {
        let (value, slope) = value_and_slope(activation, gate[i].widen());
        let (up, dy) = (up[i].widen(), dy[i].widen() * factor);
        y[i] = T::narrow(value * up);
        d_gate[i] = T::narrow(dy * up * slope);
        d_up[i] = T::narrow(dy * value);
    }
}

vectorized! {
    fn backward_row<T: Element>(activation: Activation, to: [&mut [T]; 3], from: [&[T]; 3], factor: f32) {
        for_each_activation!(activation, backward_with(to, from, factor));
    }
}

fn forward_rows<T: Element>(gate: &Tensor, up: &Tensor, activation: Activation) -> Result<Tensor> {
    let (gates, ups) = (Values::<T>::of(gate)?, Values::<T>::of(up)?);
    let (gates, ups): (&[T], &[T]) = (&gates, &ups);
    let width = gate.dim(1)?;
    let y = written(gates.len(), |y| {
        for_rows(y, width, |token, row| {
            forward_row(activation, row, &gates[token * width..][..width], &ups[token * width..][..width]);
        });
    });
    to_tensor(y, gate.dims())
}

fn backward_rows<T: Element>(
    gate: &Tensor,
    up: &Tensor,
    (dy, factors): (&Tensor, Option<&[f32]>),
    activation: Activation,
) -> Result<(Tensor, Tensor, Tensor)> {
    let (gates, ups, dys) = (Values::<T>::of(gate)?, Values::<T>::of(up)?, Values::<T>::of(dy)?);
    let from: [&[T]; 3] = [&gates, &ups, &dys];
    let width = gate.dim(1)?;
    let len = gates.len();
    let (mut d_gate, mut d_up) = (Vec::new(), Vec::new());
    let y = written(len, |y| {
        d_gate = written(len, |d_gate| {
            d_up = written(len, |d_up| {
                for_row_triples([y, d_gate, d_up], width, |token, to| {
                    let row = token * width..(token + 1) * width;
                    let factor = factors.map_or(1.0, |factors| factors[token]);
                    backward_row(activation, to, from.map(|values| &values[row.clone()]), factor);
                });
            });
        });
    });
    let shape = gate.dims();
    Ok((to_tensor(y, shape)?, to_tensor(d_gate, shape)?, to_tensor(d_up, shape)?))
}
