//! Programs: those of others that some tests need, and those that tests make. `cargo xtask test` fetches
//! the former and says where they are; without them a test says so and does nothing else.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

/// The path in `INSULA_TEST_<name>`; `None`, and a line that says why, when it is not set.
#[must_use]
pub fn tool(name: &str) -> Option<PathBuf> {
    if let Some(path) = std::env::var_os(format!("INSULA_TEST_{name}")) {
        return Some(path.into());
    }
    let reason = std::env::var(format!("INSULA_TEST_NO_{name}"));
    skipped(&reason.unwrap_or_else(|_| {
        format!("INSULA_TEST_{name} is not set; `cargo xtask test` fetches what is needed")
    }));
    None
}

/// Says that a test did nothing, and why.
pub fn skipped(why: &str) {
    // A closed stderr is no reason to fail.
    let _ = writeln!(std::io::stderr(), "skipped: {why}");
}

/// Makes a file that can be run.
///
/// # Panics
/// When the file system refuses it.
pub fn executable(path: &Path, content: impl AsRef<[u8]>) {
    fs::write(path, content).expect("a program");
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("a program");
}

/// Runs a program of others to its end.
///
/// # Panics
/// When it cannot be started.
pub fn run(command: &mut Command) -> Output {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.stdin(Stdio::null()).output();
    output.unwrap_or_else(|error| panic!("{program}: {error}"))
}

/// What a program said, for a message.
#[must_use]
pub fn said(output: &Output) -> String {
    format!(
        "{}\n--- stdout\n{}\n--- stderr\n{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}
