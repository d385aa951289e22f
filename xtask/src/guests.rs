//! The samples, built for Wasm and collected where tests look for them.

use std::collections::BTreeSet;
use std::fs;
use std::io;

use anyhow::{Context, Result};
use insula_toolchain::{BuildOptions, LineProgress, Settings, Source, TARGET, Toolchain};

use crate::checks::{Ended, passes};
use crate::repository::{Repository, cargo};
use crate::say;

fn toolchain(repository: &Repository) -> Result<Toolchain> {
    let settings = Settings::from_env(&repository.samples());
    let mut progress = LineProgress::new(io::stderr());
    Ok(Toolchain::find_with(&settings, &mut progress)?)
}

/// Builds all samples and copies each to `target/guests/<package>.wasm`.
pub(crate) fn build(repository: &Repository) -> Result<()> {
    let toolchain = toolchain(repository)?;
    let options = BuildOptions::default();
    let mut progress = LineProgress::new(io::stderr());
    let artefacts = toolchain.build_workspace(&repository.samples(), &options, &mut progress)?;
    let to = repository.guests();
    fs::create_dir_all(&to).with_context(|| to.display().to_string())?;
    let mut made = BTreeSet::new();
    for artefact in &artefacts {
        let name = format!("{}.wasm", artefact.package);
        // A test that runs meanwhile sees the old file or the new one.
        let new = to.join(format!(".{name}.{}", std::process::id()));
        fs::copy(&artefact.path, &new).with_context(|| artefact.path.display().to_string())?;
        fs::rename(&new, to.join(&name))?;
        made.insert(name);
    }
    // What is no sample any more must not be tested any more.
    for entry in fs::read_dir(&to)? {
        let entry = entry?;
        if !made.contains(entry.file_name().to_string_lossy().as_ref()) {
            fs::remove_file(entry.path())?;
        }
    }
    say(&format!("   {} guests in {}", made.len(), to.display()));
    Ok(())
}

/// clippy over what only exists on the guests' target.
pub(crate) fn clippy(repository: &Repository) -> Result<Ended> {
    let toolchain = toolchain(repository)?;
    if let Source::Unpacked(_) = toolchain.source() {
        let why = format!("the toolchain for {TARGET} on this machine has no clippy of its own");
        return Ok(Ended::Skipped(why));
    }
    let mut command = cargo(&repository.samples());
    command.args(["clippy", "--workspace", "--quiet", "--target", TARGET]);
    passes(command.args(["--", "-D", "warnings"]))
}
