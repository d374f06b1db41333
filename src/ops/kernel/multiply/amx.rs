//! The inner product on AMX tiles. A tile is 16 rows of 64 bytes; `tdpbf16ps c, a, b` adds to `c` (16x16 f32) the product
//! of `a` (16 lines x 32 depth) and `b` (16 depth pairs x 16 lines x 2). Four sums, two left and two right tiles fill the
//! eight registers: four loads feed four products, the best ratio that eight registers allow.
//!
//! The intrinsics are not stable, the assembler is. Denormal inputs and results count as zero, sums round to nearest
//! even; pairs are added one after the other, each with one rounding.

use std::arch::asm;
use std::ops::Range;

use half::bf16;

use super::block::{Block, Inner, LEFT, Previous, Segment};
use super::factor::{Scratch, Side};
use super::pack::{self, Blocks, STRIP};
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

pub(super) struct Amx;

/// One block: `$load` and `$store` move the sums between memory and tiles, `$step` multiplies 32 values of depth, `$write`
/// writes two rows of the block before. `{stride}` holds the distance of two rows: of the sums before and after, of the
/// left side in between.
macro_rules! block {
    ($call:ident, $load:expr, $zero:expr, $step:expr, $store:expr $(, $write:expr, $previous:ident, $writes:ident)?) => {
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
                    "add {right}, 2048",
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
                "add {right}, 2048",
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
    (left 0) => { "tileloadd tmm4, [{left} + {stride}]\n" };
    (left 1) => { "tileloadd tmm5, [{left_next} + {stride}]\n" };
    (right 0) => { "tileloadd tmm6, [{right} + {line}]\n" };
    (right 1) => { "tileloadd tmm7, [{right} + {line} + 1024]\n" };
    (multiply 0) => { "tdpbf16ps tmm0, tmm4, tmm6\n" };
    (multiply 1) => { "tdpbf16ps tmm1, tmm4, tmm7\n" };
    (multiply 2) => { "tdpbf16ps tmm2, tmm5, tmm6\n" };
    (multiply 3) => { "tdpbf16ps tmm3, tmm5, tmm7\n" };
    (write bf16) => {
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
    (write f32) => {
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

/// # Safety
/// As [`Inner::block`].
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn tiles<T: Target>(
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
                call,
                instructions!(load 0, load 1, load 2, load 3),
                instructions!(zero 0, zero 1, zero 2, zero 3),
                instructions!(left 0, right 0, right 1, left 1, multiply 0, multiply 1, multiply 2, multiply 3),
                instructions!(store 0, store 1, store 2, store 3),
                instructions!(write bf16),
                previous,
                writes
            );
            return 2 * writes;
        }
        (true, true, Some(previous)) => {
            block!(
                call,
                instructions!(load 0, load 1, load 2, load 3),
                instructions!(zero 0, zero 1, zero 2, zero 3),
                instructions!(left 0, right 0, right 1, left 1, multiply 0, multiply 1, multiply 2, multiply 3),
                instructions!(store 0, store 1, store 2, store 3),
                instructions!(write f32),
                previous,
                writes
            );
            return 2 * writes;
        }
        (true, true, None) => {
            block!(
                call,
                instructions!(load 0, load 1, load 2, load 3),
                instructions!(zero 0, zero 1, zero 2, zero 3),
                instructions!(left 0, right 0, right 1, left 1, multiply 0, multiply 1, multiply 2, multiply 3),
                instructions!(store 0, store 1, store 2, store 3)
            );
        }
        (true, false, _) => {
            block!(
                call,
                instructions!(load 0, load 2),
                instructions!(zero 0, zero 2),
                instructions!(right 0, left 0, left 1, multiply 0, multiply 2),
                instructions!(store 0, store 2)
            );
        }
        (false, true, _) => {
            block!(
                call,
                instructions!(load 0, load 1),
                instructions!(zero 0, zero 1),
                instructions!(left 0, right 0, right 1, multiply 0, multiply 1),
                instructions!(store 0, store 1)
            );
        }
        (false, false, _) => {
            block!(
                call,
                instructions!(load 0),
                instructions!(zero 0),
                instructions!(left 0, right 0, multiply 0),
                instructions!(store 0)
            );
        }
    }
    0
}

impl Inner for Amx {
    const STRIPS: usize = 2;

    unsafe fn begin() {
        // SAFETY: the caller has found the path `Amx` among those of this machine; the operand is a valid
        // configuration of 64 bytes.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const FULL_TILES, options(nostack, readonly)) }
    }

    unsafe fn end() {
        // SAFETY: as `begin`. Without tiles in use the system need not save 8 KiB at each switch of threads.
        unsafe { asm!("tilerelease", options(nostack, nomem)) }
    }

    unsafe fn pack(
        side: Side<'_>,
        lines: Range<usize>,
        depth: Range<usize>,
        panel: &mut [bf16],
        stride: usize,
        before: usize,
        scratch: &mut Scratch,
    ) {
        let blocks = Blocks::<{ Self::STRIPS }> { stride, before };
        // SAFETY: the caller's promise.
        unsafe { pack::right(side, lines, depth, panel, blocks, scratch) };
    }

    unsafe fn block<T: Target>(
        call: &Block<'_>,
        lines: usize,
        strips: usize,
        previous: Option<&Previous>,
    ) -> usize {
        // SAFETY: the caller's promise.
        unsafe { tiles::<T>(call, lines, strips, previous) }
    }
}
