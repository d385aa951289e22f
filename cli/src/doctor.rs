//! `insula doctor`: what this machine has and lacks, and how to mend it.

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use insula_host::machines::Support;
use insula_toolchain::{Probe, Readiness, Settings};
use rustix::process::{Resource, getrlimit};
use serde_json::json;

use crate::access::default_data_dir;
use crate::args::{DoctorArgs, Format};
use crate::output::{self, Style};

/// PAGEMAP_SCAN came with Linux 6.7; with it a slot of the pool is reset in microseconds.
const PAGEMAP_SCAN_SINCE: (u32, u32) = (6, 7);
/// What we test on at the oldest: the kernel of Debian 11.
const OLDEST_KERNEL: (u32, u32) = (5, 10);
/// A connection takes one; below this even a small host runs out.
const FILES_WANTED: u64 = 16_384;
const FILES_NEEDED: u64 = 256;
/// The kernel's default, on which the number of pooled instances is built.
const MAPS_WANTED: u64 = 65_530;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// As it should be.
    Good,
    /// `insula serve` runs; something is slower, smaller or not there.
    Warning,
    /// `insula serve` cannot run like this.
    Missing,
}

impl State {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Good => "ok",
            Self::Warning => "warning",
            Self::Missing => "missing",
        }
    }
}

/// One thing that was looked at.
#[derive(Debug)]
struct Check {
    name: &'static str,
    state: State,
    /// What was found.
    found: String,
    /// What to do about it.
    mend: Option<String>,
}

impl Check {
    fn good(name: &'static str, found: impl fmt::Display) -> Self {
        Self {
            name,
            state: State::Good,
            found: found.to_string(),
            mend: None,
        }
    }

    fn bad(name: &'static str, state: State, found: impl fmt::Display, mend: &str) -> Self {
        Self {
            name,
            state,
            found: found.to_string(),
            mend: Some(mend.to_owned()),
        }
    }
}

pub(crate) fn run(args: &DoctorArgs) -> Result<ExitCode> {
    let data = args.data.clone().or_else(default_data_dir);
    let checks = [
        kernel(&text("/proc/sys/kernel/osrelease")),
        data_dir(data.as_deref()),
        files(getrlimit(Resource::Nofile).maximum),
        address_space(getrlimit(Resource::As).current),
        maps(text("/proc/sys/vm/max_map_count").parse().ok()),
        overcommit(&text("/proc/sys/vm/overcommit_memory")),
        swap(&text("/proc/swaps")),
        cgroups(Path::new("/sys/fs/cgroup")),
        kvm(&insula_host::machines::probe()),
        network(insula_host::machines::network::probe()),
        toolchain(),
    ];
    match args.output {
        Format::Json => output::json(&as_json(&checks))?,
        Format::Table => output::print(&as_text(&checks, Style::of(&io::stdout())))?,
    }
    let missing = checks.iter().any(|check| check.state == State::Missing);
    Ok(ExitCode::from(if missing { crate::FAILED } else { 0 }))
}

fn text(path: &str) -> String {
    fs::read_to_string(path)
        .unwrap_or_default()
        .trim()
        .to_owned()
}

fn as_json(checks: &[Check]) -> serde_json::Value {
    let items = checks.iter().map(|check| {
        json!({
            "name": check.name,
            "state": check.state.as_str(),
            "found": check.found,
            "mend": check.mend,
        })
    });
    json!({ "items": items.collect::<Vec<_>>(), "next": null })
}

fn as_text(checks: &[Check], style: Style) -> String {
    let mut text = String::new();
    for check in checks {
        let word = format!("{:<8}", check.state.as_str());
        let word = match check.state {
            State::Good => style.green(&word),
            State::Warning => style.yellow(&word),
            State::Missing => style.red(&word),
        };
        let found = check.found.replace('\n', "\n                        ");
        text.push_str(&format!("{word} {:<14} {found}\n", check.name));
        for line in check.mend.iter().flat_map(|mend| mend.lines()) {
            text.push_str(&format!("{:<24}{}\n", "", style.dim(line)));
        }
    }
    text
}

