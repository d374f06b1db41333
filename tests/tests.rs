//! One integration binary, a file per promise.
