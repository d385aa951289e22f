//! What of Debian the bed needs: its cloud kernel, busybox, QEMU, mkfs.ext4, nft and ip.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::say;
use crate::tools::{in_path, install, is_root, run};

/// Where things are.
pub(super) struct Debian {
    pub(super) kernel: PathBuf,
    /// `lib/modules/VERSION/kernel`.
    pub(super) modules: PathBuf,
    pub(super) busybox: PathBuf,
    pub(super) mkfs: PathBuf,
    pub(super) nft: PathBuf,
    pub(super) ip: PathBuf,
}

impl Debian {
    /// A module by its path below `kernel`, without ending.
    pub(super) fn module(&self, path: &str) -> PathBuf {
        self.modules.join(format!("{path}.ko"))
    }
}

/// Fetches what is not there. Running it again changes nothing.
pub(super) fn ensure(dir: &Path) -> Result<Debian> {
    fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    let kernel = unpacked(dir, "kernel", kernel_package)?;
    let busybox = unpacked(dir, "busybox", || Ok("busybox-static".to_owned()))?;
    program("qemu-system-x86_64", "qemu-system-x86")?;
    let mkfs = program("mkfs.ext4", "e2fsprogs")?;
    let nft = program("nft", "nftables")?;
    let ip = program("ip", "iproute2")?;
    let image = first_in(&kernel.join("boot"), "vmlinuz-")?;
    let modules = first_in(&kernel.join("lib/modules"), "")?.join("kernel");
    let found = ["bin/busybox", "usr/bin/busybox"].map(|path| busybox.join(path));
    let busybox = found.into_iter().find(|path| path.is_file());
    Ok(Debian {
        kernel: image,
        modules,
        busybox: busybox.context("busybox-static holds no busybox")?,
        mkfs,
        nft,
        ip,
    })
}

/// The package that Debian's name for its newest cloud kernel stands for.
fn kernel_package() -> Result<String> {
    let output = Command::new("apt-cache")
        .args(["depends", "linux-image-cloud-amd64"])
        .output()
        .context("no apt-cache: the bed takes kernel and busybox from Debian's packages")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut names = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "));
    let name = names.find(|name| name.starts_with("linux-image-"));
    Ok(name
        .context("apt knows no linux-image-cloud-amd64; try `apt-get update`")?
        .to_owned())
}

/// A package's content, in a folder of its own.
fn unpacked(dir: &Path, name: &str, package: impl Fn() -> Result<String>) -> Result<PathBuf> {
    let there = dir.join(name);
    if there.is_dir() {
        return Ok(there);
    }
    let new = dir.join(format!("{name}.new"));
    let _ = fs::remove_dir_all(&new);
    fs::create_dir_all(&new).with_context(|| new.display().to_string())?;
    let download = || -> Result<()> {
        let package = package()?;
        say(&format!(
            "   fetching Debian's {package} into target/vm-bed"
        ));
        let mut command = Command::new("apt-get");
        run(command.args(["download", &package]).current_dir(&new)).map_err(anyhow::Error::msg)
    };
    if let Err(first) = download() {
        if !is_root() {
            return Err(first);
        }
        say("   apt-get update");
        run(Command::new("apt-get").arg("update")).map_err(anyhow::Error::msg)?;
        download()?;
    }
    let package = first_in(&new, "")?;
    run(Command::new("dpkg").arg("-x").arg(&package).arg(&new)).map_err(anyhow::Error::msg)?;
    fs::remove_file(&package).with_context(|| package.display().to_string())?;
    fs::rename(&new, &there).with_context(|| there.display().to_string())?;
    Ok(there)
}

/// A program of the system, installed if we may.
fn program(name: &str, package: &str) -> Result<PathBuf> {
    let find = || {
        in_path(name)
            .or_else(|| Some(Path::new("/usr/sbin").join(name)).filter(|path| path.is_file()))
    };
    if let Some(found) = find() {
        return Ok(found);
    }
    if !is_root() {
        bail!("{name} is not installed; as root: apt-get install {package}");
    }
    install(package).map_err(anyhow::Error::msg)?;
    find().with_context(|| format!("{package} brought no {name}"))
}

/// The first entry of a folder whose name starts so.
fn first_in(dir: &Path, prefix: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(dir).with_context(|| dir.display().to_string())?;
    let mut names: Vec<PathBuf> = entries
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .collect();
    names.sort();
    let starts = |path: &PathBuf| {
        path.file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with(prefix))
    };
    let found = names.into_iter().find(starts);
    found.with_context(|| format!("nothing like {prefix}* in {}", dir.display()))
}
