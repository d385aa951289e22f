//! `cargo xtask fuzz`: hostile drivers by chance against a device, and bytes by chance against
//! whatever reads them, for as long as one wants.
//!
//! The targets are tests, and run briefly with all others.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::repository::{Repository, cargo};
use crate::say;

/// A target: its name, the package and kind of target it is in, the tests, how long they go on.
struct Target {
    name: &'static str,
    package: &'static str,
    kind: &'static [&'static str],
    tests: &'static str,
    length: Length,
}

/// How tests are told to go on.
#[derive(Clone, Copy)]
enum Length {
    /// They know `INSULA_FUZZ_SECONDS`.
    Seconds,
    /// They are properties: so many cases at a time, again and again.
    Cases(u32),
}

const fn device(name: &'static str, tests: &'static str) -> Target {
    Target {
        name,
        package: "insula-vmm",
        kind: &["--lib"],
        tests,
        length: Length::Seconds,
    }
}

/// What there is.
const TARGETS: [Target; 12] = [
    device("rng", "virtio::fuzz::rng"),
    device("block", "virtio::fuzz::block"),
    device("overlay", "virtio::fuzz::overlay"),
    device("net", "virtio::fuzz::net"),
    device("vsock", "virtio::fuzz::vsock"),
    device("balloon", "virtio::fuzz::balloon"),
    device("watchdog", "virtio::fuzz::watchdog::watchdog"),
    device("snapshot", "virtio::fuzz::snapshot::snapshot"),
    Target {
        name: "types",
        package: "insula-types",
        kind: &["--lib"],
        tests: "fuzz::",
        length: Length::Seconds,
    },
    Target {
        name: "heads",
        package: "insula-host",
        kind: &["--lib"],
        tests: "ingress::head_guard::tests::hyper_",
        length: Length::Cases(20_000),
    },
    Target {
        name: "link",
        package: "insula-host",
        kind: &["--lib"],
        tests: "link::",
        length: Length::Cases(20_000),
    },
    Target {
        name: "config",
        package: "insula",
        kind: &["--bin", "insula"],
        tests: "config::tests::any_file_",
        length: Length::Cases(20_000),
    },
];
const SECONDS: u64 = 60;

/// `TARGET [--seconds N] [--seed N]`; the target `all` is one after the other.
pub(crate) fn run(repository: &Repository, arguments: &[String]) -> Result<()> {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let [target, options @ ..] = words.as_slice() else {
        bail!("which target? {} or all", names().join(", "));
    };
    let (mut seconds, mut seed) = (SECONDS, None);
    for option in options.chunks(2) {
        match option {
            ["--seconds", number] => seconds = number.parse().context("--seconds")?,
            ["--seed", number] => seed = Some(number.parse::<u64>().context("--seed")?),
            other => bail!("{other:?}: --seconds N or --seed N"),
        }
    }
    let targets = match TARGETS.iter().position(|known| known.name == *target) {
        Some(at) => &TARGETS[at..=at],
        None if *target == "all" => &TARGETS[..],
        None => bail!("no target {target:?}: {} or all", names().join(", ")),
    };
    let mut failed = Vec::new();
    for target in targets {
        say(&format!("== {}, {seconds} s", target.name));
        if !fuzz(repository, target, seconds, seed)? {
            failed.push(target.name);
        }
    }
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    Ok(())
}

fn names() -> Vec<&'static str> {
    TARGETS.iter().map(|target| target.name).collect()
}

/// Says whether nothing was found.
fn fuzz(repository: &Repository, target: &Target, seconds: u64, seed: Option<u64>) -> Result<bool> {
    let end = Instant::now() + Duration::from_secs(seconds);
    loop {
        let mut command = test(repository, target);
        match target.length {
            Length::Seconds => command.env("INSULA_FUZZ_SECONDS", seconds.to_string()),
            Length::Cases(cases) => command.env("PROPTEST_CASES", cases.to_string()),
        };
        if let Some(seed) = seed {
            command.env("INSULA_FUZZ_SEED", seed.to_string());
        }
        if !command.status().context("cargo test")?.success() {
            return Ok(false);
        }
        if matches!(target.length, Length::Seconds) || Instant::now() >= end {
            return Ok(true);
        }
    }
}

fn test(repository: &Repository, target: &Target) -> Command {
    let mut command = cargo(&repository.root);
    command
        .args(["test", "--quiet", "--release", "--package", target.package])
        .args(target.kind)
        .args(["--", "--nocapture", target.tests]);
    command
}
