//! One integration binary, a file per promise.

mod adapter;
