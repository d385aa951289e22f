//! The machine that is being divided, as far as this process may use it.

/// Memory of this machine; read once, at the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Machine {
    /// The RAM, or the memory limit of the cgroup where that is less. 0 where unknown.
    pub(crate) memory_bytes: u64,
}

impl Machine {
    pub(crate) fn look() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let group = read("/proc/self/cgroup");
        let group = group
            .lines()
            .find_map(|line| line.strip_prefix("0::"))
            .unwrap_or("/");
        let limit = read(&format!(
            "/sys/fs/cgroup{}/memory.max",
            group.trim_end_matches('/')
        ));
        let total = mem_total(&read("/proc/meminfo")).unwrap_or(0);
        Self {
            memory_bytes: limit
                .trim()
                .parse()
                .map_or(total, |limit: u64| limit.min(total)),
        }
    }
}

fn mem_total(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo() {
        assert_eq!(
            mem_total("MemTotal:       16 kB\nMemFree: 1 kB\n"),
            Some(16 << 10)
        );
        assert_eq!(mem_total("MemFree: 1 kB\n"), None);
        assert!(Machine::look().memory_bytes > 0);
    }
}
