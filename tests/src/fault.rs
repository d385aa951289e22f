//! A disk that fails when it is told to: a small program in C starts the host, stops its system
//! calls on files of its data directory, and lets them fail by a plan (`fault.c` says how).

use std::cell::Cell;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use rustix::io::Errno;
use tempfile::TempDir;

use crate::host::{Plan, TestHost};
use crate::tools::skipped;

const SOURCE: &str = include_str!("fault.c");

/// A kind of system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// `write` and its like, and what changes a file's size.
    Write,
    /// `fsync`, `fdatasync`.
    Sync,
    /// What changes names: rename, unlink, mkdir.
    Name,
    /// `open` and its like.
    Open,
}

impl Call {
    /// All there are.
    pub const ALL: [Self; 4] = [Self::Write, Self::Sync, Self::Name, Self::Open];

    const fn word(self) -> &'static str {
        match self {
            Self::Write => "write",
            Self::Sync => "sync",
            Self::Name => "name",
            Self::Open => "open",
        }
    }
}

/// What became of a plan.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    /// Calls of the kind.
    pub counted: u64,
    /// Those that failed.
    pub failed: u64,
    /// The last of them.
    pub last: String,
}

/// Faults that can be turned on and off in a host.
#[derive(Debug)]
pub struct Faults {
    dir: TempDir,
    serial: Cell<u64>,
}

impl Faults {
    /// Compiles the program; `None`, and a line that says why, where the kernel does not let it.
    ///
    /// # Panics
    /// When there is no C compiler, which building the host needs, too.
    #[must_use]
    pub fn new() -> Option<Self> {
        let dir = TempDir::with_prefix("insula-fault-").expect("a temporary directory");
        let source = dir.path().join("fault.c");
        fs::write(&source, SOURCE).expect("a file");
        let faults = Self {
            dir,
            serial: Cell::new(0),
        };
        let mut cc = Command::new("cc");
        cc.args(["-O1", "-o"]).arg(faults.program()).arg(&source);
        let made = cc.output().expect("a C compiler");
        assert!(
            made.status.success(),
            "{}",
            String::from_utf8_lossy(&made.stderr)
        );
        let mut probe = Command::new(faults.program());
        let probed = probe.arg("--probe").output().expect("the program");
        if !probed.status.success() {
            let words = String::from_utf8_lossy(&probed.stderr);
            skipped(&format!("system calls cannot be made to fail: {words}"));
            return None;
        }
        Some(faults)
    }

    fn program(&self) -> PathBuf {
        self.dir.path().join("fault")
    }

    /// Starts a host whose disk can fail.
    #[must_use]
    pub fn start(&self, plan: Plan) -> TestHost {
        // Below the temporary directory whose name all test hosts begin with.
        let hosts: PathBuf = std::env::temp_dir().join("insula-test-");
        plan.through(self.program())
            .env("FAULT_SWITCH", self.dir.path())
            .env("FAULT_DIR", hosts)
            .start()
    }

    fn plan(&self, call: Call, first: u64, last: u64, error: Errno) {
        self.serial.set(self.serial.get() + 1);
        let (serial, word, error) = (self.serial.get(), call.word(), error.raw_os_error());
        let plan = format!("{serial} {word} {first} {last} {error}\n");
        let new = self.dir.path().join("plan.new");
        fs::write(&new, plan).expect("a file");
        fs::rename(new, self.dir.path().join("plan")).expect("a file");
    }

    /// From now on all such calls fail.
    ///
    /// # Panics
    /// When the plan cannot be written.
    pub fn begin(&self, call: Call, error: Errno) {
        self.plan(call, 1, u64::MAX, error);
    }

    /// The `nth` such call from now on fails, and no other.
    ///
    /// # Panics
    /// When the plan cannot be written.
    pub fn nth(&self, call: Call, nth: u64, error: Errno) {
        self.plan(call, nth, nth, error);
    }

    /// From now on nothing fails.
    ///
    /// # Panics
    /// When the plan cannot be removed.
    pub fn end(&self) {
        fs::remove_file(self.dir.path().join("plan")).expect("a plan");
    }

    /// What became of the newest plan.
    ///
    /// # Panics
    /// When the supervisor has written nonsense.
    #[must_use]
    pub fn seen(&self) -> Seen {
        let Ok(text) = fs::read_to_string(self.dir.path().join("status")) else {
            return Seen::default();
        };
        let mut words = text.trim_end().splitn(4, ' ');
        let mut number = || {
            let word = words.next().unwrap_or_default();
            word.parse::<u64>()
                .unwrap_or_else(|error| panic!("{text:?}: {error}"))
        };
        let (serial, counted, failed) = (number(), number(), number());
        if serial != self.serial.get() {
            return Seen::default();
        }
        let last = words.next().unwrap_or_default().to_owned();
        Seen {
            counted,
            failed,
            last,
        }
    }
}
