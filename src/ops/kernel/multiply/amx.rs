//! The inner product on AMX tiles. A tile is 16 rows of 64 bytes; `tdpbf16ps c, a, b` adds to `c` (16x16 f32) the product
//! of `a` (16 lines x 32 depth) and `b` (16 depth pairs x 16 lines x 2). Four sums, two left and two right tiles fill the
//! eight registers: four loads feed four products, the best ratio that eight registers allow.
//!
//! The right side streams through the L1 cache, so it is loaded with the hint not to stay there, which leaves the cache to the
//! left side: 2600 GFLOP/s of one core where plain loads give 2000.
//!
//! The intrinsics are not stable, the assembler is. Denormal inputs and results count as zero, sums round to nearest
//! even; pairs are added one after the other, each with one rounding.

use std::arch::asm;

use super::block::{Block, Inner, LEFT, Previous, Segment};
use super::pack::STRIP;
use super::target::Target;

/// Layout of LDTILECFG's operand, palette 1.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static FULL_TILES: Configuration = {
    let mut all =
        Configuration { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
    let mut tile = 0;
    while tile < 8 {
        all.row_bytes[tile] = 64;
        all.rows[tile] = 16;
        tile += 1;
    }
    all
};

/// `PARTS` 1: values in bf16. 3: in f32, split in [`thirds`](super::thirds).
pub(super) struct Amx<const PARTS: usize>;