fn kernel(release: &str) -> Check {
    const NAME: &str = "kernel";
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let mut number = || numbers.next()?.parse::<u32>().ok();
    let version = number().zip(number());
    match version {
        None => Check::bad(
            NAME,
            State::Warning,
            format_args!("unknown release {release:?}"),
            "mount /proc",
        ),
        Some(version) if version < OLDEST_KERNEL => Check::bad(
            NAME,
            State::Warning,
            format_args!("Linux {release}; untested before 5.10"),
            "use a newer kernel",
        ),
        Some(version) if version < PAGEMAP_SCAN_SINCE => Check::bad(
            NAME,
            State::Warning,
            format_args!("Linux {release}, without PAGEMAP_SCAN"),
            "Linux 6.7 or newer resets instances faster",
        ),
        Some(_) => Check::good(NAME, format_args!("Linux {release}")),
    }
}

/// Looks whether `insula serve` could keep its state here, without leaving anything behind but
/// what it would have made itself.
fn data_dir(dir: Option<&Path>) -> Check {
    const NAME: &str = "data directory";
    let Some(dir) = dir else {
        return Check::bad(
            NAME,
            State::Missing,
            "neither HOME nor XDG_DATA_HOME is set",
            "set INSULA_DATA, or use --data",
        );
    };
    let shown = dir.display();
    // The nearest folder that exists decides whether the rest can be made.
    let exists = dir.ancestors().find(|ancestor| ancestor.exists());
    let near: PathBuf = exists.unwrap_or(Path::new("/")).to_owned();
    match tempfile::Builder::new()
        .prefix(".insula-doctor-")
        .permissions(private())
        .tempdir_in(&near)
    {
        Ok(_) if near == dir => Check::good(NAME, shown),
        Ok(_) => Check::good(NAME, format_args!("{shown}, not made yet")),
        Err(error) => Check::bad(
            NAME,
            State::Missing,
            format_args!("{shown}: {error}"),
            "give INSULA_DATA or --data a directory that this user can write",
        ),
    }
}

fn private() -> fs::Permissions {
    std::os::unix::fs::PermissionsExt::from_mode(0o700)
}

/// `None` is no limit.
fn files(maximum: Option<u64>) -> Check {
    const NAME: &str = "open files";
    const MEND: &str = "raise it: `ulimit -Hn 65536`, or LimitNOFILE= in the systemd unit";
    match maximum {
        None => Check::good(NAME, "no limit"),
        Some(maximum) if maximum < FILES_NEEDED => Check::bad(
            NAME,
            State::Missing,
            format_args!("at most {maximum}"),
            MEND,
        ),
        Some(maximum) if maximum < FILES_WANTED => {
            let found = format!("at most {maximum}: as many connections, and no more");
            Check::bad(NAME, State::Warning, found, MEND)
        }
        Some(maximum) => Check::good(NAME, format_args!("at most {maximum}")),
    }
}

/// The pool reserves terabytes of addresses (not of memory).
fn address_space(limit: Option<u64>) -> Check {
    const NAME: &str = "address space";
    match limit {
        None => Check::good(NAME, "no limit"),
        Some(limit) => Check::bad(
            NAME,
            State::Missing,
            format_args!("limited to {}", output::bytes_text(limit)),
            "take the limit away: `ulimit -v unlimited`; it is about addresses, not memory",
        ),
    }
}

fn maps(count: Option<u64>) -> Check {
    const NAME: &str = "memory maps";
    match count {
        Some(count) if count < MAPS_WANTED => Check::bad(
            NAME,
            State::Warning,
            format_args!("vm.max_map_count is {count}: fewer instances at once"),
            "sysctl -w vm.max_map_count=65530, or run with fewer --instances",
        ),
        Some(count) => Check::good(NAME, format_args!("vm.max_map_count is {count}")),
        None => Check::good(NAME, "vm.max_map_count is unknown"),
    }
}

fn overcommit(mode: &str) -> Check {
    const NAME: &str = "overcommit";
    match mode {
        "2" => Check::bad(
            NAME,
            State::Warning,
            "vm.overcommit_memory is 2: the pool's reservations may be refused",
            "sysctl -w vm.overcommit_memory=0, or run with fewer --instances",
        ),
        mode => Check::good(NAME, format_args!("vm.overcommit_memory is {mode}")),
    }
}

fn swap(swaps: &str) -> Check {
    const NAME: &str = "swap";
    // The first line is a heading.
    if swaps.lines().count() > 1 {
        Check::bad(
            NAME,
            State::Warning,
            "on: PAGEMAP_SCAN could miss a page that was swapped out, and is not used",
            "`swapoff -a` where latency matters",
        )
    } else {
        Check::good(NAME, "off")
    }
}

