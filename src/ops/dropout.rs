//! Inverted dropout whose mask is a pure function of seed, step, module, document, position and column, so that
//! recomputation, pieces of a batch, threads and resumed runs all see the same mask.
//!
//! The generator is SplitMix64's finaliser over a counter: each 64-bit word decides two columns.

use candle_core::Tensor;

use super::kernel::{Element, Values, dispatch, for_rows, to_tensor, vectorized, written};
use super::{Dropout, Op, Pass, add};
use crate::error::Result;

impl Dropout {
    /// Whether anything is dropped in `pass`.
    #[must_use]
    pub fn drops(&self, pass: &Pass<'_>) -> bool {
        self.probability > 0.0 && pass.dropout_step.is_some()
    }
}

/// `x [tokens, d]` with dropped values zero and the others divided by `1 - probability`; `x` itself where nothing is
/// dropped. Its backward is the same function of `dy`.
pub fn apply(x: &Tensor, dropout: &Dropout, pass: &Pass<'_>) -> Result<Tensor> {
    let Some(step) = pass.dropout_step.filter(|_| dropout.probability > 0.0) else {
        return Ok(x.clone());
    };
    let _time = Op::Dropout.begin();
    if x.device().is_cpu() {
        let x = x.contiguous()?;
        return dispatch!(x.dtype(), apply_rows(&x, dropout, step, pass));
    }
    let mask = mask(x.dim(1)?, dropout, step, pass)?;
    Ok((x * mask.to_device(x.device())?.to_dtype(x.dtype())?)?)
}

/// `y + dropout(x)` for `x` in f32, in the type of `y`.
pub fn add_dropped(y: &Tensor, x: &Tensor, dropout: &Dropout, pass: &Pass<'_>) -> Result<Tensor> {
    add(y, &apply(x, dropout, pass)?)
}

/// The factors that `x [tokens, columns]` is multiplied with, f32 on the CPU.
pub fn mask(columns: usize, dropout: &Dropout, step: u64, pass: &Pass<'_>) -> Result<Tensor> {
    let keys = row_keys(dropout, step, pass);
    let mut factors = vec![0.0f32; keys.len() * columns];
    let keep = Keep::new(dropout.probability);
    for_rows(&mut factors, columns, |token, row| {
        for (column, factor) in row.iter_mut().enumerate() {
            *factor = keep.factor(keys[token], column);
        }
    });
    to_tensor(factors, &[keys.len(), columns])
}

/// Numbers between 0 and 1, `columns` for each row of the pass: a pure function of seed, module, step and place, as masks are.
#[must_use]
pub fn uniforms(columns: usize, seed: u64, module: u64, pass: &Pass<'_>) -> Vec<f32> {
    let source = Dropout { probability: 0.0, seed, module };
    let keys = row_keys(&source, pass.dropout_step.unwrap_or(0), pass);
    let number = |key: u64, column: usize| {
        let word = mix(key.wrapping_add((column as u64 + 1).wrapping_mul(GOLDEN)));
        // Half a step from either end, so that a logarithm is finite.
        ((word >> 41) as f32 + 0.5) / (1u32 << 23) as f32
    };
    keys.iter().flat_map(|key| (0..columns).map(move |column| number(*key, column))).collect()
}

/// A number between 0 and 1 that follows from two.
#[must_use]
pub fn hashed(one: u64, other: u64) -> f32 {
    let word = mix(mix(one.wrapping_add(GOLDEN)) ^ other.wrapping_mul(GOLDEN));
    (word >> 40) as f32 / (1u32 << 24) as f32
}

fn apply_rows<T: Element>(x: &Tensor, dropout: &Dropout, step: u64, pass: &Pass<'_>) -> Result<Tensor> {
    let (values, columns) = (Values::<T>::of(x)?, x.dim(1)?);
    let keys = row_keys(dropout, step, pass);
    let keep = Keep::new(dropout.probability);
    let values: &[T] = &values;
    let y = written(values.len(), |y| {
        for_rows(y, columns, |token, row| {
            drop_row(row, &values[token * columns..][..columns], keys[token], keep.threshold, keep.factor);
        });
    });
    to_tensor(y, x.dims())
}

/// Columns whose bits are drawn at once.
const STRETCH: usize = 128;

