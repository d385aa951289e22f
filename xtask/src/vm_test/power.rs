//! `cargo xtask vm-test power`: a host in an emulated machine whose power is cut. What the machine is
//! made of is made here; what happens to it is an end-to-end test (`tests/tests/e2e/power`).

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};

use super::bed::{ROUTER_MODULES, ext4, modules, with_modules};
use super::cpio::Archive;
use super::debian::{self, Debian};
use super::host;
use crate::repository::{Repository, cargo};

const INIT: &str = include_str!("power.sh");

/// Disk and network of the machine, in the order in which they are loaded.
const MODULES: [&str; 9] = [
    "drivers/virtio/virtio_ring",
    "drivers/virtio/virtio",
    "drivers/virtio/virtio_pci_legacy_dev",
    "drivers/virtio/virtio_pci_modern_dev",
    "drivers/virtio/virtio_pci",
    "drivers/block/virtio_blk",
    "net/core/failover",
    "drivers/net/net_failover",
    "drivers/net/virtio_net",
];

/// Size of the disk.
const DISK_BYTES: u64 = 256 << 20;

/// Makes the machine, and runs the test.
pub(super) fn run(repository: &Repository, dir: &Path) -> Result<ExitCode> {
    let debian = debian::ensure(dir)?;
    let program = host::program(repository)?;
    image(dir, &debian, &program)?;
    ext4(&debian, &dir.join("power.ext4"), DISK_BYTES, None)?;
    fs::copy(&debian.kernel, dir.join("vmlinuz")).context("copying the kernel")?;
    let status = cargo(&repository.root)
        .args(["test", "--release", "--package", "insula-tests"])
        .args(["--test", "e2e", "--", "--nocapture", "power::"])
        .env("INSULA_TEST_POWER", dir)
        .status()
        .context("cargo test")?;
    Ok(if status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn image(dir: &Path, debian: &Debian, program: &Path) -> Result<()> {
    let all: Vec<&str> = MODULES.into_iter().chain(ROUTER_MODULES).collect();
    let mut archive = Archive::new()?;
    archive.file("init", with_modules(INIT, &all).as_bytes())?;
    archive.copy("bin/busybox", &debian.busybox)?;
    archive.copy("bed/insula", program)?;
    modules(&mut archive, debian, &all)?;
    host::with_libraries(&mut archive, &[program], &[&debian.nft])?;
    let image = dir.join("power.cpio");
    fs::write(&image, archive.finish()?).with_context(|| image.display().to_string())
}
