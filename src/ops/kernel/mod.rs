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
