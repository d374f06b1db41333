//! Loops over rows, compiled for the vectors of several machines and chosen when the program runs.
//!
//! Only the width differs: nothing is contracted or reordered, so every machine computes the same bits.

use std::sync::LazyLock;

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
    /// The widest.
    #[inline]
    pub(crate) fn best() -> Self {
        static BEST: LazyLock<Vectors> = LazyLock::new(|| {
            #[cfg(target_arch = "x86_64")]
            {
                if is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                {
                    return Vectors::Avx512;
                }
                if is_x86_feature_detected!("avx2") {
                    return Vectors::Avx2;
                }
            }
            Vectors::Base
        });
        *BEST
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
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
            fn avx512 $(<$($generic: $bound),+>)? ($($argument: $type),*) $(-> $result)? {
                body($($argument),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[allow(clippy::allow_attributes, clippy::too_many_arguments, reason = "as above")]
            #[target_feature(enable = "avx2")]
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

/// `e^x` with a relative error below 2e-7; infinity above 88.73, zero below -87.33, NaN of NaN.
///
/// `x = n ln 2 + r` with `|r| <= ln 2 / 2`, and `e^r` by its Taylor polynomial of degree 7.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    /// Added and taken away again, it rounds to a whole number, which stands in the lowest bits in between.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts; the first has so few digits that its products with `n` are exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    let mut p = 1.0 / 5040.0;
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = p * r + coefficient;
    }
    let power = shifted.to_bits() << 23;
    let scaled = f32::from_bits(p.to_bits().wrapping_add(power));
    let finite = if x < -87.33 { 0.0 } else { scaled };
    if x > 88.72 {
        f32::INFINITY
    } else if x.is_nan() {
        x
    } else {
        finite
    }
}

/// A sum over `0..len` in 16 lanes, so that it vectorises and does not depend on the machine.
#[inline(always)]
pub(crate) fn sum_of(len: usize, f: impl Fn(usize) -> f32) -> f32 {
    let mut lanes = [0.0f32; 16];
    let whole = len / 16 * 16;
    for start in (0..whole).step_by(16) {
        for (lane, value) in lanes.iter_mut().enumerate() {
            *value += f(start + lane);
        }
    }
    let mut sum = 0.0;
    for i in whole..len {
        sum += f(i);
    }
    for lane in lanes {
        sum += lane;
    }
    sum
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
    fn exp_at_the_ends() {
        let mut ends = [f32::NEG_INFINITY, -1e30, -100.0, 0.0, 100.0, 1e30, f32::INFINITY, f32::NAN, -0.0];
        powers(&mut ends);
        assert_eq!(ends[..7], [0.0, 0.0, 0.0, 1.0, f32::INFINITY, f32::INFINITY, f32::INFINITY]);
        assert!(ends[7].is_nan() && ends[8] == 1.0);
    }
}
