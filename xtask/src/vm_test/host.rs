//! The host itself in the bed: its program and those that it or its scripts run, with the libraries
//! that they are linked to, and the scripts.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::cpio::Archive;
use super::debian::Debian;
use crate::guests;
use crate::repository::{Repository, cargo};

/// What the scripts share.
const LIBRARY: &str = include_str!("lib.sh");
/// Cases that use a host, by the word that selects them, in the order in which they run.
pub(super) const CASES: [(&str, &str); 3] = [
    ("host", include_str!("host.sh")),
    ("wire", include_str!("wire.sh")),
    ("envelope", include_str!("envelope.sh")),
];

/// Builds it, and puts it in.
pub(super) fn add(archive: &mut Archive, repository: &Repository, debian: &Debian) -> Result<()> {
    let program = program(repository)?;
    archive.copy("bed/insula", &program)?;
    archive.copy("bed/spin.wasm", &guest(repository, "spin")?)?;
    archive.file("bed/lib", LIBRARY.as_bytes())?;
    for (name, script) in CASES {
        // Not every busybox has the real thing's words for links.
        let script = script.replace("$IP", &debian.ip.display().to_string());
        archive.file(&format!("bed/{name}"), script.as_bytes())?;
    }
    with_libraries(archive, &[&program], &[&debian.nft, &debian.ip])
}

/// Builds the program; says where it is.
pub(super) fn program(repository: &Repository) -> Result<PathBuf> {
    let mut build = cargo(&repository.root);
    build.args(["build", "--release", "--package", "insula"]);
    if !build.status().context("cargo build")?.success() {
        bail!("the host does not build");
    }
    Ok(repository.target.join("release/insula"))
}

/// Puts in what `inside`, which are there, and programs of the system are linked to, and those.
pub(super) fn with_libraries(
    archive: &mut Archive,
    inside: &[&Path],
    system: &[&PathBuf],
) -> Result<()> {
    let mut all = BTreeSet::new();
    for program in inside
        .iter()
        .copied()
        .chain(system.iter().map(|path| path.as_path()))
    {
        all.extend(libraries(program)?);
    }
    all.extend(system.iter().map(|program| program.display().to_string()));
    for path in all {
        // Where its loader, or the host, looks for it.
        archive.copy_at(&path)?;
    }
    Ok(())
}

/// A sample, built with the others if it is not there.
fn guest(repository: &Repository, name: &str) -> Result<PathBuf> {
    let path = repository.target.join(format!("guests/{name}.wasm"));
    if !path.is_file() {
        guests::build(repository)?;
    }
    Ok(path)
}

/// What it is linked to, as this system finds it; nothing where it is linked statically.
fn libraries(program: &Path) -> Result<Vec<String>> {
    let output = Command::new("ldd").arg(program).output().context("ldd")?;
    Ok(parse(&String::from_utf8_lossy(&output.stdout)))
}

/// Lines such as `libm.so.6 => /lib/libm.so.6 (0x7f0)`, or `/lib64/ld.so (0x7f0)` (ldd(1)).
fn parse(text: &str) -> Vec<String> {
    let paths = text.lines().filter_map(|line| {
        let path = line.split_once("=>").map_or(line, |(_, path)| path);
        let path = path.split_whitespace().next()?;
        path.starts_with('/').then(|| path.to_owned())
    });
    paths.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_and_loader_are_found() {
        let text = "\tlinux-vdso.so.1 (0x00007f)\n\tlibm.so.6 => /lib/x/libm.so.6 (0x00)\n\
            \t/lib64/ld-linux-x86-64.so.2 (0x00)\n";
        assert_eq!(
            parse(text),
            ["/lib/x/libm.so.6", "/lib64/ld-linux-x86-64.so.2"]
        );
        assert!(parse("\tstatically linked\n").is_empty());
    }
}
