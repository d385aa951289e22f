//! Control groups for machines: where a tenant's shares, reservation and limit reach vCPU threads.
//!
//! ```text
//!  <this process's group>/insula-<8 digits>/t<tenant>/m<machine>     v2, or each v1 controller
//! ```
//!
//! The tenant's directory carries the tenant's envelope, the machine's the machine's own: the kernel
//! applies both. `cpu`, `memory` and `pids` are looked for in v1 first, since a controller that is
//! mounted there is not available in v2.
//!
//! **Failure paths.** A controller that cannot be written is left out, and what is missing is said
//! once, at the start ([`Groups::missing`]); a machine then runs without that bound. A directory that
//! is left by a host that died is used again.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use insula_types::spec::CpuEnvelope;
use insula_types::{Bytes, MachineId, TenantId};

/// What a monitor may use beside its guest's memory before the kernel ends it: its stacks, buffers
/// and page tables.
const OVERHEAD: Bytes = Bytes::mib(64);
/// The kernel's own period (`Documentation/scheduler/sched-bwc.rst`).
const PERIOD_US: u64 = 100_000;
/// The kernel refuses less.
const QUOTA_LEAST_US: u64 = 1_000;

/// Where the host's own processes go, in v2, when their group is to pass controllers on.
const LEAF: &str = "insula-host";

/// The controllers that we use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Controller {
    Cpu,
    Memory,
    Pids,
}

impl Controller {
    const ALL: [Self; 3] = [Self::Cpu, Self::Memory, Self::Pids];

    const fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Memory => "memory",
            Self::Pids => "pids",
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

/// Where machines' groups are made.
#[derive(Debug, Default)]
pub(crate) struct Groups {
    bases: BTreeMap<Controller, (Version, PathBuf)>,
    missing: Vec<String>,
}

impl Groups {
    /// Looks where this process may make groups. `instance` tells apart the groups of two hosts on
    /// one machine.
    pub(crate) fn find(instance: &str) -> Self {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        let (own, mounts) = (read("/proc/self/cgroup"), read("/proc/self/mountinfo"));
        let mut groups = Self::default();
        for controller in Controller::ALL {
            let name = controller.name();
            let Some((version, own)) = own_group(name, &own, &mounts) else {
                groups.missing.push(format!("{name}: not mounted"));
                continue;
            };
            // Made by an earlier host, whose groups are beside it.
            let own = match own.parent() {
                Some(above) if own.ends_with(LEAF) => above.to_owned(),
                _ => own,
            };
            let base = own.join(format!("insula-{instance}"));
            match prepare(controller, version, &own, &base) {
                Ok(()) => drop(groups.bases.insert(controller, (version, base))),
                Err(error) => groups.missing.push(format!("{name}: {error}")),
            }
        }
        groups
    }

    /// Which controllers cannot be used, and why.
    pub(crate) fn missing(&self) -> &[String] {
        &self.missing
    }

    /// The directories of a tenant, each once.
    fn of_tenant(&self, tenant: TenantId) -> Vec<(Controller, Version, PathBuf)> {
        let bases = self.bases.iter();
        bases
            .map(|(controller, (version, base))| {
                (*controller, *version, base.join(format!("t{tenant}")))
            })
            .collect()
    }

    /// Applies a tenant's envelope; makes its directories.
    pub(crate) fn set_tenant(&self, tenant: TenantId, cpu: &CpuEnvelope) -> io::Result<()> {
        for (controller, version, path) in self.of_tenant(tenant) {
            make(&path)?;
            if version == Version::V2 {
                enable(controller, &path)?;
            }
            if controller == Controller::Cpu {
                set_cpu(version, &path, cpu)?;
            }
        }
        Ok(())
    }

    /// Makes a machine's directories, and says where its monitor is to go.
    pub(crate) fn make_machine(
        &self,
        (tenant, machine): (TenantId, MachineId),
        cpu: &CpuEnvelope,
        memory: Bytes,
        threads: u64,
    ) -> io::Result<Vec<PathBuf>> {
        let mut paths = Vec::new();
        for (controller, version, path) in self.of_tenant(tenant) {
            let path = path.join(format!("m{machine}"));
            make(&path)?;
            match controller {
                Controller::Cpu => set_cpu(version, &path, cpu)?,
                Controller::Memory => {
                    let file = match version {
                        Version::V1 => "memory.limit_in_bytes",
                        Version::V2 => "memory.max",
                    };
                    let most = memory.get().saturating_add(OVERHEAD.get());
                    fs::write(path.join(file), most.to_string())?;
                }
                Controller::Pids => fs::write(path.join("pids.max"), threads.to_string())?,
            }
            paths.push(path);
        }
        paths.dedup();
        Ok(paths)
    }

