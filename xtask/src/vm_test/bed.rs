//! Making the bed: the programs, and the images that they lie in.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::cpio::Archive;
use super::debian::Debian;
use super::{host, vmlinux};
use crate::repository::{Repository, cargo};
use crate::say;
use crate::tools::run;

/// What makes `/dev/kvm` and `/dev/net/tun`, in the order in which they are loaded.
pub(super) const HOST_MODULES: [&str; 4] = [
    "virt/lib/irqbypass",
    "arch/x86/kvm/kvm",
    "arch/x86/kvm/kvm-amd",
    "drivers/net/tun",
];

/// What rules for packets are made of, and a wire to a namespace, in the order in which they are
/// loaded.
pub(super) const ROUTER_MODULES: [&str; 18] = [
    "lib/libcrc32c",
    "net/netfilter/nfnetlink",
    "net/ipv4/netfilter/nf_defrag_ipv4",
    "net/ipv6/netfilter/nf_defrag_ipv6",
    "net/netfilter/nf_conntrack",
    "net/netfilter/nf_conncount",
    "net/netfilter/nf_nat",
    "net/netfilter/nf_tables",
    "net/netfilter/nft_ct",
    "net/netfilter/nft_connlimit",
    "net/netfilter/nft_nat",
    "net/netfilter/nft_chain_nat",
    "net/netfilter/nft_masq",
    "net/netfilter/nft_fib",
    "net/ipv4/netfilter/nft_fib_ipv4",
    "net/ipv6/netfilter/nft_fib_ipv6",
    "net/netfilter/nft_fib_inet",
    "drivers/net/veth",
];

/// What the inner guest needs to find its devices, in the order in which they are loaded: the bus
/// uses symbols of the ring.
const GUEST_MODULES: [&str; 12] = [
    "drivers/virtio/virtio_ring",
    "drivers/virtio/virtio",
    "drivers/virtio/virtio_mmio",
    "drivers/block/virtio_blk",
    "drivers/char/hw_random/virtio-rng",
    "net/core/failover",
    "drivers/net/net_failover",
    "drivers/net/virtio_net",
    "net/vmw_vsock/vsock",
    "net/vmw_vsock/vmw_vsock_virtio_transport_common",
    "net/vmw_vsock/vmw_vsock_virtio_transport",
    "drivers/virtio/virtio_balloon",
];

/// What its tests load themselves, from the root disk.
const ROOT_MODULES: [&str; 4] = [
    "drivers/input/evdev",
    "drivers/acpi/button",
    "drivers/watchdog/watchdog",
    "drivers/watchdog/wdat_wdt",
];

/// Of the bed: goes over to a root that can be left again, as a jail does; brings up
/// KVM, runs the tests, goes off.
const HOST_INIT: &str = r#"#!/bin/busybox sh
B=/bin/busybox
if [ "$1" != again ]; then
    $B mkdir /new
    $B mount -t tmpfs new /new
    $B cp -a /init /bin /bed /modules /lib* /usr /new
    $B mkdir /new/proc /new/sys /new/dev /new/tmp
    exec $B switch_root /new /init again
fi
$B mount -t proc proc /proc
$B mount -t sysfs sysfs /sys
$B mount -t devtmpfs dev /dev
$B mount -t tmpfs tmp /tmp
for module in MODULES; do $B insmod /modules/$module.ko || echo "bed: FAILED loading $module"; done
only=$($B sed -n 's/.* only=\([a-z]*\).*/\1/p' /proc/cmdline)
part=$($B sed -n 's/.* part=\([a-z]*\).*/\1/p' /proc/cmdline)
if [ -n "$only" ] || [ "$part" = hosts ]; then
    true
elif /bed/micro --test-threads=1 > /tmp/micro 2>&1; then
    echo "bed: ok micro-guests under nested KVM: $($B grep '^test result' /tmp/micro)"
else
    $B cat /tmp/micro
    echo "bed: FAILED micro-guests under nested KVM"
