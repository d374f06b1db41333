//! Which instructions multiply: found once per process.

use std::sync::LazyLock;

/// A way to multiply bf16, from the fastest to the one that works everywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Path {
    /// Tiles of Intel's AMX.
    #[cfg(target_arch = "x86_64")]
    Amx,
    /// AVX-512 with its bf16 dot product.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// Widened to f32, multiplied by the `gemm` crate.
    Portable,
}

impl Path {
    /// Those that this machine can take, the best first.
    pub(crate) fn all() -> &'static [Self] {
        static ALL: LazyLock<Vec<Path>> = LazyLock::new(|| {
            let mut all = Vec::new();
            #[cfg(target_arch = "x86_64")]
            if has_avx512() {
                if has_amx() {
                    all.push(Path::Amx);
                }
                all.push(Path::Avx512);
            }
            all.push(Path::Portable);
            all
        });
        &ALL
    }

    pub(crate) fn best() -> Self {
        Self::all()[0]
    }

    /// The name by which a run remembers what it was computed with.
    pub(crate) fn name(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Amx => "amx",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "avx512-bf16",
            Self::Portable => "portable",
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512bf16")
}

/// Whether processor and system know the tiles, and the system lets this process use them.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn has_amx() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};

    const AMX_BF16: u32 = 1 << 22;
    const AMX_TILE: u32 = 1 << 24;
    /// State components 17 and 18: tile configuration and tile data.
    const TILE_STATE: u64 = 0b11 << 17;
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;

    #[target_feature(enable = "xsave")]
    fn enabled_state() -> u64 {
        // SAFETY: register 0 exists wherever XGETBV does.
        unsafe { _xgetbv(0) }
    }

    let most = __cpuid(0).eax;
    if most < 7 || !is_x86_feature_detected!("xsave") {
        return false;
    }
    let features = __cpuid_count(7, 0).edx;
    if features & AMX_BF16 == 0 || features & AMX_TILE == 0 {
        return false;
    }
    // SAFETY: the feature has just been detected, which includes that the system has switched it on.
    if unsafe { enabled_state() } & TILE_STATE != TILE_STATE {
        return false;
    }
    // SAFETY: this call only asks for permission; it touches no memory of ours.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
fn has_amx() -> bool {
    false
}
