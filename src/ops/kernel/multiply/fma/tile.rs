//! The inner products in f32: a few left lines by a few vectors of right ones, with all sums in registers.
//!
//! AVX2 has 16 registers: 6 lines by 2 vectors of 8 are 12 sums beside two vectors of the right side and a left value in all
//! lanes. AVX-512 has 32: 8 lines by 3 vectors of 16 are 24 sums. Each sum is one chain of fused multiply-adds along the
//! depth, so both give the same bits.

use super::super::super::rows::ask;

/// What a tile multiplies and where its sums go.
#[derive(Clone, Copy)]
pub(in super::super) struct Call {
    /// Values of the left lines: those of line `i` begin `i * line` values from here.
    pub(super) left: *const f32,
    pub(super) line: usize,
    /// `[depth][WIDTH]`, aligned to 64 bytes.
    pub(super) right: *const f32,
    pub(super) depth: usize,
    /// Rows of sums, `apart` values from each other; they need no alignment.
    pub(super) sums: *mut f32,
    pub(super) apart: usize,
    /// Whether sums are added to what is there.
    pub(super) adds: bool,
    /// The left lines of the tile that comes next, which the tile asks for because nothing has read them yet; may be null.
    pub(super) next: *const f32,
}

/// Values of a left line for which a tile asks at once: those of a line of the cache.
const ASKED: usize = 16;

/// Depths between two tests for the end. The instructions that count take ports from multiplications: with AVX2 a test at
/// each depth costs 4% of the time.
const UNROLLED: usize = 8;

/// Instructions that multiply tiles.
pub(in super::super) trait Tile {
    /// Left lines of a tile.
    const LINES: usize;
    /// Values of a vector.
    const LANES: usize;
    /// Right lines of a tile.
    const WIDTH: usize;

    /// Computes `LINES` lines by `vectors` vectors.
    ///
    /// # Safety
    /// The machine has the instructions. `call` is true of `LINES` lines and of `depth` values of each, of `WIDTH` values of
    /// the right side at each depth, and of `vectors * LANES` sums in each of `LINES` rows, which nobody else uses.
    unsafe fn tile(call: &Call, vectors: usize);
}

macro_rules! tile {
    (
        $(#[$attribute:meta])*
        $name:ident, $features:literal, $vector:ident, $lines:literal x $vectors:literal x $lanes:literal,
        $zero:ident, $load:ident, $store:ident, $set:ident, $multiply_add:ident, $add:ident,
        $($count:literal)+
    ) => {
        $(#[$attribute])*
        pub(in super::super) struct $name;

        impl Tile for $name {
            const LINES: usize = $lines;
            const LANES: usize = $lanes;
            const WIDTH: usize = $vectors * $lanes;

            unsafe fn tile(call: &Call, vectors: usize) {
                use std::arch::x86_64::{$add, $load, $multiply_add, $set, $store, $zero, $vector};

                /// # Safety
                /// As [`Tile::tile`], for `N` vectors; `ASKS` for the lines of the next tile.
                #[target_feature(enable = $features)]
                unsafe fn tile<const N: usize, const ASKS: bool>(call: &Call) {
                    let Call { left, line, right, depth, sums, apart, adds, next } = *call;
                    for i in 0..$lines {
                        (0..N * $lanes)
                            .step_by(ASKED)
                            .for_each(|j| ask(sums.wrapping_add(i * apart + j)));
                    }
                    let mut sum: [[$vector; N]; $lines] = [[$zero(); N]; $lines];
                    let mut step = |at: usize| {
                        let mut b = [$zero(); N];
                        for (j, b) in b.iter_mut().enumerate() {
                            // SAFETY: a depth of the right side is `WIDTH` values.
                            *b = unsafe { $load(right.add(at * ($vectors * $lanes) + j * $lanes)) };
                        }
                        for (i, row) in sum.iter_mut().enumerate() {
                            // SAFETY: a value of a line that is there.
                            let a = $set(unsafe { *left.add(i * line + at) });
                            for (sum, b) in row.iter_mut().zip(b) {
                                *sum = $multiply_add(a, b, *sum);
                            }
                        }
                    };
                    let whole = depth / UNROLLED * UNROLLED;
                    for at in (0..whole).step_by(UNROLLED) {
                        if ASKS && at.is_multiple_of(ASKED) {
                            (0..$lines).for_each(|i| ask(next.wrapping_add(i * line + at)));
                        }
                        (at..at + UNROLLED).for_each(&mut step);
                    }
                    (whole..depth).for_each(&mut step);
                    for (i, row) in sum.iter().enumerate() {
                        for (j, sum) in row.iter().enumerate() {
                            // SAFETY: the sums of this tile are the caller's.
                            unsafe {
                                let to = sums.add(i * apart + j * $lanes);
                                let whole = if adds { $add($load(to), *sum) } else { *sum };
                                $store(to, whole);
                            }
                        }
                    }
                }

                // SAFETY: the caller's promise.
                unsafe {
                    match (vectors, call.next.is_null()) {
                        $(
                            ($count, true) => tile::<$count, false>(call),
                            ($count, false) => tile::<$count, true>(call),
                        )+
                        _ => unreachable!("a tile of {vectors} vectors"),
                    }
                }
            }
        }
    };
}

tile! {
    /// Tiles of 6 by 16.
    Avx2, "avx2,fma", __m256, 6 x 2 x 8,
    _mm256_setzero_ps, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_set1_ps, _mm256_fmadd_ps, _mm256_add_ps,
    1 2
}

tile! {
    /// Tiles of 8 by 48.
    Avx512, "avx512f", __m512, 8 x 3 x 16,
    _mm512_setzero_ps, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_set1_ps, _mm512_fmadd_ps, _mm512_add_ps,
    1 2 3
}