/// One block: `$load` and `$store` move the sums between memory and tiles, `$step` multiplies 32 values of depth, `$write`
/// writes two rows of the block before. `{stride}` holds the distance of two rows: of the sums before and after, of the
/// left side in between.
macro_rules! block {
    ($parts:literal, $call:ident, $load:expr, $zero:expr, $step:expr, $store:expr $(, $write:expr, $previous:ident, $writes:ident)?) => {
        // SAFETY: tiles are configured (`Amx::begin`); segments and pointers hold what `Inner::block` demands. Rows of the
        // block before are as many as are written.
        unsafe {
            asm!(
                $("vbroadcastss zmm18, [{to}]", "mov {to}, [{to} + 8]", concat!("/* ", stringify!($previous), " */"),)?
                "mov {stride:e}, 128",
                "test {steps:e}, {steps:e}",
                "jz 2f",
                $load,
                "jmp 3f",
                "2:",
                $zero,
                "3:",
                "mov {left}, [{segment}]",
                "mov {stride}, [{segment} + 8]",
                "mov {steps}, [{segment} + 24]",
                "mov {left_next}, {stride}",
                "shl {left_next}, 4",
                "add {left_next}, {left}",
                $(
                    "test {writes}, {writes}",
                    "jz 4f",
                    "5:",
                    $step,
                    $write,
                    "add {from}, 256",
                    "add {left}, [{segment} + 16]",
                    "add {left_next}, [{segment} + 16]",
                    concat!("add {right}, 2048 * ", $parts),
                    "dec {steps}",
                    "dec {writes}",
                    "jnz 5b",
                    "test {steps}, {steps}",
                    "jz 6f",
                )?
                "4:",
                $step,
                "add {left}, [{segment} + 16]",
                "add {left_next}, [{segment} + 16]",
                concat!("add {right}, 2048 * ", $parts),
                "dec {steps}",
                "jnz 4b",
                "6:",
                "add {segment}, 32",
                "cmp {steps}, [{segment} + 24]",
                "jne 3b",
                "mov {stride:e}, 128",
                $store,
                segment = inout(reg) $call.segments.as_ptr() => _,
                left = out(reg) _,
                left_next = out(reg) _,
                stride = out(reg) _,
                steps = inout(reg) u64::from($call.accumulate) => _,
                right = inout(reg) $call.right => _,
                sums = in(reg) $call.sums,
                line = in(reg) 64usize,
                $(
                    from = inout(reg) $previous.sums => _,
                    to = inout(reg) $previous => _,
                    apart = in(reg) $previous.apart,
                    writes = inout(reg) $writes => _,
                    out("zmm16") _, out("zmm17") _, out("zmm18") _,
                )?
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    };
}

/// The instructions of a block of 32 by 32, or of its upper half, left half or upper left quarter.
macro_rules! instructions {
    (load 0) => { "tileloadd tmm0, [{sums} + {stride}]\n" };
    (load 1) => { "tileloadd tmm1, [{sums} + {stride} + 64]\n" };
    (load 2) => { "tileloadd tmm2, [{sums} + {stride} + 2048]\n" };
    (load 3) => { "tileloadd tmm3, [{sums} + {stride} + 2112]\n" };
    (zero 0) => { "tilezero tmm0\n" };
    (zero 1) => { "tilezero tmm1\n" };
    (zero 2) => { "tilezero tmm2\n" };
    (zero 3) => { "tilezero tmm3\n" };
    (store 0) => { "tilestored [{sums} + {stride}], tmm0\n" };
    (store 1) => { "tilestored [{sums} + {stride} + 64], tmm1\n" };
    (store 2) => { "tilestored [{sums} + {stride} + 2048], tmm2\n" };
    (store 3) => { "tilestored [{sums} + {stride} + 2112], tmm3\n" };
    (left 0 $part:tt) => { concat!("tileloadd tmm4, [{left} + {stride} + 2048 * ", $part, "]\n") };
    (left 1 $part:tt) => { concat!("tileloadd tmm5, [{left_next} + {stride} + 2048 * ", $part, "]\n") };
    (right 0 $part:tt) => { concat!("tileloaddt1 tmm6, [{right} + {line} + 2048 * ", $part, "]\n") };
    (right 1 $part:tt) => { concat!("tileloaddt1 tmm7, [{right} + {line} + 1024 + 2048 * ", $part, "]\n") };
    (multiply 0) => { "tdpbf16ps tmm0, tmm4, tmm6\n" };
    (multiply 1) => { "tdpbf16ps tmm1, tmm4, tmm7\n" };
    (multiply 2) => { "tdpbf16ps tmm2, tmm5, tmm6\n" };
    (multiply 3) => { "tdpbf16ps tmm3, tmm5, tmm7\n" };
    (write_bf16 0) => {
        "vmulps zmm16, zmm18, [{from}]
        vmulps zmm17, zmm18, [{from} + 64]
        vcvtne2ps2bf16 zmm16, zmm17, zmm16
        vmovdqu32 [{to}], zmm16
        add {to}, {apart}
        vmulps zmm16, zmm18, [{from} + 128]
        vmulps zmm17, zmm18, [{from} + 192]
        vcvtne2ps2bf16 zmm16, zmm17, zmm16
        vmovdqu32 [{to}], zmm16
        add {to}, {apart}\n"
    };
    (write_f32 0) => {
        "vmulps zmm16, zmm18, [{from}]
        vmulps zmm17, zmm18, [{from} + 64]
        vmovups [{to}], zmm16
        vmovups [{to} + 64], zmm17
        add {to}, {apart}
        vmulps zmm16, zmm18, [{from} + 128]
        vmulps zmm17, zmm18, [{from} + 192]
        vmovups [{to}], zmm16
        vmovups [{to} + 64], zmm17
        add {to}, {apart}\n"
    };
    ($($kind:ident $number:tt),+) => { concat!($(instructions!($kind $number)),+) };
}

/// The instructions of a step: loads of one part of the left side with one of the right, and their products. For three parts
/// in an order in which only one side changes at a time, and the largest products come last.
macro_rules! step {
    (1, [$($left:tt)+], [$($right:tt)+], $product:expr) => {
        concat!(loads!(left 0, $($left)+), loads!(right 0, $($right)+), $product)
    };
    (3, [$($left:tt)+], [$($right:tt)+], $product:expr) => {
        concat!(
            loads!(left 2, $($left)+), loads!(right 0, $($right)+), $product,
            loads!(left 1, $($left)+), $product,
            loads!(right 1, $($right)+), $product,
            loads!(left 0, $($left)+), $product,
            loads!(right 2, $($right)+), $product,
            loads!(right 0, $($right)+), $product
        )
    };
}

macro_rules! loads {
    ($side:ident $part:tt, $($number:tt)+) => { concat!($(instructions!($side $number $part)),+) };
}

/// # Safety
/// As [`Inner::block`].
macro_rules! tiles {
    ($name:ident, $parts:tt) => {
        #[target_feature(enable = "avx512f,avx512bf16")]
        unsafe fn $name<T: Target>(
            call: &Block<'_>,
            lines: usize,
            strips: usize,
            previous: Option<&Previous>,
        ) -> usize {
            const { assert!(LEFT == 32 && size_of::<Segment>() == 32) };
            let writes = previous.map_or(0, |_| call.segments[0].steps.min(LEFT / 2));
            match (lines > STRIP, strips > 1, previous) {
                (true, true, Some(previous)) if size_of::<T>() == 2 => {
                    block!(
                        $parts,
                        call,
                        instructions!(load 0, load 1, load 2, load 3),
                        instructions!(zero 0, zero 1, zero 2, zero 3),
                        step!($parts, [0 1], [0 1], instructions!(multiply 0, multiply 2, multiply 1, multiply 3)),
                        instructions!(store 0, store 1, store 2, store 3),
                        instructions!(write_bf16 0),
                        previous,
                        writes
                    );
                    return 2 * writes;
                }
                (true, true, Some(previous)) => {
                    block!(
                        $parts,
                        call,
                        instructions!(load 0, load 1, load 2, load 3),
                        instructions!(zero 0, zero 1, zero 2, zero 3),
                        step!($parts, [0 1], [0 1], instructions!(multiply 0, multiply 2, multiply 1, multiply 3)),
                        instructions!(store 0, store 1, store 2, store 3),
                        instructions!(write_f32 0),
                        previous,
                        writes
                    );
                    return 2 * writes;
                }
                (true, true, None) => {
                    block!(
                        $parts,
                        call,
                        instructions!(load 0, load 1, load 2, load 3),
                        instructions!(zero 0, zero 1, zero 2, zero 3),
                        step!($parts, [0 1], [0 1], instructions!(multiply 0, multiply 2, multiply 1, multiply 3)),
                        instructions!(store 0, store 1, store 2, store 3)
                    );
                }
                (true, false, _) => {
                    block!(
                        $parts,
                        call,
                        instructions!(load 0, load 2),
                        instructions!(zero 0, zero 2),
                        step!($parts, [0 1], [0], instructions!(multiply 0, multiply 2)),
                        instructions!(store 0, store 2)
                    );
                }
                (false, true, _) => {
                    block!(
                        $parts,
                        call,
                        instructions!(load 0, load 1),
                        instructions!(zero 0, zero 1),
                        step!($parts, [0], [0 1], instructions!(multiply 0, multiply 1)),
                        instructions!(store 0, store 1)
                    );
                }
                (false, false, _) => {
                    block!(
                        $parts,
                        call,
                        instructions!(load 0),
                        instructions!(zero 0),
                        step!($parts, [0], [0], instructions!(multiply 0)),
                        instructions!(store 0)
                    );
                }
            }
            0
        }
    };
}

tiles!(whole, 1);
tiles!(thirds, 3);

impl<const PARTS: usize> Inner for Amx<PARTS> {
    const STRIPS: usize = 2;
    const PARTS: usize = PARTS;

    unsafe fn begin() {
        // SAFETY: the caller has found the path `Amx` among those of this machine; the operand is a valid
        // configuration of 64 bytes.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const FULL_TILES, options(nostack, readonly)) }
    }

    unsafe fn end() {
        // SAFETY: as `begin`. Without tiles in use the system need not save 8 KiB at each switch of threads.
        unsafe { asm!("tilerelease", options(nostack, nomem)) }
    }

    unsafe fn block<T: Target>(
        call: &Block<'_>,
        lines: usize,
        strips: usize,
        previous: Option<&Previous>,
    ) -> usize {
        const { assert!(PARTS == 1 || PARTS == 3) };
        // SAFETY: the caller's promise.
        unsafe {
            if PARTS == 1 {
                whole::<T>(call, lines, strips, previous)
            } else {
                thirds::<T>(call, lines, strips, previous)
            }
        }
    }
}
