//! Matrix products on slices, on the calling thread: for ops that split their work over threads themselves.

use half::bf16;

use super::Element;
use super::multiply::{Factor, Out, multiply_here};

/// A matrix inside a slice: `rows x columns`, with the distances between neighbours.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a, T> {
    values: &'a [T],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a, T> Matrix<'a, T> {
    /// Rows end to end, each `columns` long, beginning `stride` apart.
    pub(crate) fn rows(values: &'a [T], rows: usize, columns: usize, stride: usize) -> Self {
        let matrix = Self { values, rows, columns, row_stride: stride, column_stride: 1 };
        matrix.check();
        matrix
    }

    /// The same values with rows and columns exchanged.
    pub(crate) fn t(self) -> Self {
        Self {
            values: self.values,
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
        }
    }

    fn check(&self) {
        let last = self.rows.saturating_sub(1) * self.row_stride
            + self.columns.saturating_sub(1) * self.column_stride;
        assert!(
            self.rows == 0 || self.columns == 0 || last < self.values.len(),
            "a {}x{} matrix with strides {} and {} in {} values",
            self.rows,
            self.columns,
            self.row_stride,
            self.column_stride,
            self.values.len()
        );
    }
}

impl<'a> Matrix<'a, bf16> {
    fn factor(self) -> Factor<'a> {
        if self.column_stride == 1 {
            Factor::strided(self.values, self.rows, self.columns, self.row_stride)
        } else {
            Factor::strided(self.values, self.columns, self.rows, self.column_stride).t()
        }
    }
}

/// `c = beta c + alpha a b` for `c` with rows of `b.columns` values end to end; `beta` 0 does not read `c`.
pub(crate) fn product<T: Element>(c: &mut [f32], beta: f32, alpha: f32, a: Matrix<'_, T>, b: Matrix<'_, T>) {
    T::product(c, beta, alpha, a, b);
}

/// [`product`] of bf16, with sums in f32.
pub(super) fn of_bf16(c: &mut [f32], beta: f32, alpha: f32, a: Matrix<'_, bf16>, b: Matrix<'_, bf16>) {
    let columns = b.columns;
    assert_eq!(c.len(), a.rows * columns, "values of a {}x{columns} product", a.rows);
    multiply_here(Out::rows(c, columns), beta, alpha, &[(a.factor(), b.factor())]);
}

/// [`product`] of f32.
pub(super) fn of_f32(c: &mut [f32], beta: f32, alpha: f32, a: Matrix<'_, f32>, b: Matrix<'_, f32>) {
    let (m, n, k) = (a.rows, b.columns, a.columns);
    assert_eq!(k, b.rows, "inner dimensions of a product");
    assert_eq!(c.len(), m * n, "values of a {m}x{n} product");
    if m == 0 || n == 0 {
        return;
    }
    // SAFETY: `Matrix::rows` and the assertions above hold all three inside their slices; `c` is borrowed mutably, so
    // it overlaps neither operand. Strides fit into isize because slices do.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            n as isize,
            beta != 0.0,
            a.values.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.values.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            beta,
            alpha,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}
