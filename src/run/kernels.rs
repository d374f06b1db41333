//! The instructions that products are computed with: those that `PEFT_KERNELS` names, or the fastest of this machine.
//!
//! What was measured is kept in the user's cache folder, so that all runs of this version on this machine compute with the same
//! instructions, and to the same bits.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Context, Error, Result, open_to_lock, read_regular, refuse_irregular};
use crate::model::config::DecoderConfig;
use crate::ops::{KernelRate, Kernels};
use crate::weights::write_atomic;

/// The most bytes that a file of measurements may have.
const MOST_BYTES: u64 = 1 << 20;

/// The names of what was fastest, by machine and shape.
type Measurements = BTreeMap<String, Names>;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Names {
    f32: String,
    bf16: String,
}

/// The instructions in use and why.
#[derive(Debug)]
pub struct ChosenKernels {
    kernels: Kernels,
    threads: usize,
    why: String,
}

impl ChosenKernels {
    /// Chooses for products with the weights of a model, and uses them from now on.
    ///
    /// # Errors
    /// Fails if `PEFT_KERNELS` names no instructions of this machine.
    pub fn of(config: &DecoderConfig) -> Result<Self> {
        let (kernels, why) = match Kernels::forced()? {
            Some(forced) => (forced, "as `PEFT_KERNELS` says".to_string()),
            None if Kernels::candidates().len() == 1 => {
                (Kernels::current(), "the newest that this machine has".to_string())
            }
            None => measured(config, cache_file().as_deref()),
        };
        let used = kernels.adopt();
        let why = if used == kernels { why } else { format!("in use before; {kernels} would be {why}") };
        Ok(Self { kernels: used, threads: rayon::current_num_threads(), why })
    }
}

impl fmt::Display for ChosenKernels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let threads = if self.threads == 1 { "thread" } else { "threads" };
        write!(f, "kernels: {} on {} {threads}, {}", self.kernels, self.threads, self.why)
    }
}

/// Looks up in `file` what is fastest for the widest layers of a model, or measures it and keeps it there. The number of threads
/// makes no difference, for results must not depend on it.
fn measured(config: &DecoderConfig, file: Option<&Path>) -> (Kernels, String) {
    let hidden = config.hidden_size;
    let linears = config.linears();
    let inner = linears.iter().filter(|linear| linear.layer.is_some());
    // More would take longer and tell nothing else.
    let widest = inner.map(|linear| linear.out_features).max().unwrap_or(hidden).min(8192);
    let hidden = hidden.min(8192);
    let key = format!(
        "{}, {}, {hidden} by {widest}, version {}",
        processor(),
        Kernels::candidates().join(" "),
        env!("CARGO_PKG_VERSION"),
    );
    // Others wait meanwhile: two that measure at once would disturb each other and might keep different results.
    let lock = file.map(lock);
    let mut kept = file.map_or_else(Measurements::new, read);
    if let Some(kernels) = kept.get(&key).and_then(|names| Kernels::named(&names.f32, &names.bf16)) {
        return (kernels, "which an earlier run measured to be fastest here".to_string());
    }
    let (kernels, rates) = Kernels::measure(hidden, widest);
    let rates: Vec<String> = rates.iter().map(rate).collect();
    let why = format!("measured now in f32 and bf16: {}", rates.join(", "));
    kept.insert(key, Names { f32: kernels.f32().to_string(), bf16: kernels.bf16().to_string() });
    let stored = match (file, lock) {
        (Some(file), Some(Ok(_lock))) => keep(file, &kept),
        (_, Some(Err(error))) => Err(error),
        _ => Err(Error::invalid("neither `XDG_CACHE_HOME` nor `HOME` is set")),
    };
    match stored {
        Ok(()) => (kernels, why),
        Err(error) => {
            let why =
                format!("{why}; later runs measure again and may differ in their last bits, because {error}");
            (kernels, why)
        }
    }
}

/// Writes the measurements to a file, unless something that is no file has its name.
fn keep(file: &Path, kept: &Measurements) -> Result<()> {
    refuse_irregular(file).at(file)?;
    write_atomic(file, &serde_json::to_vec_pretty(kept)?)
}

/// Waits until no other process measures. The lock ends with the file that is returned.
fn lock(file: &Path) -> Result<File> {
    let path = file.with_extension("lock");
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).at(folder)?;
    }
    let lock = open_to_lock(&path).at(&path)?;
    lock.lock().at(&path)?;
    Ok(lock)
}

