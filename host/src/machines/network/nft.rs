//! The program that puts rules into the kernel, and whether it and the kernel can.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// Where distributions put it; a service's `PATH` often leaves these out.
const PLACES: [&str; 4] = [
    "/usr/sbin/nft",
    "/sbin/nft",
    "/usr/bin/nft",
    "/usr/local/sbin/nft",
];
/// Of what it says, in an error.
const SAID_MAX_CHARS: usize = 300;

/// nft(8).
#[derive(Debug, Clone)]
pub(super) struct Nft(PathBuf);

/// Why rules are not in the kernel.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NftError {
    /// It does not run.
    #[error("running nft: {0}")]
    Run(#[from] io::Error),
    /// It says no.
    #[error("nft: {0}")]
    Refused(String),
}

impl Nft {
    pub(super) fn find() -> Option<Self> {
        let found = PLACES.iter().find(|place| Path::new(place).is_file());
        found.map(|place| Self(place.into()))
    }

    /// All of a script, or nothing of it.
    pub(super) fn apply(&self, script: &str) -> Result<(), NftError> {
        let mut child = Command::new(&self.0)
            .args(["-f", "-"])
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        let written = match child.stdin.take() {
            // Dropped, and so closed, after it.
            Some(mut stdin) => stdin.write_all(script.as_bytes()),
            None => Ok(()),
        };
        let output = child.wait_with_output()?;
        succeeded(&output)?;
        Ok(written?)
    }

    /// Whether the kernel has this, such as `table inet x`.
    pub(super) fn has(&self, what: &[&str]) -> Result<bool, NftError> {
        let mut command = Command::new(&self.0);
        command.arg("list").args(what).env_clear();
        let output = command.stdin(Stdio::null()).output()?;
        Ok(output.status.success())
    }
}

fn succeeded(output: &Output) -> Result<(), NftError> {
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.lines().next().unwrap_or("no reason");
    Err(NftError::Refused(
        said.chars().take(SAID_MAX_CHARS).collect(),
    ))
}
