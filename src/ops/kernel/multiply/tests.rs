//! Every path against sums in f64.

use half::bf16;

use super::{Crew, Factor, Fill, Out, Path, Target, multiply};

/// On all threads, rows of `c` end to end.
fn multiply_by<T: Target>(
    path: Path,
    c: &mut [T],
    beta: f32,
    alpha: f32,
    terms: &[(Factor<'_>, Factor<'_>)],
) {
    let n = terms[0].1.columns();
    super::multiply_by(path, Crew::All, Out::rows(c, n), beta, alpha, terms);
}

fn values(len: usize, seed: u64) -> Vec<bf16> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bf16::from_f32((state >> 40) as f32 / (1u32 << 23) as f32 - 1.0)
    };
    (0..len).map(|_| next()).collect()
}

/// How the sides of a product lie.
#[derive(Clone, Copy, Debug)]
struct Layout {
    a_turned: bool,
    b_turned: bool,
}

const LAYOUTS: [Layout; 4] = [
    Layout { a_turned: false, b_turned: true },
    Layout { a_turned: false, b_turned: false },
    Layout { a_turned: true, b_turned: false },
    Layout { a_turned: true, b_turned: true },
];

fn a_of<'a>(layout: Layout, a: &'a [bf16], m: usize, k: usize) -> Factor<'a> {
    if layout.a_turned { Factor::bf16(a, m).t() } else { Factor::bf16(a, k) }
}

fn b_of<'a>(layout: Layout, b: &'a [bf16], k: usize, n: usize) -> Factor<'a> {
    if layout.b_turned { Factor::bf16(b, k).t() } else { Factor::bf16(b, n) }
}

/// Value and sum of magnitudes of each result.
fn expected(layout: Layout, a: &[bf16], b: &[bf16], (m, n, k): (usize, usize, usize)) -> Vec<(f64, f64)> {
    let a_at = |i: usize, p: usize| a[if layout.a_turned { p * m + i } else { i * k + p }].to_f64();
    let b_at = |p: usize, j: usize| b[if layout.b_turned { j * k + p } else { p * n + j }].to_f64();
    let sum = |i, j| {
        (0..k).map(|p| a_at(i, p) * b_at(p, j)).fold((0.0, 0.0), |(all, size), x| (all + x, size + x.abs()))
    };
    (0..m * n).map(|at| sum(at / n, at % n)).collect()
}

fn assert_close<T: Target>(c: &[T], expected: &[(f64, f64)], rounding: f64, what: &str) {
    assert_eq!(c.len(), expected.len());
    for (at, (c, (value, size))) in c.iter().zip(expected).enumerate() {
        let difference = (f64::from(c.widen()) - value).abs();
        let allowed = 4e-6 * size + rounding * value.abs() + 1e-30;
        assert!(difference <= allowed, "{what}: value {at} is {}, expected {value}", c.widen());
    }
}

/// Primes, ends of strips, steps, blocks and panels, and one beside them. The small ones reach all corners of the tiles of AVX2
/// and AVX-512 under Miri, too.
const SHAPES: [(usize, usize, usize); 28] = [
    (9, 49, 2),
    (13, 33, 2),
    (17, 2, 29),
    (1, 1, 1),
    (1, 1, 2),
    (2, 3, 5),
    (1, 17, 31),
    (1, 130, 97),
    (3, 67, 64),
    (4, 33, 100),
    (5, 48, 33),
    (7, 31, 577),
    (13, 100, 45),
    (16, 16, 32),
    (16, 200, 70),
    (17, 49, 95),
    (31, 97, 129),
    (32, 32, 32),
    (33, 64, 96),
    (61, 47, 63),
    (64, 129, 257),
    (97, 16, 576),
    (97, 8, 131),
    (200, 1, 65),
    (131, 101, 103),
    (300, 20, 61),
    (37, 35, 2047),
    (65, 50, 4133),
];

/// Returns the shapes of `all`; under Miri, which is ten thousand times slower, only the small ones.
fn shapes<const N: usize>(all: [(usize, usize, usize); N]) -> impl Iterator<Item = (usize, usize, usize)> {
    all.into_iter().filter(|(m, n, k)| !cfg!(miri) || m * n * k <= 1000)
}

