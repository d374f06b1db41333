//! The inner product on AMX tiles. A tile is 16 rows of 64 bytes; `tdpbf16ps c, a, b` adds to `c` (16x16 f32) the product
//! of `a` (16 lines x 32 depth) and `b` (16 depth pairs x 16 lines x 2). Four sums, two left and two right tiles fill the
//! eight registers: four loads feed four products, the best ratio that eight registers allow.
//!
//! The intrinsics are not stable, the assembler is. Denormal inputs and results count as zero, sums round to nearest
//! even; pairs are added one after the other, each with one rounding.

use std::arch::asm;
use std::ops::Range;

use half::bf16;

use super::factor::Side;
use super::pack::{self, Blocks};
use super::split::{Inner, LEFT, Segment};

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

/// One block: `$load` and `$store` move the sums between memory and tiles, `$step` multiplies 32 values of depth.
/// `{stride}` holds the distance of two rows: of the sums before and after, of the left side in between.
macro_rules! block {
    ($segments:ident, $right:ident, $sums:ident, $accumulate:ident, load: [$($load:literal)*], zero: [$($zero:literal)*],
     step: [$($step:literal)*], store: [$($store:literal)*]) => {
        // SAFETY: tiles are configured (`Amx::begin`); segments and pointers hold what `Inner::block` demands.
        unsafe {
            asm!(
                "mov {stride:e}, 128",
                "test {steps:e}, {steps:e}",
                "jz 2f",
                $($load,)*
                "jmp 3f",
                "2:",
                $($zero,)*
                "3:",
                "mov {left}, [{segment}]",
                "mov {stride}, [{segment} + 8]",
                "mov {steps}, [{segment} + 24]",
                "mov {left_next}, {stride}",
                "shl {left_next}, 4",
                "add {left_next}, {left}",
                "4:",
                $($step,)*
                "add {left}, [{segment} + 16]",
                "add {left_next}, [{segment} + 16]",
                "add {right}, 2048",
                "dec {steps}",
                "jnz 4b",
                "add {segment}, 32",
                "cmp {steps}, [{segment} + 24]",
                "jne 3b",
                "mov {stride:e}, 128",
                $($store,)*
                segment = inout(reg) $segments.as_ptr() => _,
                left = out(reg) _,
                left_next = out(reg) _,
                stride = out(reg) _,
                steps = inout(reg) u64::from($accumulate) => _,
                right = inout(reg) $right => _,
                sums = in(reg) $sums,
                line = in(reg) 64usize,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    };
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
        scratch: &mut Vec<bf16>,
    ) {
        let blocks = Blocks::<{ Self::STRIPS }> { stride, before };
        // SAFETY: the caller's promise.
        unsafe { pack::right(side, lines, depth, panel, blocks, scratch) };
    }

    unsafe fn block(
        segments: &[Segment],
        lines: usize,
        right: *const u8,
        strips: usize,
        sums: *mut f32,
        accumulate: bool,
    ) {
        const { assert!(LEFT == 32 && size_of::<Segment>() == 32) };
        debug_assert!(segments.len() > 1 && segments.last().is_some_and(|end| end.steps == 0));
        match (lines > 16, strips > 1) {
            (true, true) => block!(segments, right, sums, accumulate,
                load: ["tileloadd tmm0, [{sums} + {stride}]" "tileloadd tmm1, [{sums} + {stride} + 64]"
                    "tileloadd tmm2, [{sums} + {stride} + 2048]" "tileloadd tmm3, [{sums} + {stride} + 2112]"],
                zero: ["tilezero tmm0" "tilezero tmm1" "tilezero tmm2" "tilezero tmm3"],
                step: ["tileloadd tmm4, [{left} + {stride}]" "tileloadd tmm6, [{right} + {line}]"
                    "tileloadd tmm7, [{right} + {line} + 1024]" "tileloadd tmm5, [{left_next} + {stride}]"
                    "tdpbf16ps tmm0, tmm4, tmm6" "tdpbf16ps tmm1, tmm4, tmm7"
                    "tdpbf16ps tmm2, tmm5, tmm6" "tdpbf16ps tmm3, tmm5, tmm7"],
                store: ["tilestored [{sums} + {stride}], tmm0" "tilestored [{sums} + {stride} + 64], tmm1"
                    "tilestored [{sums} + {stride} + 2048], tmm2" "tilestored [{sums} + {stride} + 2112], tmm3"]),
            (true, false) => block!(segments, right, sums, accumulate,
                load: ["tileloadd tmm0, [{sums} + {stride}]" "tileloadd tmm2, [{sums} + {stride} + 2048]"],
                zero: ["tilezero tmm0" "tilezero tmm2"],
                step: ["tileloadd tmm6, [{right} + {line}]" "tileloadd tmm4, [{left} + {stride}]"
                    "tileloadd tmm5, [{left_next} + {stride}]"
                    "tdpbf16ps tmm0, tmm4, tmm6" "tdpbf16ps tmm2, tmm5, tmm6"],
                store: ["tilestored [{sums} + {stride}], tmm0" "tilestored [{sums} + {stride} + 2048], tmm2"]),
            (false, true) => block!(segments, right, sums, accumulate,
                load: ["tileloadd tmm0, [{sums} + {stride}]" "tileloadd tmm1, [{sums} + {stride} + 64]"],
                zero: ["tilezero tmm0" "tilezero tmm1"],
                step: ["tileloadd tmm4, [{left} + {stride}]" "tileloadd tmm6, [{right} + {line}]"
                    "tileloadd tmm7, [{right} + {line} + 1024]"
                    "tdpbf16ps tmm0, tmm4, tmm6" "tdpbf16ps tmm1, tmm4, tmm7"],
                store: ["tilestored [{sums} + {stride}], tmm0" "tilestored [{sums} + {stride} + 64], tmm1"]),
            (false, false) => block!(segments, right, sums, accumulate,
                load: ["tileloadd tmm0, [{sums} + {stride}]"],
                zero: ["tilezero tmm0"],
                step: ["tileloadd tmm4, [{left} + {stride}]" "tileloadd tmm6, [{right} + {line}]"
                    "tdpbf16ps tmm0, tmm4, tmm6"],
                store: ["tilestored [{sums} + {stride}], tmm0"]),
        }
    }
}