/// Version 2 has the controllers in one file, version 1 each in a folder.
fn cgroups(root: &Path) -> Check {
    const NAME: &str = "cgroups";
    const WANTED: [&str; 3] = ["cpu", "memory", "pids"];
    const MEND: &str = "for full guests only: without, they run without that bound";
    let unified = fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default();
    let unified: Vec<&str> = unified.split_whitespace().collect();
    let (version, has): (_, Vec<&str>) = if WANTED.iter().all(|name| unified.contains(name)) {
        ("v2", WANTED.to_vec())
    } else {
        let mounted = |name: &&str| root.join(name).join("cgroup.procs").exists();
        ("v1", WANTED.into_iter().filter(mounted).collect())
    };
    if has.len() == WANTED.len() {
        Check::good(NAME, format_args!("{version}: {}", has.join(", ")))
    } else {
        let found = format!("not all of {} are there", WANTED.join(", "));
        Check::bad(NAME, State::Warning, found, MEND)
    }
}

/// By trying: `/dev/kvm` that opens is not yet a KVM that runs an ordinary kernel.
fn kvm(support: &Support) -> Check {
    const NAME: &str = "kvm";
    match support {
        Support::Hardware => Check::good(NAME, format_args!("hardware: {support}")),
        Support::Emulated => Check::bad(
            NAME,
            State::Warning,
            format_args!("emulated: {support}"),
            "full guests want a machine with hardware virtualisation; services need none",
        ),
        Support::Absent(_) => Check::bad(
            NAME,
            State::Warning,
            format_args!("absent: {support}"),
            "for full guests: `modprobe kvm_intel` or `kvm_amd`, and membership in `kvm`",
        ),
    }
}

/// By giving a network to nobody, where nobody is.
fn network(probed: Result<(), String>) -> Check {
    const NAME: &str = "machine network";
    match probed {
        Ok(()) => Check::good(NAME, "taps and nftables"),
        Err(why) => Check::bad(
            NAME,
            State::Warning,
            format_args!("none: {why}"),
            "for networks of full guests: run as root, `apt install nftables`, `modprobe tun`; \
             without, they run without network",
        ),
    }
}

fn toolchain() -> Check {
    const NAME: &str = "wasm toolchain";
    let here = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("."));
    let probe = Probe::look(&Settings::from_env(&here));
    let rustc = probe.rustc.unwrap_or_else(|| "no rustc".to_owned());
    match probe.readiness {
        Readiness::Ready(source) => Check::good(NAME, format_args!("{rustc}; ready: {source}")),
        Readiness::Preparable(ways) => Check::bad(
            NAME,
            State::Warning,
            format_args!("{rustc}; not prepared yet"),
            &format!("the first `insula build` does it: {}", ways.join(", else ")),
        ),
        // Somebody who only runs a host needs none.
        Readiness::Missing(advice) => {
            let found = format!("{rustc}; guests cannot be built here");
            Check::bad(NAME, State::Warning, found, &advice)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels() {
        assert_eq!(kernel("6.12.1-cloud").state, State::Good);
        assert_eq!(kernel("6.1.0-18-amd64").state, State::Warning);
        assert_eq!(kernel("4.19").state, State::Warning);
        assert_eq!(kernel("").state, State::Warning);
    }

    #[test]
    fn limits() {
        assert_eq!(files(None).state, State::Good);
        assert_eq!(files(Some(4096)).state, State::Warning);
        assert_eq!(files(Some(64)).state, State::Missing);
        assert_eq!(address_space(Some(1 << 32)).state, State::Missing);
        assert_eq!(maps(Some(1000)).state, State::Warning);
    }

    #[test]
    fn kvm_is_one_of_three() {
        let absent = Support::Absent("opening /dev/kvm: no such file".to_owned());
        for support in [Support::Hardware, Support::Emulated, absent] {
            assert!(kvm(&support).found.starts_with(support.word()));
        }
    }

    #[test]
    fn a_directory_that_cannot_be_made_is_missing() {
        assert_eq!(
            data_dir(Some(Path::new("/proc/nope"))).state,
            State::Missing
        );
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(data_dir(Some(&dir.path().join("a/b"))).state, State::Good);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn swap_is_the_second_line() {
        assert_eq!(swap("Filename Type").state, State::Good);
        assert_eq!(
            swap("Filename Type\n/dev/sda2 partition").state,
            State::Warning
        );
    }
}
