//! Loops over rows, compiled for the vectors of several machines and chosen when the program runs.
//!
//! Only the width differs: nothing is contracted that does not say so, nothing reordered, so every machine computes the
//! same bits; one without fused multiply-add computes them slowly.

use super::Element;
use super::multiply::Path;

/// The vectors that this machine has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Vectors {
    /// What every machine of this architecture has.
    Base,
    /// 256 bits.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// 512 bits.
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Vectors {
    /// Those that the path of products has.
    #[inline]
    pub(crate) fn best() -> Self {
        #[cfg(test)]
        if let Some(forced) = FORCED.get() {
            return forced;
        }
        match Path::best() {
            #[cfg(target_arch = "x86_64")]
            Path::Amx | Path::Avx512Bf16 | Path::Avx512 => Self::Avx512,
            #[cfg(target_arch = "x86_64")]
            Path::Avx2 => Self::Avx2,
            Path::Portable => Self::Base,
        }
    }
}

#[cfg(test)]
thread_local! {
    /// What a test wants used on its thread.
    static FORCED: std::cell::Cell<Option<Vectors>> = const { std::cell::Cell::new(None) };
}

/// Calls `f` with each of the vectors that this machine has.
#[cfg(test)]
pub(crate) fn with_each_vectors(mut f: impl FnMut(Vectors)) {
    let best = Vectors::best();
    let all = [
        (Vectors::Base, true),
        #[cfg(target_arch = "x86_64")]
        (Vectors::Avx2, best != Vectors::Base),
        #[cfg(target_arch = "x86_64")]
        (Vectors::Avx512, best == Vectors::Avx512),
    ];
    let _ = best;
    for (vectors, _) in all.into_iter().filter(|(_, is_here)| *is_here) {
        FORCED.set(Some(vectors));
        f(vectors);
        FORCED.set(None);
    }
}