    /// For how long a machine was held back by a limit.
    pub(crate) fn throttled(&self, tenant: TenantId, machine: MachineId) -> Option<Duration> {
        let (version, base) = self.bases.get(&Controller::Cpu)?;
        let path = base.join(format!("t{tenant}")).join(format!("m{machine}"));
        let (own, above) = (cpu_stat(&path, *version)?, path.parent()?);
        // The tenant's limit holds all its machines back alike.
        Some(own.saturating_add(cpu_stat(above, *version).unwrap_or_default()))
    }

    /// Removes a machine's directories; fails while its monitor lives.
    pub(crate) fn remove_machine(&self, tenant: TenantId, machine: MachineId) -> io::Result<()> {
        for (_, _, path) in self.of_tenant(tenant) {
            remove(&path.join(format!("m{machine}")))?;
        }
        Ok(())
    }

    /// Removes every directory in which no monitor lives; the host ends.
    pub(crate) fn leave(&self) {
        for (_, base) in self.bases.values() {
            for tenant in directories(base) {
                for machine in directories(&tenant) {
                    // This one and those below: refused where somebody lives, who stays.
                    let _ = fs::remove_dir(machine);
                }
                let _ = fs::remove_dir(tenant);
            }
            let _ = fs::remove_dir(base);
        }
    }

    /// Removes a tenant's directories, if it has no machine left.
    pub(crate) fn remove_tenant(&self, tenant: TenantId) -> io::Result<()> {
        for (_, _, path) in self.of_tenant(tenant) {
            remove(&path)?;
        }
        Ok(())
    }
}

/// This process's group for a controller, as a directory.
fn own_group(controller: &str, own: &str, mounts: &str) -> Option<(Version, PathBuf)> {
    // "hierarchy:controllers:path" (cgroups(7)); v2 has neither number nor controllers.
    let path_of = |wanted: &dyn Fn(&str) -> bool| {
        own.lines().find_map(|line| {
            let mut parts = line.splitn(3, ':').skip(1);
            let (controllers, path) = (parts.next()?, parts.next()?);
            wanted(controllers).then(|| path.to_owned())
        })
    };
    for mount in mounts.lines().filter_map(Mount::parse) {
        let one_of = |list: &str| list.split(',').any(|one| one == controller);
        let (version, group) = match mount.kind {
            "cgroup" if one_of(mount.options) => (Version::V1, path_of(&|list| one_of(list))),
            "cgroup2" => {
                let there = fs::read_to_string(Path::new(mount.point).join("cgroup.controllers"));
                let there = there.unwrap_or_default();
                if !there.split_whitespace().any(|one| one == controller) {
                    continue;
                }
                (Version::V2, path_of(&str::is_empty))
            }
            _ => continue,
        };
        let group = group?;
        // In a container the mount shows a part of the tree only.
        let below = group.strip_prefix(mount.root).unwrap_or("");
        let point = Path::new(mount.point);
        return Some((version, point.join(below.trim_start_matches('/'))));
    }
    None
}

/// One line of `mountinfo` (proc_pid_mountinfo(5)).
struct Mount<'l> {
    root: &'l str,
    point: &'l str,
    kind: &'l str,
    options: &'l str,
}

impl<'l> Mount<'l> {
    fn parse(line: &'l str) -> Option<Self> {
        let (left, right) = line.split_once(" - ")?;
        let (mut left, mut right) = (left.split(' ').skip(3), right.split(' '));
        let (root, point) = (left.next()?, left.next()?);
        let (kind, options) = (right.next()?, right.nth(1)?);
        Some(Self {
            root: root.trim_end_matches('/'),
            point,
            kind,
            options,
        })
    }
}

/// Makes the directory that all machines are below, and lets controllers through to it.
fn prepare(controller: Controller, version: Version, own: &Path, base: &Path) -> io::Result<()> {
    if version == Version::V2 {
        enable_here(controller, own)?;
    }
    make(base)?;
    if version == Version::V2 {
        enable(controller, base)?;
    }
    Ok(())
}

/// In v2 a group with processes cannot pass controllers on: then the processes that are in ours move
/// into a leaf beside the machines (cgroup-v2.rst, "No Internal Process Constraint").
fn enable_here(controller: Controller, own: &Path) -> io::Result<()> {
    let Err(error) = enable(controller, own) else {
        return Ok(());
    };
    if error.raw_os_error() != Some(rustix::io::Errno::BUSY.raw_os_error()) {
        return Err(error);
    }
    let leaf = own.join(LEAF);
    make(&leaf)?;
    for process in fs::read_to_string(own.join("cgroup.procs"))?.lines() {
        fs::write(leaf.join("cgroup.procs"), process)?;
    }
    enable(controller, own)
}

fn enable(controller: Controller, path: &Path) -> io::Result<()> {
    let wanted = format!("+{}", controller.name());
    fs::write(path.join("cgroup.subtree_control"), wanted)
}

fn make(path: &Path) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

