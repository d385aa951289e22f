//! Tests that measure CPU time or latency run beside nothing else.
//!
//! Under nextest `.config/nextest.toml` sees to it: tests of the module `measured` get all threads.
//! A lock does the same for plain `cargo test`, and for two runs on one machine: every host holds
//! it shared, the host of a measured test holds it alone.

use std::fs::File;

/// Held for as long as a host runs.
#[derive(Debug)]
pub struct Place {
    _lock: File,
}

fn file() -> File {
    let path = std::env::temp_dir().join("insula-tests.lock");
    File::create(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A place beside others.
///
/// # Panics
/// When the lock cannot be had.
#[must_use]
pub fn shared() -> Place {
    let lock = file();
    lock.lock_shared().expect("a shared lock");
    Place { _lock: lock }
}

/// The only place there is. Must be taken before any host is started.
///
/// # Panics
/// When the lock cannot be had.
#[must_use]
pub fn alone() -> Place {
    let lock = file();
    lock.lock().expect("a lock of our own");
    Place { _lock: lock }
}
