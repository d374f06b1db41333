//! What lies below the ops on the CPU: values of a tensor as a slice, element types, rows over threads, products.

mod element;
mod multiply;
mod product;
mod quantized;
mod rows;
mod vectorized;

pub(super) use element::{Element, Values, dispatch, into_values, to_tensor};
pub(super) use multiply::{Factor, Fill, multiply};
pub(super) use product::{Matrix, product};
pub(super) use quantized::{Kind, PART, Row};
pub(super) use rows::{
    Disjoint, alone, ask_for, chunked_sum, for_row_pairs, for_row_triples, for_rows, written,
};
#[cfg(test)]
pub(super) use vectorized::with_each_vectors;
pub(super) use vectorized::{Vectors, exp, largest, sum, sum_of_pairs, sum_of_triples, vectorized};

/// Names the instructions that products and loops over rows use on this machine, such as `amx and avx512`. Machines of
/// another name round differently.
#[must_use]
pub fn kernel_path() -> String {
    let vectors = match Vectors::best() {
        Vectors::Base => "base",
        #[cfg(target_arch = "x86_64")]
        Vectors::Avx2 => "avx2",
        #[cfg(target_arch = "x86_64")]
        Vectors::Avx512 => "avx512",
    };
    format!("{} and {vectors}", multiply::Path::best().name())
}
