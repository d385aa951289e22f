//! What can go wrong, one enum per operation.

use std::fmt;
use std::io;
use std::path::PathBuf;

/// A way that was tried, and why it did not lead anywhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attempt {
    /// The way, in a few words: `rustup target add wasm32-wasip2`.
    pub way: String,
    /// Why not.
    pub reason: String,
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.way, self.reason)
    }
}

/// No toolchain.
#[derive(Debug, thiserror::Error)]
pub enum ToolchainError {
    /// There is no Rust at all.
    #[error(
        "no working Rust toolchain: {program} could not be run ({reason}). \
         Install Rust with rustup (https://rustup.rs), then try again"
    )]
    NoRust {
        /// The program that was tried.
        program: String,
        /// What the system or the program said.
        reason: String,
    },
    /// There is a Rust, but none of the ways to the target was open.
    #[error("no way to build for wasm32-wasip2 on this machine:{}\n{}", list(.attempts), .advice)]
    NoWay {
        /// What was tried, in order.
        attempts: Vec<Attempt>,
        /// What to install.
        advice: String,
    },
}

/// Not built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The folder holds no package.
    #[error("{} has no Cargo.toml", .0.display())]
    NoManifest(PathBuf),
    /// Cargo could not be started.
    #[error("cargo could not be run")]
    Start(#[source] io::Error),
    /// Cargo ran and failed. Its words are also in the progress output.
    #[error("cargo build failed ({status})\n{stderr}")]
    Cargo {
        /// How it ended: `exit status: 101`.
        status: String,
        /// All it wrote to stderr, compiler messages included.
        stderr: String,
    },
    /// Cargo was content, but there is no component among what it made.
    #[error(
        "{} built, but made no WebAssembly component: its Cargo.toml needs \
         [lib] crate-type = [\"cdylib\"] (or a binary)", .0.display()
    )]
    NoComponent(PathBuf),
    /// More than one.
    #[error("{} makes {} components ({}): name one package", .project.display(), .names.len(), .names.join(", "))]
    Ambiguous {
        /// The project's folder.
        project: PathBuf,
        /// The names of the targets.
        names: Vec<String>,
    },
    /// The file is WebAssembly, but no component, or not even that.
    #[error("{} is not a WebAssembly component: {reason}", .path.display())]
    NotAComponent {
        /// The file.
        path: PathBuf,
        /// What it is instead.
        reason: String,
    },
}

fn list(attempts: &[Attempt]) -> String {
    attempts
        .iter()
        .map(|attempt| format!("\n  - {attempt}"))
        .collect()
}