#[test]
fn every_path_and_layout_multiplies() {
    for path in Path::all() {
        for (m, n, k) in shapes(SHAPES) {
            for layout in LAYOUTS {
                let what = format!("{path:?} {m} {n} {k} {layout:?}");
                let (a, b) = (values(m * k, 1), values(k * n, 2));
                let terms = [(a_of(layout, &a, m, k), b_of(layout, &b, k, n))];
                let expected = expected(layout, &a, &b, (m, n, k));
                let mut c = vec![f32::NAN; m * n];
                multiply_by(*path, &mut c, 0.0, 1.0, &terms);
                assert_close(&c, &expected, 0.0, &what);
                let mut c = vec![bf16::NAN; m * n];
                multiply_by(*path, &mut c, 0.0, 1.0, &terms);
                assert_close(&c, &expected, 0.004, &what);
            }
        }
    }
}

#[test]
fn scales_and_adds() {
    // The last two need no copy of the sums where they are in f32.
    for (path, (beta, alpha)) in
        Path::all().iter().flat_map(|path| [(0.5, -2.0), (1.0, 1.0), (0.0, 1.0)].map(|both| (path, both)))
    {
        for (m, n, k) in shapes(SHAPES) {
            for layout in LAYOUTS {
                let (a, b, old) = (values(m * k, 1), values(k * n, 2), values(m * n, 3));
                let terms = [(a_of(layout, &a, m, k), b_of(layout, &b, k, n))];
                let scaled = |value: f64, old: f64| f64::from(beta) * old + f64::from(alpha) * value;
                let expected: Vec<(f64, f64)> = expected(layout, &a, &b, (m, n, k))
                    .iter()
                    .zip(&old)
                    .map(|((value, size), old)| (scaled(*value, old.to_f64()), 2.0 * size + 1.0))
                    .collect();
                let what = format!("{path:?} {m} {n} {k} {layout:?} {beta} {alpha}");
                let mut c: Vec<f32> = old.iter().map(|old| old.to_f32()).collect();
                multiply_by(*path, &mut c, beta, alpha, &terms);
                assert_close(&c, &expected, 0.0, &what);
                let mut c = old.clone();
                multiply_by(*path, &mut c, beta, alpha, &terms);
                assert_close(&c, &expected, 0.004, &format!("{what} in bf16"));
            }
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "takes too long")]
fn terms_are_summed_before_rounding() {
    for path in Path::all() {
        for (m, n, k, rank) in [(3, 50, 70, 8), (45, 70, 576, 16), (70, 33, 2048, 4), (40, 40, 2030, 37)] {
            for layout in LAYOUTS {
                let (x, w, u, b) =
                    (values(m * k, 1), values(k * n, 2), values(m * rank, 3), values(rank * n, 4));
                let terms = [
                    (a_of(layout, &x, m, k), b_of(layout, &w, k, n)),
                    (a_of(layout, &u, m, rank), b_of(layout, &b, rank, n)),
                ];
                let first = expected(layout, &x, &w, (m, n, k));
                let second = expected(layout, &u, &b, (m, n, rank));
                let expected: Vec<(f64, f64)> =
                    first.iter().zip(&second).map(|(a, b)| (a.0 + b.0, a.1 + b.1)).collect();
                let mut c = vec![f32::NAN; m * n];
                multiply_by(*path, &mut c, 0.0, 1.0, &terms);
                assert_close(&c, &expected, 0.0, &format!("{path:?} {m} {n} {k} {rank} {layout:?}"));
            }
        }
    }
}

struct Rows<'a>(&'a [bf16], usize);

impl Fill for Rows<'_> {
    fn fill(&self, row: usize, column: usize, out: &mut [f32]) {
        let end = column + out.len();
        assert!(column.is_multiple_of(32) && (end.is_multiple_of(32) || end == self.1));
        for (out, value) in out.iter_mut().zip(&self.0[row * self.1 + column..]) {
            *out = value.to_f32();
        }
    }
}

