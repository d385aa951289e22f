//! The host itself in the bed: its program with the libraries that it is linked to, and the script
//! that uses it.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::cpio::Archive;
use crate::repository::{Repository, cargo};

const SCRIPT: &str = include_str!("host.sh");

/// Builds it, and puts it in.
pub(super) fn add(archive: &mut Archive, repository: &Repository) -> Result<()> {
    let mut build = cargo(&repository.root);
    build.args(["build", "--release", "--package", "insula"]);
    if !build.status().context("cargo build")?.success() {
        bail!("the host does not build");
    }
    let program = repository.target.join("release/insula");
    archive.copy("bed/insula", &program)?;
    archive.file("bed/host", SCRIPT.as_bytes())?;
    for library in libraries(&program)? {
        // Where its loader looks for it.
        archive.copy_at(&library)?;
    }
    Ok(())
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
