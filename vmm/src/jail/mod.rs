//! What a monitor process does to itself before the first guest instruction.
//!
//! ```text
//!  host                              monitor process
//!  ────                              ───────────────
//!  makes the directory, the cgroup,
//!  the listening socket
//!  spawn::in_pid_namespace ────────▶ starts with descriptors 0, 1, 2
//!                                    enter(spec):  1 moves into its cgroup
//!                                                  2 closes all other descriptors
//!                                                  3 leaves the host's namespaces
//!                                                  4 makes the directory its root
//!                                                  5 sets resource limits
//!                                                  6 becomes its own user, no capabilities
//!                                                  7 no new privileges, not dumpable
//!                                    Report ─▶ goes on, or exits with what is missing
//!  configure, with descriptors ────▶ opens nothing itself: all comes over the socket
//!                                    each thread installs its filter (seccomp::install)
//!                                    first guest instruction
//! ```
//!
//! The order matters: what needs a path comes before the root changes, what needs privilege before
//! it is given up. The configuration is parsed inside the jail.
//!
//! **Failure paths.** A measure that cannot be taken is noted with the call that failed, and the
//! next is tried: what is missing is the caller's decision, made on the [`Report`] with
//! [`Report::require`]. Nothing is undone; a process that does not like its report exits, and with
//! it goes everything that it made. Without root, namespaces are tried through a user namespace.
//!
//! Only [`NotAlone`] stops everything: users and namespaces belong to threads, and a thread that was
//! forgotten would stay outside.

mod panics;
mod report;
pub mod seccomp;
pub mod spawn;
mod steps;
mod sys;
pub mod syscalls;

use std::io;
use std::num::NonZeroU32;
use std::os::fd::RawFd;
use std::path::PathBuf;

use rustix::thread::{CapabilitySet, UnshareFlags};

pub use panics::say_panics_in_one_line;
pub use report::{Measure, Missing, Report, Weak};

/// A user and a group of its own, by number; never root's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// The user.
    pub user: NonZeroU32,
    /// The group.
    pub group: NonZeroU32,
}

/// The bounds that the kernel keeps (`setrlimit`), hard and soft alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Descriptors open at once.
    pub descriptors: u64,
    /// The largest file that it may write, in bytes.
    pub file_bytes: u64,
    /// Threads of its user, which is its own.
    pub threads: u64,
}

/// How one monitor is to be jailed.
#[derive(Debug, Clone)]
pub struct Spec {
    /// The directory that becomes its root. Made for this machine, empty but for the sockets that
    /// its guest may connect to.
    pub root: PathBuf,
    /// The groups to move into: one directory in v2, one per controller in v1. Made by the host.
    pub cgroups: Vec<PathBuf>,
    /// Who to become.
    pub identity: Identity,
    /// What to be bounded by.
    pub limits: Limits,
    /// The capabilities that it keeps of those that it has: none, for a monitor.
    pub capabilities: CapabilitySet,
    /// The descriptors that stay open.
    pub keep: Vec<RawFd>,
}

/// The process has other threads, or cannot tell.
#[derive(Debug, thiserror::Error)]
pub enum NotAlone {
    /// It has.
    #[error("the process has {threads} threads, and must be jailed while it has one")]
    Threads {
        /// How many.
        threads: usize,
    },
    /// `/proc/self/task` cannot be read.
    #[error("cannot count the threads of the process: {0}")]
    Unknown(#[from] io::Error),
}

/// Jails the calling process. To be called first in `main`: whatever descriptor is open and not in
/// `spec.keep` is closed, whoever owns it.
///
/// # Errors
/// [`NotAlone`]; nothing has been done then. Everything else is in the report.
pub fn enter(spec: &Spec) -> Result<Report, NotAlone> {
    take(spec, &Measure::ALL)
}

/// Takes some of the measures, for a process that is no monitor: in the order of [`enter`], those
/// of `measures` only. The report is about these.
///
/// # Errors
/// [`NotAlone`]; nothing has been done then.
pub fn take(spec: &Spec, measures: &[Measure]) -> Result<Report, NotAlone> {
    let threads = std::fs::read_dir("/proc/self/task")?.count();
    if threads != 1 {
        return Err(NotAlone::Threads { threads });
    }
    let alone = sys::Alone(());
    let root_user = rustix::process::geteuid().is_root();
    let mut report = Report::new();
    for measure in Measure::ALL {
        if measures.contains(&measure) {
            let outcome = step(measure, spec, &alone, root_user, &report);
            report.note(measure, outcome);
        }
    }
    Ok(report)
}

fn step(
    measure: Measure,
    spec: &Spec,
    alone: &sys::Alone,
    root_user: bool,
    report: &Report,
) -> Result<(), Missing> {
    match measure {
        Measure::Cgroup => steps::cgroup(&spec.cgroups),
        Measure::Descriptors => steps::close_descriptors(alone, &spec.keep),
        Measure::MountNamespace => {
            if !root_user {
                // All that follows then holds within it. Where it is refused, what needs it says so.
                let _ = steps::user_namespace(alone);
            }
            steps::mount_namespace(alone)
        }
        Measure::EmptyRoot if report.holds(Measure::MountNamespace) => {
            steps::change_root(&spec.root)
        }
        Measure::EmptyRoot => Err(Missing::Needs(Measure::MountNamespace)),
        Measure::PidNamespace => steps::pid_namespace(),
        Measure::NetworkNamespace => steps::namespace(alone, UnshareFlags::NEWNET),
        Measure::IpcNamespace => steps::namespace(alone, UnshareFlags::NEWIPC),
        Measure::UtsNamespace => steps::namespace(alone, UnshareFlags::NEWUTS),
        Measure::CgroupNamespace => steps::namespace(alone, UnshareFlags::NEWCGROUP),
        Measure::ResourceLimits => steps::limits(spec.limits, root_user),
        Measure::OwnUser if root_user => steps::become_user(spec.identity, spec.capabilities),
        Measure::OwnUser => Err(Missing::Refused {
            call: "setresuid",
            reason: "only root can become another user".to_owned(),
        }),
        Measure::NoCapabilities => steps::drop_capabilities(spec.capabilities),
        Measure::NoNewPrivileges => steps::no_new_privileges(),
        Measure::NotDumpable => steps::not_dumpable(),
    }
}
