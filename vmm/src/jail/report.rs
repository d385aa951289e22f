//! What holds after [`super::enter`], measure by measure.

use std::fmt;
use std::io;

/// One wall of the jail.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Measure {
    /// Its processor time, memory and processes are counted and limited in a group of its own.
    Cgroup,
    /// No descriptor is open but those passed in.
    Descriptors,
    /// Mounts of its own: nothing that it mounts is seen, nothing that others mount appears.
    MountNamespace,
    /// Its root is the directory made for it, read-only, without devices or programs.
    EmptyRoot,
    /// It sees itself and nobody else.
    PidNamespace,
    /// No interface, not even loopback; no abstract socket of the host.
    NetworkNamespace,
    /// No System V or POSIX queue, semaphore or segment of the host.
    IpcNamespace,
    /// A host name of its own.
    UtsNamespace,
    /// A root of the cgroup tree of its own.
    CgroupNamespace,
    /// A user and a group that no other machine has, no further group.
    OwnUser,
    /// No capability, in any set that matters.
    NoCapabilities,
    /// Bounds on descriptors, file size, threads; no core dump.
    ResourceLimits,
    /// No program that it executes could give it anything back.
    NoNewPrivileges,
    /// Its memory cannot be read through `/proc` or `ptrace` by others of its user.
    NotDumpable,
}

impl Measure {
    /// All of them, in the order in which they are taken.
    pub const ALL: [Self; 14] = [
        Self::Cgroup,
        Self::Descriptors,
        Self::MountNamespace,
        Self::EmptyRoot,
        Self::PidNamespace,
        Self::NetworkNamespace,
        Self::IpcNamespace,
        Self::UtsNamespace,
        Self::CgroupNamespace,
        Self::ResourceLimits,
        Self::OwnUser,
        Self::NoCapabilities,
        Self::NoNewPrivileges,
        Self::NotDumpable,
    ];

    /// What it is called in messages.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Cgroup => "cgroup",
            Self::Descriptors => "closed descriptors",
            Self::MountNamespace => "mount namespace",
            Self::EmptyRoot => "empty root",
            Self::PidNamespace => "pid namespace",
            Self::NetworkNamespace => "network namespace",
            Self::IpcNamespace => "ipc namespace",
            Self::UtsNamespace => "uts namespace",
            Self::CgroupNamespace => "cgroup namespace",
            Self::OwnUser => "own user",
            Self::NoCapabilities => "no capabilities",
            Self::ResourceLimits => "resource limits",
            Self::NoNewPrivileges => "no new privileges",
            Self::NotDumpable => "not dumpable",
        }
    }
}

/// Why a measure does not hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Missing {
    /// The specification did not ask for it.
    NotAsked,
    /// It rests on another one that does not hold.
    Needs(Measure),
    /// The kernel refused.
    Refused {
        /// The first call that failed.
        call: &'static str,
        /// What it said.
        reason: String,
    },
    /// Everything went well, and yet a look at the result shows otherwise.
    NotSo(&'static str),
}

impl Missing {
    pub(super) fn refused(call: &'static str) -> impl Fn(io::Error) -> Self {
        move |error| Self::Refused {
            call,
            reason: error.to_string(),
        }
    }
}

impl fmt::Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAsked => f.write_str("not asked for"),
            Self::Needs(measure) => write!(f, "needs {}", measure.word()),
            Self::Refused { call, reason } => write!(f, "{call}: {reason}"),
            Self::NotSo(seen) => f.write_str(seen),
        }
    }
}

/// Each measure, and whether it holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report(Vec<(Measure, Result<(), Missing>)>);

impl Report {
    pub(super) fn new() -> Self {
        Self(Vec::with_capacity(Measure::ALL.len()))
    }

    /// Notes the outcome of a measure.
    pub(super) fn note(&mut self, measure: Measure, outcome: Result<(), Missing>) {
        self.0.push((measure, outcome));
    }

    /// Whether `measure` holds.
    #[must_use]
    pub fn holds(&self, measure: Measure) -> bool {
        self.0
            .iter()
            .any(|(is, outcome)| *is == measure && outcome.is_ok())
    }

    /// Those that do not hold, and why.
    pub fn missing(&self) -> impl Iterator<Item = (Measure, &Missing)> {
        self.0
            .iter()
            .filter_map(|(measure, outcome)| Some((*measure, outcome.as_ref().err()?)))
    }

    /// Nothing, when all measures of `required` hold.
    ///
    /// # Errors
    /// [`Weak`] names each that does not, and why.
    pub fn require(&self, required: &[Measure]) -> Result<(), Weak> {
        let weak: Vec<_> = self
            .missing()
            .filter(|(measure, _)| required.contains(measure))
            .map(|(measure, why)| (measure, why.clone()))
            .collect();
        if weak.is_empty() {
            Ok(())
        } else {
            Err(Weak(weak))
        }
    }
}

/// A jail with walls missing that its builder requires.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Weak(pub Vec<(Measure, Missing)>);

impl fmt::Display for Weak {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the jail lacks")?;
        for (index, (measure, why)) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { ";" };
            write!(f, "{comma} {} ({why})", measure.word())?;
        }
        Ok(())
    }
}

impl std::error::Error for Weak {}