fn rate(rate: &KernelRate) -> String {
    let narrow = 2e-9 * rate.bf16;
    match rate.f32 {
        Some(wide) => format!("{} {:.0} and {narrow:.0} GFLOP/s", rate.name, 2e-9 * wide),
        None => format!("{} {narrow:.0} in bf16", rate.name),
    }
}

/// The file of measurements, if there is a folder for caches.
fn cache_file() -> Option<PathBuf> {
    let folder = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let caches = folder("XDG_CACHE_HOME").or_else(|| Some(folder("HOME")?.join(".cache")))?;
    Some(caches.join("peft").join("kernels.json"))
}

/// The measurements in a file. One that is not there or not readable has none, and is written anew.
fn read(file: &Path) -> Measurements {
    read_regular(file, MOST_BYTES)
        .ok()
        .and_then(|bytes| serde_json::from_slice(&bytes).ok())
        .unwrap_or_default()
}

/// The name of the processor, as it says itself.
#[cfg(target_arch = "x86_64")]
fn processor() -> String {
    use std::arch::x86_64::__cpuid;

    /// The leaves that hold the name, 16 bytes each.
    const NAME: [u32; 3] = [0x8000_0002, 0x8000_0003, 0x8000_0004];
    if __cpuid(0x8000_0000).eax < NAME[2] {
        return "an x86-64 processor".to_string();
    }
    let bytes: Vec<u8> = NAME
        .iter()
        .map(|leaf| __cpuid(*leaf))
        .flat_map(|part| [part.eax, part.ebx, part.ecx, part.edx])
        .flat_map(u32::to_le_bytes)
        .take_while(|byte| *byte != 0)
        .collect();
    String::from_utf8_lossy(&bytes).trim().to_string()
}

#[cfg(not(target_arch = "x86_64"))]
fn processor() -> String {
    std::env::consts::ARCH.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Pretrained;

    fn tiny() -> DecoderConfig {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/tiny-llama");
        Pretrained::open(folder).unwrap().config().clone()
    }

    #[test]
    fn what_was_measured_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a/b/kernels.json");
        let (first, why) = measured(&tiny(), Some(&file));
        assert!(why.starts_with("measured now"), "{why}");
        let (second, why) = measured(&tiny(), Some(&file));
        assert_eq!((first, why.as_str()), (second, "which an earlier run measured to be fastest here"));
        // Names that this machine lacks are measured anew, and so is what cannot be read.
        let names = Names { f32: "abacus".to_string(), bf16: "abacus".to_string() };
        let key = read(&file).into_keys().next().unwrap();
        write_atomic(&file, &serde_json::to_vec(&Measurements::from([(key, names)])).unwrap()).unwrap();
        for text in [None, Some("{"), Some("[]")] {
            if let Some(text) = text {
                fs::write(&file, text).unwrap();
            }
            assert!(measured(&tiny(), Some(&file)).1.starts_with("measured now"));
            assert_eq!(read(&file).len(), 1);
        }
    }

    /// Opening a named pipe waits for its other end, and writing a file over it would remove it.
    #[cfg(unix)]
    #[test]
    fn a_pipe_in_the_place_of_a_file_is_named_and_left_alone() {
        for name in ["kernels.lock", "kernels.json"] {
            let folder = tempfile::tempdir().unwrap();
            let pipe = folder.path().join(name);
            assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
            let (sender, receiver) = std::sync::mpsc::channel();
            let file = folder.path().join("kernels.json");
            std::thread::spawn(move || sender.send(measured(&tiny(), Some(&file)).1));
            let why = receiver.recv_timeout(std::time::Duration::from_secs(60)).expect("the program waits");
            let wanted = format!("because {}: is a named pipe, expected a regular file", pipe.display());
            assert!(why.ends_with(&wanted), "{why}");
            assert!(!fs::metadata(&pipe).unwrap().is_file());
        }
    }

    #[test]
    fn a_measurement_that_cannot_be_kept_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("kernels.json");
        fs::create_dir(&file).unwrap();
        for file in [None, Some(file.as_path())] {
            let (_, why) = measured(&tiny(), file);
            assert!(why.contains("may differ in their last bits, because "), "{why}");
        }
    }
}
