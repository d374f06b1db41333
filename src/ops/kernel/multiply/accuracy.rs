//! Products of f32 at the accuracy of f32: every path against sums in f64 and against the `gemm` crate.

use half::bf16;

use super::{Crew, Factor, Fill, Out, Path, Target, multiply_by};

/// Uniform in -1..1 with all bits of the significand in use.
fn values(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 20) as f64 / (1u64 << 43) as f64 - 1.0
    };
    (0..len).map(|_| next() as f32).collect()
}

/// A matrix stored one way or the other.
#[derive(Clone)]
struct Matrix {
    values: Vec<f32>,
    rows: usize,
    columns: usize,
    turned: bool,
}

impl Matrix {
    fn new(rows: usize, columns: usize, turned: bool, seed: u64) -> Self {
        Self { values: values(rows * columns, seed), rows, columns, turned }
    }

    fn place(&self, row: usize, column: usize) -> usize {
        if self.turned { column * self.rows + row } else { row * self.columns + column }
    }

    fn at(&self, row: usize, column: usize) -> f32 {
        self.values[self.place(row, column)]
    }

    fn factor(&self) -> Factor<'_> {
        if self.turned {
            Factor::f32(&self.values, self.rows).t()
        } else {
            Factor::f32(&self.values, self.columns)
        }
    }
}

impl Fill for Matrix {
    fn fill(&self, row: usize, column: usize, out: &mut [f32]) {
        let width = if self.turned { self.rows } else { self.columns };
        out.copy_from_slice(&self.values[row * width + column..][..out.len()]);
    }
}

fn product<T: Target>(path: Path, zero: T, a: Factor<'_>, b: Factor<'_>) -> Vec<T> {
    let mut c = vec![zero; a.rows() * b.columns()];
    multiply_by(path, Crew::All, Out::rows(&mut c, b.columns()), 0.0, 1.0, &[(a, b)]);
    c
}

/// Largest and root of mean square of the errors, each relative to the norms of its row and column.
fn errors(c: &[f32], a: &Matrix, b: &Matrix) -> (f64, f64) {
    let (m, n, k) = (a.rows, b.columns, a.columns);
    let norm =
        |values: &mut dyn Iterator<Item = f32>| values.map(|x| f64::from(x).powi(2)).sum::<f64>().sqrt();
    let rows: Vec<f64> = (0..m).map(|i| norm(&mut (0..k).map(|p| a.at(i, p)))).collect();
    let columns: Vec<f64> = (0..n).map(|j| norm(&mut (0..k).map(|p| b.at(p, j)))).collect();
    let (mut most, mut squares) = (0f64, 0f64);
    for (at, c) in c.iter().enumerate() {
        let (i, j) = (at / n, at % n);
        let expected: f64 = (0..k).map(|p| f64::from(a.at(i, p)) * f64::from(b.at(p, j))).sum();
        let error = (f64::from(*c) - expected).abs() / (rows[i] * columns[j]);
        most = most.max(error);
        squares += error * error;
    }
    (most, (squares / (m * n) as f64).sqrt())
}

const SHAPES: [(usize, usize, usize); 14] = [
    (1, 1, 1),
    (2, 3, 5),
    (1, 130, 97),
    (3, 67, 64),
    (7, 31, 577),
    (16, 16, 32),
    (17, 49, 95),
    (33, 64, 96),
    (61, 47, 63),
    (97, 16, 576),
    (200, 1, 65),
    (131, 101, 103),
    (37, 35, 2047),
    (65, 50, 1933),
];

const LAYOUTS: [(bool, bool); 4] = [(false, true), (false, false), (true, false), (true, true)];

