//! What lies below the ops on the CPU: values of a tensor as a slice, element types, rows over threads, products.

mod element;
mod multiply;
mod product;
mod quantized;
mod rows;
mod vectorized;

use std::fmt;

use crate::error::{Error, Result};
use multiply::{Choice, Path, candidates, measure};

pub(super) use element::{Element, Values, dispatch, into_values, to_tensor};
pub(super) use multiply::{Factor, Fill, multiply, rows_alike};
pub(super) use product::{Matrix, product};
pub(super) use quantized::{Kind, PART, Row};
pub(super) use rows::{
    Disjoint, alone, ask_for, chunked_sum, for_row_pairs, for_row_triples, for_rows, written,
};
#[cfg(test)]
pub(super) use vectorized::with_each_vectors;
pub(super) use vectorized::{Vectors, exp, largest, sum, sum_of_pairs, sum_of_triples, vectorized};

/// The instructions that products use, by name: `amx`, `avx512-bf16`, `avx512`, `avx2` or `portable`. Results of different
/// names differ in their last bits, but those of `avx512` and `avx2` in f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kernels(Choice);

/// How fast instructions multiply, in multiply-adds per second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct KernelRate {
    /// The name of the instructions.
    pub name: &'static str,
    /// With all factors in f32; `None` where the next older instructions multiply them.
    pub f32: Option<f64>,
    /// With all factors in bf16.
    pub bf16: f64,
}

impl Kernels {
    /// Those that the environment variable `PEFT_KERNELS` names, if it is set.
    ///
    /// # Errors
    /// Fails if it names none, or one that this machine lacks.
    pub fn forced() -> Result<Option<Self>> {
        match Path::forced() {
            Ok(forced) => Ok(forced.map(|path| Self(Choice { wide: path, narrow: path }))),
            Err([message, hint]) => Err(Error::request(message).with_hint(hint)),
        }
    }

    /// Those of these names for f32 and for bf16, if this machine has them.
    #[must_use]
    pub fn named(f32: &str, bf16: &str) -> Option<Self> {
        Some(Self(Choice { wide: Path::named(f32)?, narrow: Path::named(bf16)? }))
    }

    /// Those that this process uses: the newest of this machine, unless others are forced or adopted.
    #[must_use]
    pub fn current() -> Self {
        Self(Choice::current())
    }

    /// Uses these from now on and returns them, or those in use if anything has been multiplied before.
    #[must_use]
    pub fn adopt(self) -> Self {
        Self(self.0.adopt())
    }

    /// The names among which this machine has a choice.
    #[must_use]
    pub fn candidates() -> Vec<&'static str> {
        candidates().iter().map(|path| path.name()).collect()
    }

    /// Finds the fastest for weights of `outputs` rows by `inputs` columns. It takes 80 ms for each candidate.
    #[must_use]
    pub fn measure(inputs: usize, outputs: usize) -> (Self, Vec<KernelRate>) {
        let (choice, [wide, narrow]) = measure(inputs, outputs);
        let rates = narrow.iter().map(|(path, bf16)| KernelRate {
            name: path.name(),
            f32: wide.iter().find(|(other, _)| other == path).map(|(_, rate)| *rate),
            bf16: *bf16,
        });
        (Self(choice), rates.collect())
    }

    /// The name for products without bf16.
    #[must_use]
    pub fn f32(self) -> &'static str {
        self.0.wide.name()
    }

    /// The name for products in which a factor is bf16.
    #[must_use]
    pub fn bf16(self) -> &'static str {
        self.0.narrow.name()
    }
}

impl fmt::Display for Kernels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.f32(), self.bf16()) {
            (wide, narrow) if wide == narrow => f.write_str(wide),
            (wide, narrow) => write!(f, "{narrow} for bf16 and {wide} for f32"),
        }
    }
}
