//! Programs of others that we measure ourselves against, and where they are.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// The same as the wasmtime that we are built on: `host/src/engine/config.rs`.
const WASMTIME_VERSION: &str = "48.0.8";
const WASMTIME_VARIABLE: &str = "INSULA_BENCH_WASMTIME";
const WASMTIME_OPTIMISED_VARIABLE: &str = "INSULA_BENCH_WASMTIME_LTO";

/// The root of this repository.
pub(crate) fn repository() -> &'static Path {
    let bench = Path::new(env!("CARGO_MANIFEST_DIR"));
    bench.parent().unwrap_or(bench)
}

/// Whether a peer that is missing may be built. It takes minutes and the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Missing {
    Refused,
    Installed,
}

/// The `wasmtime` to measure, without link-time optimisation: so `cargo install` builds it, and so
/// its project builds what it releases (its `ci/build-release-artifacts.sh`).
pub(crate) fn wasmtime(missing: Missing) -> Result<PathBuf> {
    peer(missing, "target/peers/wasmtime", WASMTIME_VARIABLE, &[])
}

/// The same, built with the link-time optimisation of our own `dist` profile.
pub(crate) fn wasmtime_optimised(missing: Missing) -> Result<PathBuf> {
    let lto = [("CARGO_PROFILE_RELEASE_LTO", "fat")];
    let folder = "target/peers/wasmtime-lto";
    peer(missing, folder, WASMTIME_OPTIMISED_VARIABLE, &lto)
}

/// The same, built with a profile as well, as `insula` is. Only `cargo xtask dist` can do that.
pub(crate) fn wasmtime_profiled() -> Result<PathBuf> {
    let program = built("target/pgo/bin/wasmtime", "cargo xtask dist wasmtime")?;
    checked_version(&program, "cargo xtask dist wasmtime builds it")?;
    Ok(program)
}

/// The program that `variable` names, or else the one below `folder`, built with `profile`.
fn peer(
    missing: Missing,
    folder: &str,
    variable: &str,
    profile: &[(&str, &str)],
) -> Result<PathBuf> {
    let program = match env::var_os(variable) {
        Some(path) => PathBuf::from(path),
        None => {
            let root = repository().join(folder);
            let program = root.join("bin/wasmtime");
            if !program.exists() && missing == Missing::Installed {
                install_wasmtime(&root, profile)?;
            }
            program
        }
    };
    checked_version(
        &program,
        &format!("--install-peers builds it, {variable} names another"),
    )?;
    Ok(program)
}

/// Only the version that we run is compared.
fn checked_version(program: &Path, how: &str) -> Result<()> {
    let output = Command::new(program)
        .arg("--version")
        .output()
        .with_context(|| format!("{}: {how}", program.display()))?;
    let said = String::from_utf8_lossy(&output.stdout);
    if !said.split_whitespace().any(|word| word == WASMTIME_VERSION) {
        let program = program.display();
        bail!("{program} is {said:?}: only {WASMTIME_VERSION} is compared, the version we run");
    }
    Ok(())
}

fn install_wasmtime(root: &Path, profile: &[(&str, &str)]) -> Result<()> {
    crate::say(&format!(
        "building wasmtime {WASMTIME_VERSION} into {}",
        root.display()
    ));
    let status = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["install", "wasmtime-cli", "--locked"])
        .args(["--version", WASMTIME_VERSION, "--root"])
        .arg(root)
        .envs(profile.iter().copied())
        .status()
        .context("starting cargo")?;
    if !status.success() {
        bail!("cargo install wasmtime-cli: {status}");
    }
    Ok(())
}

/// A file of the repository that something else builds.
pub(crate) fn built(path: &str, how: &str) -> Result<PathBuf> {
    let file = repository().join(path);
    if !file.exists() {
        bail!("{path} is missing: {how} makes it");
    }
    Ok(file)
}