#[test]
fn where_values_come_from_makes_no_difference() {
    for path in Path::all() {
        for (m, n, k) in shapes([(1, 70, 70), (5, 67, 130), (40, 200, 97), (100, 41, 2100)]) {
            for turned in [false, true] {
                // `w` is `[n, k]` or `[k, n]`.
                let (x, w) = (values(m * k, 1), values(n * k, 2));
                let (rows, columns) = if turned { (k, n) } else { (n, k) };
                let wide: Vec<f32> = w.iter().map(|w| w.to_f32()).collect();
                let fill = Rows(&w, columns);
                let orient = |w: Factor<'_>, c: &mut [f32]| {
                    let w = if turned { w } else { w.t() };
                    multiply_by(*path, c, 0.0, 1.0, &[(Factor::bf16(&x, k), w)]);
                    // And as the left side: the transposed result.
                    let mut transposed = vec![f32::NAN; m * n];
                    multiply_by(*path, &mut transposed, 0.0, 1.0, &[(w.t(), Factor::bf16(&x, k).t())]);
                    transposed
                };
                let [mut stored, mut filled, mut widened] = std::array::from_fn(|_| vec![f32::NAN; m * n]);
                let other = [
                    orient(Factor::bf16(&w, columns), &mut stored),
                    orient(Factor::filled(&fill, rows, columns), &mut filled),
                    orient(Factor::f32(&wide, columns), &mut widened),
                ];
                let layout = Layout { a_turned: false, b_turned: !turned };
                let expected = expected(layout, &x, &w, (m, n, k));
                let what = format!("{path:?} {m} {n} {k} {turned}");
                for (c, transposed) in [stored, filled, widened].iter().zip(&other) {
                    assert_close(c, &expected, 0.0, &what);
                    let back: Vec<f32> = (0..m * n).map(|at| transposed[at % n * m + at / n]).collect();
                    assert_close(&back, &expected, 0.0, &format!("{what}, transposed"));
                }
            }
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "takes too long")]
fn results_do_not_depend_on_threads() {
    let pools: Vec<rayon::ThreadPool> = [1, 2, 5]
        .iter()
        .map(|threads| rayon::ThreadPoolBuilder::new().num_threads(*threads).build().unwrap())
        .collect();
    for path in Path::all() {
        for (m, n, k) in shapes([
            (1, 700, 100),
            (9, 700, 131),
            (600, 300, 257),
            (700, 16, 64),
            (150, 600, 2500),
            (200, 96, 4133),
        ]) {
            for layout in LAYOUTS {
                let (a, b) = (values(m * k, 1), values(k * n, 2));
                let terms = [(a_of(layout, &a, m, k), b_of(layout, &b, k, n))];
                let results: Vec<Vec<u32>> = pools
                    .iter()
                    .map(|pool| {
                        let mut c = vec![0.5f32; m * n];
                        pool.install(|| multiply_by(*path, &mut c, 1.0, 1.0, &terms));
                        let mut fresh = vec![f32::NAN; m * n];
                        pool.install(|| multiply_by(*path, &mut fresh, 0.0, 1.0, &terms));
                        c.iter().chain(&fresh).map(|c| c.to_bits()).collect()
                    })
                    .collect();
                assert!(
                    results.iter().all(|result| *result == results[0]),
                    "{path:?} {m} {n} {k} {layout:?}"
                );
            }
        }
    }
}