#[test]
fn f32_products_are_as_accurate_as_those_of_gemm() {
    for path in Path::all() {
        let mut worst = (0f64, 0f64);
        for (m, n, k) in SHAPES {
            for (a_turned, b_turned) in LAYOUTS {
                let (a, b) = (Matrix::new(m, k, a_turned, 1), Matrix::new(k, n, b_turned, 2));
                let ours = errors(&product(*path, f32::NAN, a.factor(), b.factor()), &a, &b);
                let gemm = errors(&product(Path::Portable, f32::NAN, a.factor(), b.factor()), &a, &b);
                // Half a rounding more for results of a few terms, which gemm may compute exactly.
                let few = 3e-8;
                assert!(
                    ours.0 <= 2.0 * gemm.0 + few && ours.1 <= 1.5 * gemm.1 + few / 4.0,
                    "{path:?} {m} {n} {k} {a_turned} {b_turned}: largest and mean error {ours:?}, of gemm {gemm:?}"
                );
                worst = (worst.0.max(ours.0), worst.1.max(ours.1));
            }
        }
        // One rounding of an f32 is 6e-8 at most; those of bf16 are 4e-3. On tiles 1e-7 and 1.6e-8 have been seen, of gemm
        // twice that.
        assert!(worst.0 < 2.5e-7 && worst.1 < 5e-8, "{path:?}: largest and mean error {worst:?}");
    }
}

#[test]
fn values_of_all_sizes_are_split_without_loss() {
    // A product with powers of two is exact, so is one column of ones: what comes back is what was split.
    let mut x = values(64 * 32, 3);
    for (i, x) in x.iter_mut().enumerate() {
        *x *= 2f32.powi(i as i32 % 200 - 90);
    }
    x[..6].copy_from_slice(&[f32::MAX, -f32::MAX, 3.395e38, 1.0 + f32::EPSILON, 0.0, -0.0]);
    let mut identity = vec![0f32; 32 * 32];
    for i in 0..32 {
        identity[i * 32 + i] = 1.0;
    }
    for path in Path::all() {
        let right = product(*path, f32::NAN, Factor::f32(&x, 32), Factor::f32(&identity, 32));
        assert!(right == x, "{path:?}");
        let left = product(*path, f32::NAN, Factor::f32(&identity, 32), Factor::f32(&x, 32).t());
        let back: Vec<f32> = (0..64 * 32).map(|at| left[at % 32 * 64 + at / 32]).collect();
        assert!(back == x, "{path:?}");
    }
}

#[test]
fn what_is_not_finite_reaches_its_row_alone() {
    for path in Path::all() {
        for (m, n, k) in [(3, 20, 33), (16, 40, 31), (37, 50, 95)] {
            for (a_turned, b_turned) in LAYOUTS {
                let signals = f32::from_bits(0x7f80_0001);
                let low_bits = f32::from_bits(0xffff_ffff);
                for bad in [f32::NAN, signals, low_bits, f32::INFINITY, f32::NEG_INFINITY] {
                    let (mut a, b) = (Matrix::new(m, k, a_turned, 1), Matrix::new(k, n, b_turned, 2));
                    let row = m - 2;
                    let place = a.place(row, k - 1);
                    a.values[place] = bad;
                    let c = product(*path, 0f32, a.factor(), b.factor());
                    for (at, c) in c.iter().enumerate() {
                        assert_eq!(c.is_finite(), at / n != row, "{path:?} {m} {n} {k}: value {at} is {c}");
                    }
                    // And in a column of the right side.
                    let c = product(*path, 0f32, b.flipped().factor(), a.flipped().factor());
                    for (at, c) in c.iter().enumerate() {
                        assert_eq!(c.is_finite(), at % m != row, "{path:?} {m} {n} {k}: value {at} is {c}");
                    }
                }
            }
        }
    }
}

impl Matrix {
    fn flipped(&self) -> Self {
        Self { rows: self.columns, columns: self.rows, turned: !self.turned, ..self.clone() }
    }
}

