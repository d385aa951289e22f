//! Which cores the servers run on, and which the client; and which of them goes first.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// How server and client divide two cores. A client that competes with the server for a core
/// measures the kernel's scheduler as well; both figures are of interest, so both are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Layout {
    /// The server has the first core, with one worker; the client has the second
    Split,
    /// The server has both cores, with two workers; the client takes what it needs of them,
    /// at real-time priority
    Shared,
}

impl Layout {
    pub(crate) const ALL: [Self; 2] = [Self::Split, Self::Shared];

    pub(crate) const fn title(self) -> &'static str {
        match self {
            Self::Split => "Server on one core, client on another",
            Self::Shared => "Server on two cores, client on the same two at real-time priority",
        }
    }

    pub(crate) const fn word(self) -> &'static str {
        match self {
            Self::Split => "split",
            Self::Shared => "shared",
        }
    }
}

/// Some cores, by number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cores(Vec<usize>);

impl Cores {
    /// Those that the calling thread may use.
    pub(crate) fn allowed() -> Result<Self> {
        let set = sched_getaffinity(None).context("asking for this thread's cores")?;
        Ok(Self(
            (0..CpuSet::MAX_CPU)
                .filter(|core| set.is_set(*core))
                .collect(),
        ))
    }

    /// Binds the calling thread, and what it starts from now on, to these cores.
    pub(crate) fn bind(&self) -> Result<()> {
        let mut set = CpuSet::new();
        for core in &self.0 {
            set.set(*core);
        }
        sched_setaffinity(None, &set).with_context(|| format!("binding to cores {:?}", self.0))
    }

    pub(crate) fn count(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn contains(&self, core: usize) -> bool {
        self.0.contains(&core)
    }

    /// The `index`-th of them, in turn.
    pub(crate) fn one(&self, index: usize) -> Self {
        Self(vec![self.0[index % self.0.len()]])
    }
}

/// A layout on the cores of this machine.
#[derive(Debug, Clone)]
pub(crate) struct Places {
    pub(crate) server: Cores,
    pub(crate) client: Cores,
    /// Both together.
    pub(crate) all: Cores,
}

impl Places {
    /// Takes the first two cores that we may use, however many there are: figures of different
    /// machines stay comparable.
    pub(crate) fn of(layout: Layout) -> Result<Self> {
        let mut all = Cores::allowed()?;
        if all.count() < 2 {
            bail!("two cores are needed, and {} may be used", all.count());
        }
        all.0.truncate(2);
        Ok(match layout {
            Layout::Split => Self {
                server: all.one(0),
                client: all.one(1),
                all,
            },
            Layout::Shared => Self {
                server: all.clone(),
                client: all.clone(),
                all,
            },
        })
    }
}

/// Does something with the calling thread bound elsewhere, and binds it back.
pub(crate) fn while_bound<T>(cores: &Cores, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let before = Cores::allowed()?;
    cores.bind()?;
    let result = work();
    before.bind()?;
    result
}

/// Whom the kernel lets run first where two want a core.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Priority {
    Ordinary,
    /// SCHED_FIFO with this of its 99 levels.
    RealTime(u8),
}

impl Priority {
    /// Who keeps a pace: above everything ordinary, below what the kernel needs.
    pub(crate) const PACE: Self = Self::RealTime(10);
    /// Who only presses: below those who keep a pace.
    pub(crate) const PRESS: Self = Self::RealTime(5);

    /// Asks util-linux for it, for the calling thread. Without the right to it all goes on as
    /// before, and `false` says so.
    pub(crate) fn take(self) -> bool {
        let Self::RealTime(level) = self else {
            return true;
        };
        let thread = rustix::thread::gettid().as_raw_nonzero().to_string();
        Command::new("chrt")
            .args(["--fifo", "--pid", &level.to_string(), &thread])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok_and(|status| status.success())
    }
}
