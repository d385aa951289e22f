//! `cargo xtask fuzz`: hostile drivers by chance against a device, for as long as one wants.
//!
//! The targets are tests of `insula-vmm`, and run briefly with all others.

use anyhow::{Context, Result, bail};

use crate::repository::{Repository, cargo};
use crate::say;

/// What there is.
const TARGETS: [&str; 6] = ["rng", "block", "overlay", "net", "vsock", "balloon"];
const SECONDS: u64 = 60;

/// `TARGET [--seconds N] [--seed N]`; the target `all` is one after the other.
pub(crate) fn run(repository: &Repository, arguments: &[String]) -> Result<()> {
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let [target, options @ ..] = words.as_slice() else {
        bail!("which target? {} or all", TARGETS.join(", "));
    };
    let (mut seconds, mut seed) = (SECONDS, None);
    for option in options.chunks(2) {
        match option {
            ["--seconds", number] => seconds = number.parse().context("--seconds")?,
            ["--seed", number] => seed = Some(number.parse::<u64>().context("--seed")?),
            other => bail!("{other:?}: --seconds N or --seed N"),
        }
    }
    let targets = match TARGETS.iter().position(|known| known == target) {
        Some(at) => &TARGETS[at..=at],
        None if *target == "all" => &TARGETS[..],
        None => bail!("no target {target:?}: {} or all", TARGETS.join(", ")),
    };
    let mut failed = Vec::new();
    for target in targets {
        say(&format!("== {target}, {seconds} s"));
        let mut command = cargo(&repository.root);
        command
            .args(["test", "--quiet", "--release", "--package", "insula-vmm"])
            .args(["--lib", "--", "--exact", "--nocapture"])
            .arg(format!("virtio::fuzz::{target}"))
            .env("INSULA_FUZZ_SECONDS", seconds.to_string());
        if let Some(seed) = seed {
            command.env("INSULA_FUZZ_SEED", seed.to_string());
        }
        if !command.status().context("cargo test")?.success() {
            failed.push(*target);
        }
    }
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    Ok(())
}
