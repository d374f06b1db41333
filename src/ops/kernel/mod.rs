//! What lies below the ops on the CPU: values of a tensor as a slice, element types, rows over threads, products.

mod element;
mod multiply;
mod product;
mod rows;

pub(super) use element::{Element, Values, dispatch, to_tensor};
pub(super) use multiply::{Factor, Target, multiply};
#[expect(unused_imports, reason = "for attention and for weights that stay quantized")]
pub(super) use multiply::{Fill, Out, multiply_here};
pub(super) use product::{Matrix, product};
pub(super) use rows::{Disjoint, chunked_sum, for_row_pairs, for_rows};
