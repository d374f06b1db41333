//! Matrix products of bf16 and of f32, with sums in f32, on all threads or on the calling one.
//!
//! `c = beta c + alpha (a1 b1 + a2 b2 + ..)`, shapes `[m, n] = [m, k1] [k1, n] + [m, k2] [k2, n] + ..`; sums are kept in f32 over
//! all depths and terms and rounded once. One formula covers what training multiplies, for `x [m, k]`, `dy [m, n]` and a
//! weight `w [n, k]` as in a checkpoint:
//!
//! - forward `y = x w^T`: `(x, w.t())`
//! - forward with an adapter `y = x w^T + u b^T`, one rounding and one pass over `y`: `(x, w.t())`, `(u, b.t())`
//! - gradient of the input `dx = dy w`: `(dy, w)`
//! - gradient of a weight `dw = dy^T x`, in f32 and added to what is there: `(dy.t(), x)`
//!
//! A product in which no factor is bf16 is computed to the accuracy of f32. Where any is bf16, factors in f32 are rounded to
//! it, as adapters are beside a weight. Results do not depend on the number of threads.
//!
//! A frozen weight is stored once: each direction packs the panel that it needs on the way.

#[cfg(target_arch = "x86_64")]
mod aligned;
#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod block;
#[cfg(target_arch = "x86_64")]
mod decode;
mod factor;
#[cfg(target_arch = "x86_64")]
mod fma;
mod measure;
mod out;
#[cfg(target_arch = "x86_64")]
mod pack;
mod path;
mod portable;
mod source;
#[cfg(target_arch = "x86_64")]
mod split;
mod target;
#[cfg(target_arch = "x86_64")]
mod task;
#[cfg(target_arch = "x86_64")]
mod thirds;
#[cfg(target_arch = "x86_64")]
mod work;

pub(crate) use factor::Factor;
pub(crate) use measure::{candidates, measure};
pub(crate) use out::{Crew, Out};
pub(crate) use path::{Choice, Path};
pub(crate) use source::Fill;
pub(crate) use target::Target;

use factor::Side;

/// `c = beta c + alpha (a1 b1 + a2 b2 + ..)` over `terms`; `beta` 0 does not read `c`. Rows of `c` lie end to end.
pub(crate) fn multiply<T: Target>(c: &mut [T], beta: f32, alpha: f32, terms: &[(Factor<'_>, Factor<'_>)]) {
    let [(a, b), ..] = terms else { panic!("a product without terms") };
    let (m, n) = (a.rows(), b.columns());
    assert_eq!(Some(c.len()), m.checked_mul(n), "values of a {m}x{n} product");
    multiply_by(best(terms), Crew::All, Out::rows(c, n), beta, alpha, terms);
}

/// As [`multiply`], on the calling thread alone: for tasks that are one of many already. `c` is
/// written as far as the terms reach.
pub(crate) fn multiply_here<T: Target>(
    c: Out<'_, T>,
    beta: f32,
    alpha: f32,
    terms: &[(Factor<'_>, Factor<'_>)],
) {
    multiply_by(best(terms), Crew::Caller, c, beta, alpha, terms);
}