vectorized! {
    /// The same factors as [`Keep::factor`] gives one by one.
    fn drop_row<T: Element>(y: &mut [T], x: &[T], key: u64, threshold: u32, factor: f32) {
        let mut words = [0u64; STRETCH / 2];
        let mut bits = [0u32; STRETCH];
        for (stretch, (y, x)) in y.chunks_mut(STRETCH).zip(x.chunks(STRETCH)).enumerate() {
            for (i, word) in words.iter_mut().enumerate() {
                let number = (stretch * STRETCH / 2 + i) as u64 + 1;
                *word = mix(key.wrapping_add(number.wrapping_mul(GOLDEN)));
            }
            for (pair, word) in bits.chunks_exact_mut(2).zip(&words) {
                pair[0] = *word as u32;
                pair[1] = (*word >> 32) as u32;
            }
            for ((y, x), bits) in y.iter_mut().zip(x).zip(&bits) {
                *y = T::narrow(x.widen() * if *bits < threshold { 0.0 } else { factor });
            }
        }
    }
}

struct Keep {
    threshold: u32,
    factor: f32,
}

impl Keep {
    fn new(probability: f64) -> Self {
        let threshold = (probability * 4_294_967_296.0).min(4_294_967_295.0) as u32;
        Self { threshold, factor: (1.0 / (1.0 - probability)) as f32 }
    }

    #[inline(always)]
    fn factor(&self, key: u64, column: usize) -> f32 {
        let word = mix(key.wrapping_add((column as u64 / 2 + 1).wrapping_mul(GOLDEN)));
        let bits = (word >> (32 * (column as u64 & 1))) as u32;
        if bits < self.threshold { 0.0 } else { self.factor }
    }
}

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// SplitMix64's finaliser.
#[inline(always)]
fn mix(mut word: u64) -> u64 {
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

fn row_keys(dropout: &Dropout, step: u64, pass: &Pass<'_>) -> Vec<u64> {
    let chain = |key: u64, next: u64| mix(key.wrapping_add(GOLDEN) ^ mix(next.wrapping_add(GOLDEN)));
    let run = chain(chain(mix(dropout.seed), dropout.module), step);
    pass.places()
        .into_iter()
        .map(|(document, position)| chain(chain(run, document), u64::from(position)))
        .collect()
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;
    use crate::ops::Documents;

    const DROPOUT: Dropout = Dropout { probability: 0.25, seed: 7, module: 3 };

    fn rows(documents: &Documents) -> Vec<Vec<f32>> {
        let pass = Pass::training(documents, Some(5));
        mask(64, &DROPOUT, 5, &pass).unwrap().to_vec2().unwrap()
    }

    #[test]
    fn a_document_has_its_mask_wherever_it_stands() {
        let together = rows(&Documents::new(vec![0, 3, 8], vec![11, 22]));
        let alone = rows(&Documents::new(vec![0, 5], vec![22]));
        assert_eq!(together[3..], alone[..]);
        assert_ne!(together[0], together[3]);
    }

    #[test]
    fn the_share_dropped_is_the_probability_and_the_mean_stays() {
        let documents = Documents::new(vec![0, 1000], vec![1]);
        let factors: Vec<f32> = rows(&documents).concat();
        let dropped = factors.iter().filter(|f| **f == 0.0).count() as f64 / factors.len() as f64;
        assert!((dropped - 0.25).abs() < 0.01, "{dropped}");
        let mean = factors.iter().sum::<f32>() / factors.len() as f32;
        assert!((mean - 1.0).abs() < 0.015, "{mean}");
    }

    #[test]
    fn applying_is_multiplying_with_the_mask_and_no_step_is_no_dropout() {
        let documents = Documents::new(vec![0, 4], vec![9]);
        let x = Tensor::rand(-1f32, 1.0, (4, 301), &Device::Cpu).unwrap();
        let pass = Pass::training(&documents, Some(2));
        let expected = (&x * mask(301, &DROPOUT, 2, &pass).unwrap()).unwrap();
        let found = apply(&x, &DROPOUT, &pass).unwrap();
        assert_eq!(found.to_vec2::<f32>().unwrap(), expected.to_vec2::<f32>().unwrap());
        let same = apply(&x, &DROPOUT, &Pass::inference(&documents)).unwrap();
        assert_eq!(same.to_vec2::<f32>().unwrap(), x.to_vec2::<f32>().unwrap());
    }
}