fn directories(path: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    let directories = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    directories.map(|entry| entry.path()).collect()
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Shares and limit. The kernel knows no reservation: a machine has one only as far as its shares
/// give it.
fn set_cpu(version: Version, path: &Path, cpu: &CpuEnvelope) -> io::Result<()> {
    let quota = cpu.limit.map(|limit| {
        let quota = limit.get().saturating_mul(PERIOD_US) / 1_000;
        quota.max(QUOTA_LEAST_US)
    });
    match version {
        Version::V1 => {
            fs::write(path.join("cpu.shares"), v1_shares(cpu).to_string())?;
            fs::write(path.join("cpu.cfs_period_us"), PERIOD_US.to_string())?;
            let quota = quota.map_or_else(|| "-1".to_owned(), |quota| quota.to_string());
            fs::write(path.join("cpu.cfs_quota_us"), quota)
        }
        Version::V2 => {
            fs::write(path.join("cpu.weight"), weight(cpu).to_string())?;
            let quota = quota.map_or_else(|| "max".to_owned(), |quota| quota.to_string());
            fs::write(path.join("cpu.max"), format!("{quota} {PERIOD_US}"))
        }
    }
}

/// 1000 shares are the kernel's default of 1024 (sched-design-CFS.rst, section 7).
fn v1_shares(cpu: &CpuEnvelope) -> u64 {
    (u64::from(cpu.shares.get()) * 1_024 / 1_000).clamp(2, 262_144)
}

/// 1000 shares are the kernel's default of 100 (cgroup-v2.rst, `cpu.weight`).
fn weight(cpu: &CpuEnvelope) -> u64 {
    (u64::from(cpu.shares.get()) / 10).clamp(1, 10_000)
}

fn cpu_stat(path: &Path, version: Version) -> Option<Duration> {
    let text = fs::read_to_string(path.join("cpu.stat")).ok()?;
    let (key, nanoseconds) = match version {
        Version::V1 => ("throttled_time ", 1),
        Version::V2 => ("throttled_usec ", 1_000),
    };
    let value = text.lines().find_map(|line| line.strip_prefix(key))?;
    let value: u64 = value.trim().parse().ok()?;
    Some(Duration::from_nanos(value.saturating_mul(nanoseconds)))
}

#[cfg(test)]
mod tests {
    use insula_types::Millicores;

    use super::*;

    const HYBRID: &str = "\
30 23 0:26 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755
31 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid - cgroup cgroup rw,cpu,cpuacct
32 30 0:28 /box /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
";

    #[test]
    fn v1_groups_are_found_below_their_mounts() {
        let own = "12:memory:/box/inner\n4:cpu,cpuacct:/\n0::/\n";
        let cpu = own_group("cpu", own, HYBRID);
        let expected = (Version::V1, PathBuf::from("/sys/fs/cgroup/cpu,cpuacct/"));
        assert_eq!(cpu, Some(expected));
        let memory = own_group("memory", own, HYBRID);
        let expected = (Version::V1, PathBuf::from("/sys/fs/cgroup/memory/inner"));
        assert_eq!(memory, Some(expected));
        assert_eq!(own_group("pids", own, HYBRID), None);
    }

    #[test]
    fn shares_become_the_kernels() {
        let mut cpu = CpuEnvelope::default();
        assert_eq!((v1_shares(&cpu), weight(&cpu)), (1_024, 100));
        cpu.shares = insula_types::Shares::new(3_000).expect("shares");
        assert_eq!((v1_shares(&cpu), weight(&cpu)), (3_072, 300));
    }

    /// Against this machine's own groups, where they may be written.
    #[test]
    fn groups_are_made_bounded_and_removed() {
        let groups = Groups::find(&format!("test-{}", std::process::id()));
        let (tenant, machine) = (TenantId::new(7), MachineId::new(9));
        let cpu = CpuEnvelope {
            limit: Some(Millicores::new(500).expect("a limit")),
            ..CpuEnvelope::default()
        };
        groups.set_tenant(tenant, &cpu).expect("a tenant's");
        let made = groups.make_machine((tenant, machine), &cpu, Bytes::mib(32), 40);
        for path in made.expect("a machine's") {
            assert!(path.ends_with("t7/m9"), "{}", path.display());
            let pids = fs::read_to_string(path.join("pids.max"));
            if let Ok(pids) = pids {
                assert_eq!(pids.trim(), "40");
            }
            if let Ok(quota) = fs::read_to_string(path.join("cpu.cfs_quota_us")) {
                assert_eq!(quota.trim(), "50000");
            }
        }
        if groups.bases.contains_key(&Controller::Cpu) {
            assert_eq!(groups.throttled(tenant, machine), Some(Duration::ZERO));
        }
        groups.remove_machine(tenant, machine).expect("empty");
        groups.remove_tenant(tenant).expect("empty");
        groups
            .remove_machine(tenant, machine)
            .expect("gone already");
        groups.set_tenant(tenant, &cpu).expect("once more");
        groups.leave();
        for (_, base) in groups.bases.values() {
            assert!(!base.exists(), "{}", base.display());
        }
    }
}