/// As [`multiply`] and [`multiply_here`], on a given path of those that the machine has.
pub(crate) fn multiply_by<T: Target>(
    path: Path,
    crew: Crew,
    c: Out<'_, T>,
    beta: f32,
    alpha: f32,
    terms: &[(Factor<'_>, Factor<'_>)],
) {
    let [(a, b), ..] = terms else { panic!("a product without terms") };
    let (m, n) = (a.rows(), b.columns());
    c.check(m, n);
    let mut sides: Vec<(Side<'_>, Side<'_>)> = Vec::with_capacity(terms.len());
    for (a, b) in terms {
        assert_eq!(a.columns(), b.rows(), "inner dimensions of a product");
        assert!(a.rows() == m && b.columns() == n, "terms of a {m}x{n} product");
        if a.columns() > 0 {
            sides.push((a.left(), b.right()));
        }
    }
    if m == 0 || n == 0 {
        return;
    }
    if sides.is_empty() {
        return scale(&c, (m, n), beta);
    }
    let wide = sides.iter().all(|(left, right)| !left.factor.is_bf16() && !right.factor.is_bf16());
    assert!(Path::all().contains(&path), "this machine has no path {path:?}");
    let (shape, scales) = ((m, n), (alpha, beta));
    #[cfg(target_arch = "x86_64")]
    if decode::takes(path, &sides, m) {
        // SAFETY: the machine has the path, and with it these instructions.
        return unsafe {
            match path {
                Path::Avx2 | Path::Avx512 => {
                    decode::multiply::<decode::Wide, T>(&c, &sides, shape, scales, crew)
                }
                _ => decode::multiply::<decode::Narrow, T>(&c, &sides, shape, scales, crew),
            }
        };
    }
    match path {
        Path::Portable => portable::multiply(&c, &sides, shape, scales, crew, wide),
        // SAFETY: the machine has the path, and with it these instructions.
        #[cfg(target_arch = "x86_64")]
        Path::Avx2 => unsafe { fma::multiply::<fma::Avx2, T>(&c, &sides, shape, scales, crew, wide) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Path::Avx512 => unsafe { fma::multiply::<fma::Avx512, T>(&c, &sides, shape, scales, crew, wide) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Path::Avx512Bf16 if wide => unsafe {
            fma::multiply::<fma::Avx512, T>(&c, &sides, shape, scales, crew, wide)
        },
        #[cfg(target_arch = "x86_64")]
        Path::Amx | Path::Avx512Bf16 => {
            let exchanged = exchange(&sides, m, n);
            if exchanged {
                for side in &mut sides {
                    *side = (side.1, side.0);
                }
            }
            let (rows, columns) = if exchanged { (n, m) } else { (m, n) };
            let work = work::Work { terms: &sides, rows, columns, exchanged, alpha, beta };
            // SAFETY: the machine has the path.
            unsafe {
                if path == Path::Amx && wide {
                    split::multiply::<amx::Amx<3>, T>(&c, &work, crew);
                } else if path == Path::Amx {
                    split::multiply::<amx::Amx<1>, T>(&c, &work, crew);
                } else {
                    split::multiply::<avx512::Avx512, T>(&c, &work, crew);
                }
            }
        }
    }
}

/// Whether to compute the transposed result with sides exchanged. The right side is always packed, the left one only where its
/// lines are not in place: so of two that lie along, the smaller goes right. Lines that lie across are turned on the
/// left, in every stripe: of two such the smaller goes left where it is a few strips, for turning costs more than packing
/// does, else right.
#[cfg(target_arch = "x86_64")]
fn exchange(sides: &[(Side<'_>, Side<'_>)], m: usize, n: usize) -> bool {
    let (left, right) = &sides[0];
    match (left.in_place(), right.in_place()) {
        (Some(_), Some(_)) => m < n && m <= 64,
        (None, None) if m.min(n) <= 96 => !left.along && !right.along && m > n,
        (None, None) => !left.along && !right.along && m < n,
        (None, Some(_)) => true,
        (Some(_), None) => false,
    }
}

/// The most left rows whose sums do not depend on how many there are, with weights as stored, in bf16 where `narrow`. Beside bf16,
/// weights in f32 take its path.
pub(crate) fn rows_alike(narrow: bool) -> usize {
    #[cfg(target_arch = "x86_64")]
    {
        let Choice { wide, narrow: of_bf16 } = Choice::current();
        let paths = if narrow { [of_bf16, of_bf16] } else { [wide, of_bf16] };
        paths.into_iter().map(|path| decode::most_rows(path, narrow)).min().unwrap_or(1).max(1)
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = narrow;
        1
    }
}

/// The path for these terms.
fn best(terms: &[(Factor<'_>, Factor<'_>)]) -> Path {
    let choice = Choice::current();
    if terms.iter().any(|(a, b)| a.is_bf16() || b.is_bf16()) {
        return choice.narrow;
    }
    // Splitting f32 in three does not pay where each value meets few others: then the memory sets the pace, or the sums of a
    // block are written after a step or two.
    #[cfg(target_arch = "x86_64")]
    if choice.wide == Path::Amx && terms.iter().all(|(a, b)| a.is_f32() && b.is_f32()) {
        let depth: usize = terms.iter().map(|(a, _)| a.columns()).sum();
        if terms.iter().any(|(a, b)| a.rows() < 16 || b.columns() < 16) || depth < 32 {
            return Path::Avx512Bf16;
        }
    }
    choice.wide
}

fn scale<T: Target>(c: &Out<'_, T>, (m, n): (usize, usize), beta: f32) {
    for row in 0..m {
        // SAFETY: `c` has been checked for that many rows and columns, and nobody else writes it.
        for value in unsafe { c.part(row, 0..n) } {
            *value = T::narrow(if beta == 0.0 { 0.0 } else { beta * value.widen() });
        }
    }
}

#[cfg(test)]
mod accuracy;
#[cfg(test)]
mod tests;
