//! Where things are.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// The checkout that we work on.
#[derive(Debug)]
pub(crate) struct Repository {
    /// Its folder.
    pub(crate) root: PathBuf,
    /// Where everything that is built goes.
    pub(crate) target: PathBuf,
    /// What Cargo says of the workspace's own packages.
    pub(crate) packages: Vec<Value>,
}

impl Repository {
    pub(crate) fn find() -> Result<Self> {
        // Set by `cargo run`; the other is for whoever starts the program by hand.
        let manifest = std::env::var_os("CARGO_MANIFEST_DIR")
            .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
        let root = manifest.parent().context("xtask lies in a folder")?;
        let metadata = metadata(root, &["--no-deps"])?;
        let target = metadata["target_directory"].as_str();
        Ok(Self {
            root: root.to_owned(),
            target: target.context("cargo metadata names no target")?.into(),
            packages: metadata["packages"].as_array().cloned().unwrap_or_default(),
        })
    }

    pub(crate) fn samples(&self) -> PathBuf {
        self.root.join("samples")
    }

    /// Where the built samples are collected.
    pub(crate) fn guests(&self) -> PathBuf {
        self.target.join("guests")
    }
}

/// What `cargo metadata` says.
pub(crate) fn metadata(root: &Path, flags: &[&str]) -> Result<Value> {
    let output = cargo(root)
        .args(["metadata", "--format-version=1"])
        .args(flags)
        .output()
        .context("cargo metadata")?;
    if !output.status.success() {
        bail!(
            "cargo metadata: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// The Cargo that runs us, in `dir`, as if it was called by hand.
pub(crate) fn cargo(dir: &Path) -> Command {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(program);
    command.current_dir(dir);
    // What Cargo tells us about ourselves. Build scripts of dependencies ask for it, and are run
    // again where it is not as it was: half a build, each time after one by hand.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(name);
        }
    }
    command
}
