//! A disk that fails when it is told to: a library of a few lines of C, preloaded into the host,
//! which refuses system calls on files of its data directory.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use tempfile::TempDir;

use crate::host::{Plan, TestHost};

const SOURCE: &str = include_str!("fault.c");

/// A fault of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// `fsync` fails with EIO.
    Fsync,
    /// Writes fail with ENOSPC.
    Full,
}

impl Fault {
    const fn file(self) -> &'static str {
        match self {
            Self::Fsync => "fsync",
            Self::Full => "full",
        }
    }
}

/// Faults that can be turned on and off in a host.
#[derive(Debug)]
pub struct Faults {
    dir: TempDir,
}

impl Faults {
    /// Compiles the library.
    ///
    /// # Panics
    /// When there is no C compiler, which building the host needs, too.
    #[must_use]
    pub fn new() -> Self {
        let dir = TempDir::with_prefix("insula-fault-").expect("a temporary directory");
        let source = dir.path().join("fault.c");
        fs::write(&source, SOURCE).expect("a file");
        let mut cc = Command::new("cc");
        cc.args(["-O1", "-shared", "-fPIC", "-o"]);
        cc.arg(dir.path().join("fault.so")).arg(&source).arg("-ldl");
        let made = cc.output().expect("a C compiler");
        assert!(
            made.status.success(),
            "{}",
            String::from_utf8_lossy(&made.stderr)
        );
        Self { dir }
    }

    /// Starts a host whose disk can fail.
    #[must_use]
    pub fn start(&self, plan: Plan) -> TestHost {
        // Below the temporary directory whose name all test hosts begin with.
        let hosts: PathBuf = std::env::temp_dir().join("insula-test-");
        plan.env("LD_PRELOAD", self.dir.path().join("fault.so"))
            .env("FAULT_SWITCH", self.dir.path())
            .env("FAULT_DIR", hosts)
            .start()
    }

    /// From now on the disk fails.
    ///
    /// # Panics
    /// When the switch cannot be written.
    pub fn begin(&self, fault: Fault) {
        fs::write(self.dir.path().join(fault.file()), "").expect("a file");
    }

    /// From now on it does not.
    ///
    /// # Panics
    /// When the switch cannot be removed.
    pub fn end(&self, fault: Fault) {
        fs::remove_file(self.dir.path().join(fault.file())).expect("a file");
    }
}

impl Default for Faults {
    fn default() -> Self {
        Self::new()
    }
}