/// A value that is not finite reaches its row and column and nothing else.
#[test]
fn infinity_and_nan_reach_their_row_alone() {
    for path in Path::all() {
        for (m, n, k) in shapes([(3, 20, 33), (16, 40, 31), (37, 50, 95)]) {
            for layout in LAYOUTS {
                for bad in [f32::NAN, f32::INFINITY] {
                    let (mut a, b) = (values(m * k, 1), values(k * n, 2));
                    let (row, deep) = (m - 2, k - 1);
                    a[if layout.a_turned { deep * m + row } else { row * k + deep }] = bf16::from_f32(bad);
                    let terms = [(a_of(layout, &a, m, k), b_of(layout, &b, k, n))];
                    let mut c = vec![0f32; m * n];
                    multiply_by(*path, &mut c, 0.0, 1.0, &terms);
                    for (at, c) in c.iter().enumerate() {
                        assert_eq!(
                            c.is_finite(),
                            at / n != row,
                            "{path:?} {m} {n} {k} {layout:?} {bad}: value {at} is {c}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn nothing_to_sum_leaves_what_is_kept() {
    for path in Path::all() {
        let mut c = [1f32, 2.0, 3.0, 4.0, 5.0, 6.0];
        // [2, 0] [0, 3]
        multiply_by(*path, &mut c, 0.5, 1.0, &[(Factor::bf16(&[], 2).t(), Factor::bf16(&[], 3))]);
        assert_eq!(c, [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]);
        multiply_by(*path, &mut c, 0.0, 1.0, &[(Factor::bf16(&[], 2).t(), Factor::bf16(&[], 3))]);
        assert_eq!(c, [0.0; 6]);
        // [0, 2] [2, 3]
        multiply_by(*path, &mut c[..0], 0.0, 1.0, &[(Factor::bf16(&[], 2), Factor::bf16(&values(6, 1), 3))]);
    }
}

#[test]
#[should_panic(expected = "inner dimensions")]
fn shapes_must_agree() {
    let a = values(6, 1);
    multiply(&mut [0f32; 6], 0.0, 1.0, &[(Factor::bf16(&a, 3), Factor::bf16(&a, 3))]);
}

/// Heads of attention: columns of a wider matrix on both sides and in the result.
#[test]
fn columns_of_wider_matrices_multiply() {
    let heads = 3;
    for path in Path::all() {
        for (m, n, k) in
            shapes([(1, 5, 7), (3, 33, 64), (37, 64, 50), (100, 40, 64), (64, 70, 33), (200, 96, 40)])
        {
            for layout in LAYOUTS {
                let at = |head: usize, width: usize| head * width;
                let (a_rows, a_columns) = if layout.a_turned { (k, m) } else { (m, k) };
                let (b_rows, b_columns) = if layout.b_turned { (n, k) } else { (k, n) };
                let (a, b) = (values(m * k * heads, 1), values(k * n * heads, 2));
                let wide: Vec<f32> = b.iter().map(|b| b.to_f32()).collect();
                let mut c = vec![f32::NAN; m * n * heads];
                for head in 0..heads {
                    let left =
                        Factor::strided(&a[at(head, a_columns)..], a_rows, a_columns, heads * a_columns);
                    let right =
                        Factor::strided(&b[at(head, b_columns)..], b_rows, b_columns, heads * b_columns);
                    let right = if head == 1 {
                        Factor::strided(&wide[at(head, b_columns)..], b_rows, b_columns, heads * b_columns)
                    } else {
                        right
                    };
                    let left = if layout.a_turned { left.t() } else { left };
                    let right = if layout.b_turned { right.t() } else { right };
                    let out = Out::rows(&mut c[at(head, n)..], heads * n);
                    super::multiply_by(*path, Crew::Caller, out, 0.0, 1.0, &[(left, right)]);
                }
                for head in 0..heads {
                    let columns = |values: &[bf16], width: usize| -> Vec<bf16> {
                        values
                            .chunks(heads * width)
                            .flat_map(|row| &row[head * width..][..width])
                            .copied()
                            .collect()
                    };
                    let expected =
                        expected(layout, &columns(&a, a_columns), &columns(&b, b_columns), (m, n, k));
                    let found: Vec<f32> =
                        c.chunks(heads * n).flat_map(|row| &row[head * n..][..n]).copied().collect();
                    assert_close(
                        &found,
                        &expected,
                        0.0,
                        &format!("{path:?} {m} {n} {k} {layout:?} head {head}"),
                    );
                }
            }
        }
    }
}

#[test]
#[should_panic(expected = "rows of 3 values")]
fn rows_do_not_overlap() {
    let a = values(9, 1);
    let mut c = [0f32; 9];
    super::multiply_here(Out::rows(&mut c, 2), 0.0, 1.0, &[(Factor::bf16(&a, 3), Factor::bf16(&a, 3))]);
}
