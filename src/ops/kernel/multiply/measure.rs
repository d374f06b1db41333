//! Which path multiplies fastest on this machine, found by multiplying.
//!
//! Tiles run hot: a processor that is ahead for a millisecond may fall behind after twenty, and by how much differs between
//! machines of one name. So each path works for a while, and only the second half of that counts.

use std::time::{Duration, Instant};

use half::bf16;

use super::path::Choice;
use super::{Crew, Factor, Out, Path, multiply_by};

/// How long each path works, for each type.
const WHILE: Duration = Duration::from_millis(40);
/// Rows of the left side.
const ROWS: usize = 512;
/// An older path is taken only where it is faster by this factor: otherwise noise would choose.
const CLEARLY: f64 = 1.05;

/// Multiplies with a weight of `inputs` by `outputs` on each path, and returns the fastest with the multiply-adds per second
/// of all, in f32 and in bf16.
pub(crate) fn measure(inputs: usize, outputs: usize) -> (Choice, [Vec<(Path, f64)>; 2]) {
    let candidates = candidates();
    let value = |i: usize| (i % 251) as f32 / 251.0 - 0.5;
    let (x, w): (Vec<f32>, Vec<f32>) =
        ((0..ROWS * inputs).map(value).collect(), (0..inputs * outputs).map(value).collect());
    let [x_narrow, w_narrow] = [&x, &w].map(|all| all.iter().map(|x| bf16::from_f32(*x)).collect::<Vec<_>>());
    let mut y = vec![0f32; ROWS * outputs];
    let mut y_narrow = vec![bf16::ZERO; ROWS * outputs];
    let work = (ROWS * inputs * outputs) as f64;
    let wide = candidates.iter().filter(|path| has_own_products_of_f32(**path)).map(|path| {
        let terms = [(Factor::f32(&x, inputs), Factor::f32(&w, inputs).t())];
        let multiply = || multiply_by(*path, Crew::All, Out::rows(&mut y, outputs), 0.0, 1.0, &terms);
        (*path, work / sustained(multiply))
    });
    let wide: Vec<_> = wide.collect();
    let narrow = candidates.iter().map(|path| {
        let terms = [(Factor::bf16(&x_narrow, inputs), Factor::bf16(&w_narrow, inputs).t())];
        let multiply = || multiply_by(*path, Crew::All, Out::rows(&mut y_narrow, outputs), 0.0, 1.0, &terms);
        (*path, work / sustained(multiply))
    });
    let narrow: Vec<_> = narrow.collect();
    (Choice { wide: fastest(&wide), narrow: fastest(&narrow) }, [wide, narrow])
}

/// Those that are worth measuring: all of this machine but the portable one, unless it has no other.
pub(crate) fn candidates() -> &'static [Path] {
    match Path::all() {
        [special @ .., Path::Portable] if !special.is_empty() => special,
        all => all,
    }
}

/// Whether products without bf16 are computed otherwise than on the next older path: else noise would choose between two names
/// of the same instructions.
fn has_own_products_of_f32(path: Path) -> bool {
    #[cfg(target_arch = "x86_64")]
    if path == Path::Avx512Bf16 {
        return false;
    }
    let _ = path;
    true
}

/// Seconds of one call when it is made again and again.
fn sustained(mut call: impl FnMut()) -> f64 {
    let begin = Instant::now();
    while begin.elapsed() < WHILE / 2 {
        call();
    }
    let (begin, mut calls) = (Instant::now(), 0);
    while begin.elapsed() < WHILE / 2 {
        call();
        calls += 1;
    }
    begin.elapsed().as_secs_f64() / f64::from(calls.max(1))
}

/// The newest path, or an older one that is clearly faster than all newer ones. `rates` are in the order of paths.
fn fastest(rates: &[(Path, f64)]) -> Path {
    let (mut best, mut rate) = rates[0];
    for (path, other) in &rates[1..] {
        if *other > rate * CLEARLY {
            (best, rate) = (*path, *other);
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    // Elsewhere there is one path.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn an_older_path_has_to_be_clearly_faster() {
        let [new, old] = [Path::ALL[0], Path::ALL[1]];
        assert_eq!(fastest(&[(new, 100.0)]), new);
        assert_eq!(fastest(&[(new, 100.0), (old, 104.0)]), new);
        assert_eq!(fastest(&[(new, 100.0), (old, 106.0)]), old);
    }

    #[test]
    fn what_is_measured_is_a_path_of_this_machine() {
        let (choice, rates) = measure(64, 96);
        assert!(Path::all().contains(&choice.wide) && Path::all().contains(&choice.narrow));
        for (path, rate) in rates.iter().flatten() {
            assert!(rate.is_finite() && *rate > 0.0, "{path:?}: {rate}");
        }
    }
}
