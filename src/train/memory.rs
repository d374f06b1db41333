//! What the process has used of the machine's memory.

/// The highest resident memory of this process so far, in bytes; 0 where the system does not tell.
#[must_use]
pub fn peak_rss_bytes() -> u64 {
    #[cfg(target_os = "linux")]
    {
        // Of `getrusage` a process inherits what the one that started it had.
        let told = std::fs::read_to_string("/proc/self/status").ok().and_then(|text| {
            let line = text.lines().find(|line| line.starts_with("VmHWM:"))?;
            line.split_whitespace().nth(1)?.parse::<u64>().ok()
        });
        told.map_or(0, |kib| kib * 1024)
    }
    #[cfg(all(unix, not(target_os = "linux")))]
    {
        let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
        // SAFETY: `usage` is a valid place for one `rusage`, which the call fills in and any bytes of which are valid.
        let usage = unsafe {
            if libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr()) != 0 {
                return 0;
            }
            usage.assume_init()
        };
        // macOS counts in bytes, the others in KiB.
        let unit = if cfg!(target_os = "macos") { 1 } else { 1024 };
        u64::try_from(usage.ru_maxrss).unwrap_or(0) * unit
    }
    #[cfg(not(unix))]
    0
}

/// Memory that the machine could give this process now, in bytes, or what its container still allows; 4 GiB where the
/// system does not tell.
#[must_use]
pub fn available_bytes() -> u64 {
    let told = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find(|line| line.starts_with("MemAvailable:"))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok()
    });
    let machine = told.map_or(4 << 30, |kib| kib * 1024);
    allowed_bytes().map_or(machine, |allowed| allowed.min(machine))
}

/// What the control group of the process still allows; none where it sets no limit.
fn allowed_bytes() -> Option<u64> {
    let read = |file: &str| std::fs::read_to_string(format!("/sys/fs/cgroup/{file}")).ok();
    let limit: u64 = read("memory.max")?.trim().parse().ok()?;
    let used: u64 = read("memory.current")?.trim().parse().ok()?;
    // Files that were read count as used, and are given back first.
    let stat = read("memory.stat")?;
    let cached =
        stat.lines().find_map(|line| line.strip_prefix("inactive_file ")?.trim().parse::<u64>().ok());
    Some(limit.saturating_sub(used.saturating_sub(cached.unwrap_or(0))))
}
