//! `cargo xtask vm-bench`: the monitor beside QEMU's microvm machine, in the bed.
//!
//! The inner QEMU is this machine's own, with its libraries and firmware, so that both run in the
//! same bed on the same emulated processor. What is measured, and how, is in the bed's program.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::bed::{HOST_MODULES, modules, programs, with_modules};
use super::cpio::Archive;
use super::debian::Debian;
use super::{Report, vmlinux};
use crate::repository::{Repository, cargo};
use crate::say;
use crate::tools::{in_path, is_root};

/// Of the bed: a root that can be left again, as a jail does; KVM and the kernel's trace, then the comparison.
const HOST_INIT: &str = r#"#!/bin/busybox sh
B=/bin/busybox
if [ "$1" != again ]; then
    $B mkdir /new
    $B mount -t tmpfs new /new
    $B cp -a /init /bin /bed /modules /new
    $B mkdir /new/proc /new/sys /new/dev /new/tmp
    exec $B switch_root /new /init again
fi
$B mount -t proc proc /proc
$B mount -t sysfs sysfs /sys
$B mount -t tracefs tracefs /sys/kernel/tracing
$B mount -t devtmpfs dev /dev
$B mount -t tmpfs tmp /tmp
for module in MODULES; do $B insmod /modules/$module.ko || echo "bed: FAILED loading $module"; done
/bed/bed compare $($B sed -n 's/.* rounds=\([0-9]*\).*/\1/p' /proc/cmdline)
echo "bed: end"
$B poweroff -f
"#;

/// Of both guests: says that it is there, and stays.
const GUEST_INIT: &str = "#!/bin/busybox sh\necho @init\nexec /bin/busybox sleep 1000\n";

/// Runs QEMU with its own loader and libraries.
const RUN: &str = "#!/bin/busybox sh
exec /bed/qemu/loader --library-path /bed/qemu/libraries /bed/qemu/qemu-system-x86_64 \"$@\"
";

/// Builds the image; returns it, and the bed's program.
pub(super) fn build(
    repository: &Repository,
    dir: &Path,
    debian: &Debian,
) -> Result<(PathBuf, PathBuf)> {
    let programs = programs(repository, dir)?;
    let mut guest = Archive::new()?;
    guest.file("init", GUEST_INIT.as_bytes())?;
    guest.copy("bin/busybox", &debian.busybox)?;

    let mut bed = Archive::new()?;
    bed.file("init", with_modules(HOST_INIT, &HOST_MODULES).as_bytes())?;
    bed.copy("bin/busybox", &debian.busybox)?;
    modules(&mut bed, debian, &HOST_MODULES)?;
    bed.copy("bed/bed", &programs.bed)?;
    bed.copy("bed/vmlinuz", &debian.kernel)?;
    let kernel = fs::read(&debian.kernel).context("reading the kernel")?;
    bed.file("bed/vmlinux", &vmlinux::extract(&kernel)?)?;
    bed.file("bed/bench.cpio", &guest.finish()?)?;
    qemu(&mut bed)?;
    let image = dir.join("bench.cpio");
    fs::write(&image, bed.finish()?).with_context(|| image.display().to_string())?;
    Ok((image, programs.bed))
}

/// What can be measured on this machine itself.
pub(super) fn native(program: &Path, rounds: u8, report: &mut Report) -> Result<()> {
    if !Path::new("/dev/kvm").exists() || !is_root() {
        say(
            "skipped: the monitor on this machine itself: it needs /dev/kvm, and root for the jail",
        );
        return Ok(());
    }
    // Each takes some milliseconds.
    let rounds = u32::from(rounds) * 5;
    let output = Command::new(program)
        .args(["native", &rounds.to_string()])
        .output()
        .context("the bed's program")?;
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        report.line(line);
    }
    Ok(())
}

/// Puts the rows into `docs/benchmarks.md`.
pub(super) fn publish(repository: &Repository, rounds: u8, rows: &[String]) -> Result<()> {
    let version = Command::new("qemu-system-x86_64").arg("--version").output();
    let version = String::from_utf8_lossy(&version.context("QEMU")?.stdout).into_owned();
    // "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)"
    let number = version.split_whitespace().nth(3).unwrap_or("?");
    let mut command = cargo(&repository.root);
    command.args(["run", "--release", "--quiet", "--package", "insula-bench"]);
    command.args(["--", "machines", "--rounds", &rounds.to_string()]);
    command.args(["--qemu", &format!("QEMU {number}")]);
    let mut child = command.stdin(Stdio::piped()).spawn().context("cargo run")?;
    let mut input = child.stdin.take().context("it has an input")?;
    input.write_all(rows.join("\n").as_bytes())?;
    drop(input);
    if !child.wait()?.success() {
        bail!("the rows were not published");
    }
    Ok(())
}

/// This machine's QEMU, with all that it needs to boot a kernel in a microvm.
fn qemu(bed: &mut Archive) -> Result<()> {
    let program = in_path("qemu-system-x86_64").context("qemu-system-x86_64 is not installed")?;
    for directory in ["bed/qemu", "bed/qemu/libraries", "bed/qemu/firmware"] {
        bed.directory(directory)?;
    }
    bed.copy("bed/qemu/qemu-system-x86_64", &program)?;
    bed.file("bed/qemu/run", RUN.as_bytes())?;
    let output = Command::new("ldd").arg(&program).output().context("ldd")?;
    let listed = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut loader = None;
    for line in listed.lines() {
        // "libz.so.1 => /lib/.../libz.so.1 (0x...)", and the loader without an arrow.
        let path = match line.split_once("=>") {
            Some((_, path)) => path,
            None => line,
        };
        let Some(path) = path.split_whitespace().next().map(Path::new) else {
            continue;
        };
        if !path.is_absolute() {
            continue;
        }
        let name = path.file_name().context("a library without a name")?;
        let name = name.to_string_lossy().into_owned();
        if name.starts_with("ld-linux") {
            loader = Some(path.to_owned());
        }
        bed.copy(&format!("bed/qemu/libraries/{name}"), path)?;
    }
    bed.copy(
        "bed/qemu/loader",
        &loader.context("QEMU is linked to no loader")?,
    )?;
    let firmware = [
        ("bios-microvm.bin", "/usr/share/seabios/bios-microvm.bin"),
        ("qboot.rom", "/usr/share/qemu/qboot.rom"),
        ("linuxboot_dma.bin", "/usr/share/qemu/linuxboot_dma.bin"),
        ("pvh.bin", "/usr/share/qemu/pvh.bin"),
        ("kvmvapic.bin", "/usr/share/qemu/kvmvapic.bin"),
    ];
    for (name, path) in firmware {
        let found = [path, &format!("/usr/share/qemu/{name}")].map(PathBuf::from);
        let Some(found) = found.into_iter().find(|path| path.exists()) else {
            bail!("QEMU's firmware {name} is not installed");
        };
        bed.copy(&format!("bed/qemu/firmware/{name}"), &found)?;
    }
    Ok(())
}