fi
if [ -n "$only" ] || [ "$part" = hosts ]; then
    true
elif /bed/monitor --test-threads=1 > /tmp/monitor 2>&1; then
    echo "bed: ok monitor processes under nested KVM: $($B grep '^test result' /tmp/monitor)"
else
    $B cat /tmp/monitor
    echo "bed: FAILED monitor processes under nested KVM"
fi
for case in CASES; do
    [ "$part" != guests ] || break
    [ -z "$only" ] || [ "$only" = $case ] || continue
    if [ ! -e /bin/sh ]; then
        $B --install -s /bin
        ifconfig lo 127.0.0.1
        mount -t cgroup2 groups /sys/fs/cgroup
        for module in ROUTER; do insmod /modules/$module.ko || echo "bed: FAILED loading $module"; done
    fi
    /bed/$case
    mine=$case
done
if [ "$part" != hosts ] && { [ -z "$only" ] || [ "$only" != "$mine" ]; }; then /bed/bed $only; fi
# System calls for which a monitor was ended.
$B dmesg | $B grep type=1326
echo "bed: end"
$B poweroff -f
"#;

/// Of the inner guest, from its initramfs: loads modules, goes over to the root disk.
const GUEST_INIT: &str = r#"#!/bin/busybox sh
B=/bin/busybox
$B mount -t proc proc /proc
$B mount -t sysfs sysfs /sys
$B mount -t devtmpfs dev /dev
for module in MODULES; do $B insmod /modules/$module.ko; done
i=0
while [ ! -b /dev/vda ] && [ $i -lt 300 ]; do $B sleep 0.1; i=$((i + 1)); done
$B mount -t ext4 /dev/vda /root || echo "no root disk"
$B umount /proc /sys
$B mount -o move /dev /root/dev
exec $B switch_root /root /init
"#;

/// Of the inner guest, from its root disk: does what the console says.
const ROOT_INIT: &str = r#"#!/bin/busybox sh
export PATH=/bin
/bin/busybox mkdir -p /proc /sys /tmp
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox --install -s /bin
stty -echo
echo @ready
while read -r line; do eval "$line"; echo "@done $?"; done
"#;

/// Size of the inner guest's root disk.
const ROOT_BYTES: u64 = 48 << 20;

/// Builds all; returns the image to boot.
pub(super) fn build(repository: &Repository, dir: &Path, debian: &Debian) -> Result<PathBuf> {
    let programs = programs(repository, dir)?;
    let root = root_disk(dir, debian, &programs.bed)?;

    let mut inner = Archive::new()?;
    inner.file("init", with_modules(GUEST_INIT, &GUEST_MODULES).as_bytes())?;
    inner.copy("bin/busybox", &debian.busybox)?;
    modules(&mut inner, debian, &GUEST_MODULES)?;

    let mut bed = Archive::new()?;
    let init = HOST_INIT.replace("ROUTER", &names(&ROUTER_MODULES));
    let init = init.replace("CASES", &host::CASES.map(|(name, _)| name).join(" "));
    bed.file("init", with_modules(&init, &HOST_MODULES).as_bytes())?;
    bed.copy("bin/busybox", &debian.busybox)?;
    modules(&mut bed, debian, &HOST_MODULES)?;
    modules(&mut bed, debian, &ROUTER_MODULES)?;
    bed.copy("bed/bed", &programs.bed)?;
    bed.copy("bed/micro", &programs.micro)?;
    bed.copy("bed/monitor", &programs.monitor)?;
    bed.copy("bed/vmlinuz", &debian.kernel)?;
    let kernel = fs::read(&debian.kernel).context("reading the kernel")?;
    bed.file("bed/vmlinux", &vmlinux::extract(&kernel)?)?;
    bed.file("bed/inner.cpio", &inner.finish()?)?;
    bed.copy("bed/root.ext4", &root)?;
    host::add(&mut bed, repository, debian)?;
    let image = dir.join("bed.cpio");
    fs::write(&image, bed.finish()?).with_context(|| image.display().to_string())?;
    Ok(image)
}

