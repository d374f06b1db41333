//! Products with sums in f32 on the calling thread: for ops that split their work over threads themselves.

use super::multiply::{Factor, Out, Target, multiply_here};

/// A matrix inside a slice.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a>(Factor<'a>);

impl<'a> Matrix<'a> {
    /// Rows of `columns` values, beginning `stride` apart.
    pub(crate) fn rows<T: Target>(values: &'a [T], rows: usize, columns: usize, stride: usize) -> Self {
        Self(Factor::strided(values, rows, columns, stride))
    }

    /// The same values with rows and columns exchanged.
    pub(crate) fn t(self) -> Self {
        Self(self.0.t())
    }
}

/// `c = beta c + alpha a b` for `c` with rows of `b.columns` values end to end; `beta` 0 does not read `c`.
pub(crate) fn product(c: &mut [f32], beta: f32, alpha: f32, a: Matrix<'_>, b: Matrix<'_>) {
    let (m, n) = (a.0.rows(), b.0.columns());
    assert_eq!(Some(c.len()), m.checked_mul(n), "values of a {m}x{n} product");
    multiply_here(Out::rows(c, n), beta, alpha, &[(a.0, b.0)]);
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    #[test]
    fn sizes_that_wrap_are_refused() {
        let values = [1.0f32; 16];
        // `(rows - 1) * stride` is 0 modulo 2^64.
        assert!(catch_unwind(|| Matrix::rows(&values, 5, 4, 1 << 62)).is_err());
        assert!(catch_unwind(|| Matrix::rows(&values, 2, 16, usize::MAX)).is_err());
        // No values, and so as many rows or columns as anybody likes: their product is 0 modulo 2^64.
        let tall = Matrix::rows(&values, 1 << 60, 0, 0);
        let nothing = AssertUnwindSafe(|| product(&mut [], 0.0, 1.0, tall, tall.t()));
        assert!(catch_unwind(nothing).is_err());
        let mut c = [0.0f32; 16];
        product(&mut c, 0.0, 1.0, Matrix::rows(&values, 4, 4, 4), Matrix::rows(&values, 4, 4, 4));
        assert_eq!(c, [4.0; 16]);
    }
}