#[test]
fn scales_adds_and_sums_terms() {
    for path in Path::all() {
        for (m, n, k, rank) in [(2, 70, 64, 8), (45, 70, 576, 16), (70, 33, 700, 4), (40, 40, 1290, 37)] {
            for (a_turned, b_turned) in LAYOUTS {
                let (x, w) = (Matrix::new(m, k, a_turned, 1), Matrix::new(k, n, b_turned, 2));
                let (u, v) = (Matrix::new(m, rank, a_turned, 3), Matrix::new(rank, n, b_turned, 4));
                let old = values(m * n, 5);
                let mut c = old.clone();
                let terms = [(x.factor(), w.factor()), (u.factor(), v.factor())];
                multiply_by(*path, Crew::All, Out::rows(&mut c, n), 0.5, -2.0, &terms);
                let [first, second] = terms.map(|(a, b)| product(Path::Portable, f32::NAN, a, b));
                for (at, c) in c.iter().enumerate() {
                    let expected = 0.5 * old[at] - 2.0 * (first[at] + second[at]);
                    assert!(
                        (c - expected).abs() < 5e-7 * (k + rank) as f32 / 3.0 + 1e-6,
                        "{path:?} {m} {n} {k} {a_turned} {b_turned}: value {at} is {c}, expected {expected}"
                    );
                }
            }
        }
    }
}

#[test]
fn filled_factors_are_as_accurate_beside_f32() {
    for path in Path::all() {
        for (m, n, k) in [(1, 70, 70), (3, 67, 1030), (5, 67, 130), (40, 200, 97), (100, 41, 1100)] {
            for turned in [false, true] {
                let (x, w) = (Matrix::new(m, k, false, 1), Matrix::new(k, n, turned, 2));
                let filled = if turned { Factor::filled(&w, n, k).t() } else { Factor::filled(&w, k, n) };
                let (largest, _) = errors(&product(*path, f32::NAN, x.factor(), filled), &x, &w);
                assert!(largest < 2e-7, "{path:?} {m} {n} {k} {turned}: {largest}");
                // As the left side.
                let (flipped, left) = (x.flipped(), w.flipped());
                let (largest, _) =
                    errors(&product(*path, f32::NAN, filled.t(), flipped.factor()), &left, &flipped);
                assert!(largest < 2e-7, "{path:?} {m} {n} {k} {turned}, on the left: {largest}");
            }
        }
    }
}

#[test]
fn beside_bf16_values_are_rounded() {
    let x = Matrix::new(40, 64, false, 1);
    let w: Vec<bf16> = values(64 * 50, 2).into_iter().map(bf16::from_f32).collect();
    let narrow: Vec<bf16> = x.values.iter().map(|x| bf16::from_f32(*x)).collect();
    for path in Path::all() {
        let w = Factor::bf16(&w, 64).t();
        let [wide, narrow] = [x.factor(), Factor::bf16(&narrow, 64)].map(|x| product(*path, f32::NAN, x, w));
        for (wide, narrow) in wide.iter().zip(&narrow) {
            assert!((wide - narrow).abs() < 1e-5, "{path:?}");
        }
    }
}

#[test]
fn f32_products_do_not_depend_on_threads() {
    let pools: Vec<rayon::ThreadPool> = [1, 2, 5]
        .iter()
        .map(|threads| rayon::ThreadPoolBuilder::new().num_threads(*threads).build().unwrap())
        .collect();
    for path in Path::all() {
        for (m, n, k) in [(1, 700, 100), (3, 700, 131), (600, 300, 257), (700, 16, 64), (150, 600, 1500)] {
            for (a_turned, b_turned) in LAYOUTS {
                let (a, b) = (Matrix::new(m, k, a_turned, 1), Matrix::new(k, n, b_turned, 2));
                let results: Vec<Vec<f32>> = pools
                    .iter()
                    .map(|pool| pool.install(|| product(*path, f32::NAN, a.factor(), b.factor())))
                    .collect();
                let mut here = vec![f32::NAN; m * n];
                let terms = [(a.factor(), b.factor())];
                multiply_by(*path, Crew::Caller, Out::rows(&mut here, n), 0.0, 1.0, &terms);
                assert!(results.iter().all(|result| *result == here), "{path:?} {m} {n} {k}");
            }
        }
    }
}