fn name(module: &str) -> &str {
    module.rsplit('/').next().unwrap_or(module)
}

fn names(modules: &[&str]) -> String {
    let names: Vec<&str> = modules.iter().map(|module| name(module)).collect();
    names.join(" ")
}

pub(super) fn with_modules(script: &str, modules: &[&str]) -> String {
    script.replace("MODULES", &names(modules))
}

pub(super) fn modules(archive: &mut Archive, debian: &Debian, modules: &[&str]) -> Result<()> {
    for module in modules {
        let name = format!("modules/{}.ko", name(module));
        archive.copy(&name, &debian.module(module))?;
    }
    Ok(())
}

pub(super) struct Programs {
    pub(super) bed: PathBuf,
    micro: PathBuf,
    monitor: PathBuf,
}

/// Links the tests statically, for a system that has no libraries.
pub(super) fn programs(repository: &Repository, dir: &Path) -> Result<Programs> {
    say("   building the machine tests, linked statically");
    let output = cargo(&repository.root)
        .args(["build", "--release", "--package", "insula-vmm"])
        .args(["--example", "bed", "--test", "micro", "--test", "monitor"])
        // Named, so that build scripts and procedural macros are not linked statically as well.
        .args(["--target", "x86_64-unknown-linux-gnu"])
        .arg("--target-dir")
        .arg(dir.join("build"))
        .arg("--message-format=json-render-diagnostics")
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .stderr(Stdio::inherit())
        .output()
        .context("cargo build")?;
    if !output.status.success() {
        bail!("the machine tests do not build");
    }
    let messages = String::from_utf8_lossy(&output.stdout).into_owned();
    let find = |name: &str| {
        let mut artefacts = messages
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .filter(|message| message["target"]["name"] == name);
        let executable =
            artefacts.find_map(|message| message["executable"].as_str().map(PathBuf::from));
        executable.with_context(|| format!("cargo built no {name}"))
    };
    Ok(Programs {
        bed: find("bed")?,
        micro: find("micro")?,
        monitor: find("monitor")?,
    })
}

/// A real ext4 file system with busybox and an init.
fn root_disk(dir: &Path, debian: &Debian, bed: &Path) -> Result<PathBuf> {
    let content = dir.join("root");
    let _ = fs::remove_dir_all(&content);
    let bin = content.join("bin");
    let modules = content.join("modules");
    for directory in [&bin, &modules, &content.join("dev")] {
        fs::create_dir_all(directory).with_context(|| directory.display().to_string())?;
    }
    fs::copy(&debian.busybox, bin.join("busybox")).context("copying busybox")?;
    fs::copy(bed, bin.join("bed")).context("copying the bed's program")?;
    for module in ROOT_MODULES {
        let to = modules.join(format!("{}.ko", name(module)));
        fs::copy(debian.module(module), &to).with_context(|| to.display().to_string())?;
    }
    let init = content.join("init");
    fs::write(&init, ROOT_INIT).with_context(|| init.display().to_string())?;
    executable(&init)?;
    executable(&bin.join("busybox"))?;
    let image = dir.join("root.ext4");
    ext4(debian, &image, ROOT_BYTES, Some(&content))?;
    Ok(image)
}

/// Makes an ext4 file system, empty or with what a directory holds.
pub(super) fn ext4(
    debian: &Debian,
    image: &Path,
    bytes: u64,
    content: Option<&Path>,
) -> Result<()> {
    let file = fs::File::create(image).with_context(|| image.display().to_string())?;
    file.set_len(bytes)?;
    let mut mkfs = Command::new(&debian.mkfs);
    mkfs.args(["-q", "-F"]);
    if let Some(content) = content {
        mkfs.arg("-d").arg(content);
    }
    run(mkfs.arg(image)).map_err(|why| anyhow::anyhow!("mkfs.ext4: {why}"))
}

fn executable(path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
        .with_context(|| path.display().to_string())
}
