//! Finds or prepares a way to build guests for `wasm32-wasip2`, and builds
//! them. `insula build`, `insula up`, `insula doctor` and `cargo xtask` all
//! come through here, so that there is one answer to "can this machine build
//! a guest, and how".
//!
//! The ways, in the order in which they are tried:
//!
//! ```text
//! 1 own       the active toolchain has the target's std        nothing to do
//! 2 cached    way 4 was taken before on this machine           nothing to do
//! 3 rustup    rustup target add wasm32-wasip2                  seconds, needs the network
//! 4 debian    unpack six Debian packages, build std once       a minute, needs the network
//! - otherwise an error that says what was tried and what to install
//! ```
//!
//! Way 4 installs nothing system-wide and needs no root. What it makes lives in
//! the user's cache folder ([`Settings::cache_dir`]), is built under a lock in a
//! folder with another name and appears by one rename, so that an interrupted or
//! a concurrent run leaves either nothing or the whole.
//!
//! *Invariant:* this crate knows nothing of the host. It must never depend on
//! wasmtime, tokio or another Insula crate.

#![forbid(unsafe_code)]

mod build;
mod cache;
mod debian;
mod error;
mod find;
mod messages;
mod probe;
mod process;
mod progress;
mod settings;

pub use build::{Artefact, BuildOptions, Profile};
pub use error::{Attempt, BuildError, ToolchainError};
pub use find::{Source, Toolchain};
pub use probe::{Probe, Readiness};
pub use progress::{LineProgress, Progress, Silent};
pub use settings::Settings;

/// The only target that guests are built for.
pub const TARGET: &str = "wasm32-wasip2";
