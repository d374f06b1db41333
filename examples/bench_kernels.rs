//! Speed of the products in `src/ops/kernel/multiply`, for the shapes of a small model.
//!
//! `cargo run --release --example bench_kernels [threads [tokens [path [in,out]]]]`: GFLOP/s, best of several runs, on 2 threads and 2048
//! tokens unless told. With one thread the time is the processor's, which other programs disturb less than the clock.
//! The sources are compiled into this file, because products are no part of the library's interface.

#![allow(clippy::print_stdout, reason = "a program that prints")]
#![expect(dead_code, unused_imports, reason = "it does not use all that the sources offer")]

#[path = "../src/ops/kernel/multiply/mod.rs"]
mod multiply;
#[path = "../src/ops/kernel/rows.rs"]
mod rows;

use std::time::Instant;

use half::bf16;
/// What `rows` asks of its values.
use multiply::Target as Element;
use multiply::{Crew, Factor, Out, Path, Target, multiply_by};

/// As in the program: buffers of this size begin at a line of the cache.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Seconds on the clock, or, with one thread, of this process.
fn now() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    let alone = rayon::current_num_threads() == 1;
    let clock = if alone { libc::CLOCK_PROCESS_CPUTIME_ID } else { libc::CLOCK_MONOTONIC };
    // SAFETY: `time` is ours to be written.
    unsafe { libc::clock_gettime(clock, &raw mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// A good time of several runs, in seconds: the best are sometimes errors of the processor's clock.
fn time(mut f: impl FnMut()) -> f64 {
    f();
    let begin = Instant::now();
    let mut times = Vec::new();
    while times.len() < 5 || (begin.elapsed().as_secs_f64() < 0.5 && times.len() < 200) {
        let start = now();
        f();
        times.push(now() - start);
    }
    times.sort_by(f64::total_cmp);
    times[times.len() / 5]
}

fn values(len: usize, seed: u64) -> Vec<bf16> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        bf16::from_f32((state >> 40) as f32 / (1u32 << 23) as f32 - 1.0)
    };
    (0..len).map(|_| next()).collect()
}

fn measure<T: Target>(path: Path, c: &mut [T], beta: f32, terms: &[(Factor<'_>, Factor<'_>)]) -> f64 {
    let work: usize = terms.iter().map(|(a, b)| 2 * a.rows() * a.columns() * b.columns()).sum();
    let n = terms[0].1.columns();
    work as f64 / time(|| multiply_by(path, Crew::All, Out::rows(c, n), beta, 1.0, terms)) / 1e9
}

fn widened(values: &[bf16]) -> Vec<f32> {
    // All bits of an f32 in use.
    values.iter().map(|value| value.to_f32() * 1.000_123_4).collect()
}

/// `x [m, k] w [n, k]^T` in f32 by the `gemm` crate.
fn gemm_f32(c: &mut [f32], x: &[f32], w: &[f32], (m, n, k): (usize, usize, usize)) -> f64 {
    assert!(x.len() == m * k && w.len() == n * k && c.len() == m * n);
    let seconds = time(|| {
        // SAFETY: the slices hold the three matrices.
        unsafe {
            gemm::gemm(
                m,
                n,
                k,
                c.as_mut_ptr(),
                1,
                n as isize,
                false,
                x.as_ptr(),
                1,
                k as isize,
                w.as_ptr(),
                k as isize,
                1,
                0.0,
                1.0,
                false,
                false,
                false,
                gemm::Parallelism::Rayon(0),
            );
        }
    });
    (2 * m * n * k) as f64 / seconds / 1e9
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1).filter_map(|argument| argument.parse().ok());
    let threads = arguments.next().unwrap_or(2);
    let m = arguments.next().unwrap_or(2048);
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    println!("{threads} threads, {m} tokens, GFLOP/s; paths: {:?}", Path::all());
    println!(
        "{:>6} {:>6} {:>10} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}",
        "in", "out", "path", "y", "y+adapter", "dx", "dw", "f32 y", "dx", "dw"
    );
    let only = std::env::args().nth(3);
    let shape = std::env::args().nth(4);
    for (k, n) in [(576, 1536), (1536, 576), (576, 49152), (2048, 2048), (576, 16), (16, 1536)] {
        if shape.as_ref().is_some_and(|shape| *shape != format!("{k},{n}")) {
            continue;
        }
        let (x, dy, w) = (values(m * k, 1), values(m * n, 2), values(n * k, 3));
        let (u, b) = (values(m * 16, 4), values(n * 16, 5));
        let (mut y, mut dx) = (vec![bf16::ZERO; m * n], vec![bf16::ZERO; m * k]);
        let (mut wide_y, mut wide_dx) = (vec![0f32; m * n], vec![0f32; m * k]);
        let mut dw = vec![0f32; n * k];
        let fx = Factor::bf16(&x, k);
        let (fdy, fw) = (Factor::bf16(&dy, n), Factor::bf16(&w, k));
        let [wide_x, wide_dy_, wide_w] = [&x, &dy, &w].map(|values| widened(values));
        let (fwx, fwdy, fww) = (Factor::f32(&wide_x, k), Factor::f32(&wide_dy_, n), Factor::f32(&wide_w, k));
        for path in
            Path::all().iter().filter(|path| only.as_ref().is_none_or(|only| *only == format!("{path:?}")))
        {
            let plain = measure(*path, &mut y, 0.0, &[(fx, fw.t())]);
            let adapter = [(fx, fw.t()), (Factor::bf16(&u, 16), Factor::bf16(&b, 16).t())];
            let adapter = measure(*path, &mut y, 0.0, &adapter);
            let back = measure(*path, &mut dx, 0.0, &[(fdy, fw)]);
            let weight = measure(*path, &mut dw, 1.0, &[(fdy.t(), fx)]);
            let wide = [
                measure(*path, &mut wide_y, 0.0, &[(fwx, fww.t())]),
                measure(*path, &mut wide_dx, 0.0, &[(fwdy, fww)]),
                measure(*path, &mut dw, 1.0, &[(fwdy.t(), fwx)]),
            ];
            let path = format!("{path:?}");
            println!(
                "{k:>6} {n:>6} {path:>10} {plain:>9.0} {adapter:>9.0} {back:>9.0} {weight:>9.0} {:>9.0} {:>9.0} {:>9.0}",
                wide[0], wide[1], wide[2]
            );
        }
        println!("{k:>6} {n:>6} {:>10} {:>49.0}", "gemm", gemm_f32(&mut wide_y, &wide_x, &wide_w, (m, n, k)));
    }
    Ok(())
}
