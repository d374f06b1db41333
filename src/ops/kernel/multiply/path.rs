//! Which instructions multiply: found once per process.

use std::sync::{LazyLock, OnceLock};

/// The environment variable that names the path to take.
const VARIABLE: &str = "PEFT_KERNELS";

/// Instructions that multiply, from the newest to those that every machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Path {
    /// Tiles of Intel's AMX, for bf16 and, in three parts, for f32.
    #[cfg(target_arch = "x86_64")]
    Amx,
    /// AVX-512 with its dot product of bf16.
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
    /// AVX-512, in f32.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX2 with fused multiply-add and conversions of f16, in f32.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// In f32, by the `gemm` crate.
    Portable,
}

impl Path {
    /// All that there are, the newest first.
    pub(crate) const ALL: &[Self] = &[
        #[cfg(target_arch = "x86_64")]
        Self::Amx,
        #[cfg(target_arch = "x86_64")]
        Self::Avx512Bf16,
        #[cfg(target_arch = "x86_64")]
        Self::Avx512,
        #[cfg(target_arch = "x86_64")]
        Self::Avx2,
        Self::Portable,
    ];

    /// Those that this machine can take, the newest first.
    pub(crate) fn all() -> &'static [Self] {
        static ALL: LazyLock<Vec<Path>> =
            LazyLock::new(|| Path::ALL.iter().copied().filter(|path| path.is_here()).collect());
        &ALL
    }

    /// What `PEFT_KERNELS` names, else the newest.
    pub(crate) fn best() -> Self {
        static BEST: LazyLock<Path> =
            LazyLock::new(|| Path::forced().ok().flatten().unwrap_or(Path::all()[0]));
        *BEST
    }

    /// The path of this name, if the machine has it.
    pub(crate) fn named(name: &str) -> Option<Self> {
        Self::all().iter().copied().find(|path| path.name() == name)
    }

    /// The path that `PEFT_KERNELS` names, if it is set. Where the name is unknown or the machine lacks the instructions, the
    /// error is what is wrong and what to do.
    pub(crate) fn forced() -> Result<Option<Self>, [String; 2]> {
        let Some(value) = std::env::var_os(VARIABLE).filter(|value| !value.is_empty()) else {
            return Ok(None);
        };
        let name = value.to_string_lossy();
        let names = |paths: &[Self]| paths.iter().map(|path| path.name()).collect::<Vec<_>>().join(", ");
        let here = format!("this machine has {}; unset the variable to use the fastest", names(Self::all()));
        let Some(path) = Self::ALL.iter().find(|path| path.name() == name) else {
            let message = format!("`{VARIABLE}` is `{name}`; expected one of {}", names(Self::ALL));
            return Err([message, here]);
        };
        if !path.is_here() {
            return Err([
                format!("`{VARIABLE}` is `{name}`, and this machine has no such instructions"),
                here,
            ]);
        }
        Ok(Some(*path))
    }

    /// The name by which a run remembers what it was computed with, and by which users ask for it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Amx => "amx",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => "avx512-bf16",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "avx2",
            Self::Portable => "portable",
        }
    }

    /// Whether this machine has the instructions.
    fn is_here(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        let avx2 = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        #[cfg(target_arch = "x86_64")]
        let avx512 = avx2
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl");
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Amx => Self::Avx512Bf16.is_here() && has_amx(),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => avx512 && is_x86_feature_detected!("avx512bf16"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => avx512,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => avx2,
            Self::Portable => true,
        }
    }
}

/// The paths for products of each type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Choice {
    /// For products without bf16.
    pub(crate) wide: Path,
    /// For products in which a factor is bf16.
    pub(crate) narrow: Path,
}

/// What this process multiplies with. It stays what it is from the first product on.
static CHOICE: OnceLock<Choice> = OnceLock::new();

impl Choice {
    /// The one in use.
    pub(crate) fn current() -> Self {
        *CHOICE.get_or_init(|| Self { wide: Path::best(), narrow: Path::best() })
    }

    /// Uses this one, if none is in use yet, and returns the one in use.
    pub(crate) fn adopt(self) -> Self {
        *CHOICE.get_or_init(|| self)
    }
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