/// Declares a function whose body is compiled once for each of [`Vectors`]. What it calls must be `#[inline(always)]`.
macro_rules! vectorized {
    (
        $(#[$attribute:meta])*
        $visibility:vis fn $name:ident $(<$($generic:ident : $bound:ident),+>)? (
            $($argument:ident : $type:ty),* $(,)?
        ) $(-> $result:ty)? $body:block
    ) => {
        $(#[$attribute])*
        #[allow(clippy::allow_attributes, clippy::too_many_arguments, reason = "rows of several matrices")]
        #[inline]
        $visibility fn $name $(<$($generic: $bound),+>)? ($($argument: $type),*) $(-> $result)? {
            #[allow(clippy::allow_attributes, clippy::too_many_arguments, reason = "as above")]
            #[inline(always)]
            fn body $(<$($generic: $bound),+>)? ($($argument: $type),*) $(-> $result)? $body

            #[cfg(target_arch = "x86_64")]
            #[allow(clippy::allow_attributes, clippy::too_many_arguments, reason = "as above")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,fma")]
            fn avx512 $(<$($generic: $bound),+>)? ($($argument: $type),*) $(-> $result)? {
                body($($argument),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[allow(clippy::allow_attributes, clippy::too_many_arguments, reason = "as above")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2 $(<$($generic: $bound),+>)? ($($argument: $type),*) $(-> $result)? {
                body($($argument),*)
            }

            match $crate::ops::kernel::Vectors::best() {
                // SAFETY: the machine has been found to have them.
                #[cfg(target_arch = "x86_64")]
                $crate::ops::kernel::Vectors::Avx512 => unsafe { avx512($($argument),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::ops::kernel::Vectors::Avx2 => unsafe { avx2($($argument),*) },
                $crate::ops::kernel::Vectors::Base => body($($argument),*),
            }
        }
    };
}
pub(crate) use vectorized;

/// `e^x` with a relative error below 2e-7; 3e38 above 88.7, zero below -87.3, NaN of NaN.
///
/// `x = n ln 2 + r` with `|r| <= ln 2 / 2`, and `e^r` by the polynomial of degree 6 whose largest relative error is smallest.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    /// Added and taken away again, it rounds to a whole number, which stands in the lowest bits in between.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts; the first has so few digits that its products with `n` are exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Written so that a NaN stays.
    let bounded = if x > 88.7 { 88.7 } else { x };
    let shifted = bounded.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, bounded));
    let mut p = 1.383_653_4e-3f32;
    for coefficient in [8.375_064e-3, 4.166_824_4e-2, 0.166_664_17, 0.499_999_9, 1.0, 1.0] {
        p = p.mul_add(r, coefficient);
    }
    let scaled = f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23));
    if x < -87.3 {
        0.0
    } else if x.is_nan() {
        x
    } else {
        scaled
    }
}

/// Values that are summed side by side, so that sums vectorise and do not depend on the machine. So many that the
/// compiler makes a loop of them and not single steps.
const LANES: usize = 64;

/// The sum of `f(x)`.
#[inline(always)]
pub(crate) fn sum<T: Element>(x: &[T], f: impl Fn(f32) -> f32) -> f32 {
    let (whole, rest) = x.as_chunks::<LANES>();
    let mut lanes = [0.0f32; LANES];
    for x in whole {
        for (lane, x) in lanes.iter_mut().zip(x) {
            *lane += f(x.widen());
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane += f(x.widen());
    }
    folded(lanes, |x, y| x + y)
}

/// The sum of `f(x, y)` over pairs.
#[inline(always)]
pub(crate) fn sum_of_pairs<T: Element>(x: &[T], y: &[T], f: impl Fn(f32, f32) -> f32) -> f32 {
    let ((whole_x, rest_x), (whole_y, rest_y)) = (x.as_chunks::<LANES>(), y.as_chunks::<LANES>());
    let mut lanes = [0.0f32; LANES];
    for (x, y) in whole_x.iter().zip(whole_y) {
        for ((lane, x), y) in lanes.iter_mut().zip(x).zip(y) {
            *lane += f(x.widen(), y.widen());
        }
    }
    for ((lane, x), y) in lanes.iter_mut().zip(rest_x).zip(rest_y) {
        *lane += f(x.widen(), y.widen());
    }
    folded(lanes, |x, y| x + y)
}

/// The sum of `f(x, y, z)` over triples.
#[inline(always)]
pub(crate) fn sum_of_triples<T: Element>(x: &[T], y: &[T], z: &[T], f: impl Fn(f32, f32, f32) -> f32) -> f32 {
    let ((whole_x, rest_x), (whole_y, rest_y)) = (x.as_chunks::<LANES>(), y.as_chunks::<LANES>());
    let (whole_z, rest_z) = z.as_chunks::<LANES>();
    let mut lanes = [0.0f32; LANES];
    for ((x, y), z) in whole_x.iter().zip(whole_y).zip(whole_z) {
        for (((lane, x), y), z) in lanes.iter_mut().zip(x).zip(y).zip(z) {
            *lane += f(x.widen(), y.widen(), z.widen());
        }
    }
    for (((lane, x), y), z) in lanes.iter_mut().zip(rest_x).zip(rest_y).zip(rest_z) {
        *lane += f(x.widen(), y.widen(), z.widen());
    }
    folded(lanes, |x, y| x + y)
}

/// The largest value, [`f32::NEG_INFINITY`] of none. A NaN may be passed over.
#[inline(always)]
pub(crate) fn largest<T: Element>(x: &[T]) -> f32 {
    let larger = |x: f32, y: f32| if x > y { x } else { y };
    let (whole, rest) = x.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for x in whole {
        for (lane, x) in lanes.iter_mut().zip(x) {
            *lane = larger(x.widen(), *lane);
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane = larger(x.widen(), *lane);
    }
    folded(lanes, larger)
}

/// Halves are combined until one value is left. Each step has arrays of its own: then it is a vector operation.
#[inline(always)]
fn folded(lanes: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    macro_rules! halve {
        ($lanes:ident, $half:literal) => {{
            let mut low = [0.0f32; $half];
            for (i, value) in low.iter_mut().enumerate() {
                *value = f($lanes[i], $lanes[i + $half]);
            }
            low
        }};
    }
    let lanes = halve!(lanes, 32);
    let lanes = halve!(lanes, 16);
    let lanes = halve!(lanes, 8);
    let lanes = halve!(lanes, 4);
    f(f(lanes[0], lanes[2]), f(lanes[1], lanes[3]))
}

#[cfg(test)]
mod tests {
    use super::*;

    vectorized! {
        fn powers(values: &mut [f32]) {
            for value in values {
                *value = exp(*value);
            }
        }
    }

    #[test]
    fn exp_is_exp() {
        let inputs: Vec<f32> = (-87_300..88_700).map(|i| i as f32 * 1e-3 + 0.000_37).collect();
        let mut found = inputs.clone();
        powers(&mut found);
        for (x, y) in inputs.iter().zip(&found) {
            let expected = f64::from(*x).exp();
            assert!((f64::from(*y) - expected).abs() <= 2e-7 * expected, "exp({x}) = {y}, not {expected}");
        }
    }

    #[test]
    fn all_vectors_compute_the_same_bits() {
        use candle_core::{DType, Device, Tensor};

        use crate::ops::{Activation, Gradients, Parameter, Trainables, glu, rms_norm};

        for dtype in [DType::F32, DType::BF16] {
            let random =
                || Tensor::rand(-4f32, 4.0, (3, 301), &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
            let (x, y, dy) = (random(), random(), random());
            let weight = Parameter::new("w", &x.narrow(0, 0, 1).unwrap().squeeze(0).unwrap());
            let mut first: Option<Vec<Vec<f32>>> = None;
            with_each_vectors(|vectors| {
                let (unit, saved) = glu::forward(x.clone(), y.clone(), Activation::Silu).unwrap();
                let (_, d_gate, d_up) = glu::backward(&saved, Activation::Silu, &dy, None).unwrap();
                let (sum, norm, saved) = rms_norm::forward_of_sum(&x, &y, &weight, 1e-5).unwrap();
                let mut gradients = Gradients::of(&Trainables::new());
                let dx = rms_norm::backward(&saved, &weight, 1e-5, &dy, Some(&sum), &mut gradients).unwrap();
                let found: Vec<Vec<f32>> = [unit, d_gate, d_up, sum, norm, dx]
                    .iter()
                    .map(|t| t.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap())
                    .collect();
                match &first {
                    None => first = Some(found),
                    Some(first) => assert_eq!(&found, first, "{vectors:?}"),
                }
            });
        }
    }

    #[test]
    fn exp_at_the_ends() {
        let mut ends = [f32::NEG_INFINITY, -1e30, -100.0, 0.0, 100.0, 1e30, f32::INFINITY, f32::NAN, -0.0];
        powers(&mut ends);
        assert_eq!(ends[..4], [0.0, 0.0, 0.0, 1.0]);
        assert!(ends[4..7].iter().all(|end| *end > 3e38));
        assert!(ends[7].is_nan() && ends[8] == 1.0);
    }
}
