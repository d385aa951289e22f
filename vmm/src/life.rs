//! The life of a machine: one enum, one transition function.
//!
//! ```text
//!             Start            Entered            Pause
//!  defined ─────────▶ starting ───────▶ running ◀──────────▶ paused
//!                      ▲    ▲            │   │     Resume       │
//!                Start │    └────────────┘   │ Stop,            │ Stop
//!                      │   Reset, Rebooted   │ PoweredOff       │
//!                   stopped ◀───────────── stopping ◀───────────┘
//!                      ▲       Exited
//!                      │ Start: failed ─▶ starting
//!
//!  anything but deleting ── Broke ─▶ failed
//!  defined, stopped, failed ── Delete ─▶ deleting
//! ```
//!
//! The host keeps one [`State`] per machine and feeds it what was asked for and what it observed;
//! the monitor has a [`Phase`](crate::machine::Phase) of its own. A monitor that ends without having
//! been told to is [`Event::Exited`] in a state that does not expect it: that is a failure, with the
//! exit status as its reason, and never a silent stop.
//!
//! Failure paths: whatever happens to the monitor process leads to `failed` or `stopped`, from every
//! state but `deleting`; from both, `Start` and `Delete` work. `deleting` is left only by being gone.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The monitor process of a machine, as the host numbers it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MonitorPid(u32);

impl MonitorPid {
    /// `pid`, unless it is zero, which is no process.
    #[must_use]
    pub const fn new(pid: u32) -> Option<Self> {
        if pid == 0 { None } else { Some(Self(pid)) }
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }
}

/// Where the first instruction comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// The kernel's entry point, in a new monitor.
    Boot,
    /// A snapshot, in a new monitor.
    Snapshot,
    /// The kernel's entry point again, after a reset: in a new monitor, since the old one is behind
    /// filters that let it make no machine.
    Reboot,
}

/// Who wanted the machine to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StopCause {
    /// Somebody with a token.
    Requested,
    /// The guest: it wrote the sleep register.
    PoweredOff,
}

/// How the monitor process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Exit {
    /// By itself, with this code.
    Code(i32),
    /// Nobody could see: its parent was gone.
    Unknown,
    /// Killed by this signal; 31 (SIGSYS) is a system call that its filter forbids.
    Signal(i32),
}

/// Why a machine is `failed`, in words that a person understands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Failure {
    /// It could not be set up; the text is the first error.
    Setup(String),
    /// The guest came to where it could not go on; the text is the monitor's reason.
    Guest(String),
    /// Its monitor did not do what a monitor does; the text is what was seen.
    Monitor(String),
    /// The monitor ended without having been told to.
    MonitorEnded(Exit),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Setup(detail) => write!(f, "could not be set up: {detail}"),
            Self::Guest(detail) | Self::Monitor(detail) => f.write_str(detail),
            Self::MonitorEnded(Exit::Unknown) => f.write_str(
                "the monitor ended without a word: it was killed, or this machine was turned off",
            ),
            Self::MonitorEnded(Exit::Code(code)) => {
                write!(f, "the monitor ended by itself with code {code}")
            }
            Self::MonitorEnded(Exit::Signal(31)) => {
                write!(
                    f,
                    "the monitor was killed for a system call that it may not make"
                )
            }
            Self::MonitorEnded(Exit::Signal(signal)) => {
                write!(f, "the monitor was killed by signal {signal}")
            }
        }
    }
}

/// Where a machine is in its life, with what is true only there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "state")]
pub enum State {
    /// Its specification is stored; no process, no memory.
    Defined,
    /// On the way to the first guest instruction.
    Starting {
        /// Where that comes from.
        origin: Origin,
    },
    /// vCPUs execute.
    Running {
        /// Whose vCPUs.
        monitor: MonitorPid,
    },
    /// vCPUs are parked between two instructions; memory is kept.
    Paused {
        /// Who keeps it.
        monitor: MonitorPid,
    },
    /// Told to end, and not ended yet.
    Stopping {
        /// Who is to end.
        monitor: MonitorPid,
        /// On whose behalf.
        cause: StopCause,
    },
    /// Ended as it should. Disks are kept.
    Stopped {
        /// On whose behalf.
        cause: StopCause,
    },
    /// Ended as it should not. Disks are kept.
    Failed {
        /// What happened.
        failure: Failure,
    },
    /// Being taken apart; nothing leads back.
    Deleting,
}

/// What was asked for, or what was observed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Asked: boot it, or continue a snapshot.
    Start(Source),
    /// Observed: the first guest instruction is being executed.
    Entered(MonitorPid),
    /// Asked: park the vCPUs.
    Pause,
    /// Asked: let them go on.
    Resume,
    /// Asked: end it.
    Stop,
    /// Asked: as if the reset button was pressed.
    Reset,
    /// Observed: the guest reset itself.
    Rebooted,
    /// Observed: the guest turned itself off.
    PoweredOff,
    /// Observed: the monitor process is gone.
    Exited(Exit),
    /// Observed: it cannot go on.
    Broke(Failure),
    /// Asked: take it apart.
    Delete,
}

/// What a start can begin with; a reboot is never asked for, it is what a reset leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The kernel.
    Boot,
    /// A snapshot.
    Snapshot,
}

/// An event that has no meaning in a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a machine that is {state} cannot {event}")]
pub struct Refused {
    /// The word for the state.
    pub state: &'static str,
    /// The word for the event.
    pub event: &'static str,
}

impl State {
    /// The contract's word for it, as in `insula_machine_state`.
    #[must_use]
    pub const fn word(&self) -> &'static str {
        match self {
            Self::Defined => "defined",
            Self::Starting { .. } => "starting",
            Self::Running { .. } => "running",
            Self::Paused { .. } => "paused",
            Self::Stopping { .. } => "stopping",
            Self::Stopped { .. } => "stopped",
            Self::Failed { .. } => "failed",
            Self::Deleting => "deleting",
        }
    }

    /// All words, in the order of a machine's life: the values of a metric's label.
    pub const WORDS: [&'static str; 8] = [
        "defined", "starting", "running", "paused", "stopping", "stopped", "failed", "deleting",
    ];

    /// Whether the machine's memory is there, or is about to be.
    #[must_use]
    pub const fn has_memory(&self) -> bool {
        match self {
            Self::Starting { .. }
            | Self::Running { .. }
            | Self::Paused { .. }
            | Self::Stopping { .. } => true,
            Self::Defined | Self::Stopped { .. } | Self::Failed { .. } | Self::Deleting => false,
        }
    }

    /// The monitor, where there is one.
    #[must_use]
    pub const fn monitor(&self) -> Option<MonitorPid> {
        match self {
            Self::Running { monitor }
            | Self::Paused { monitor }
            | Self::Stopping { monitor, .. } => Some(*monitor),
            _ => None,
        }
    }

    /// The state after `event`.
    ///
    /// # Errors
    /// [`Refused`] when the event has no meaning here; the state is then as it was.
    pub fn after(&self, event: &Event) -> Result<Self, Refused> {
        use Event as E;
        use State as S;
        Ok(match (self, event) {
            (S::Defined | S::Stopped { .. } | S::Failed { .. }, E::Start(source)) => S::Starting {
                origin: match source {
                    Source::Boot => Origin::Boot,
                    Source::Snapshot => Origin::Snapshot,
                },
            },
            (S::Defined | S::Stopped { .. } | S::Failed { .. }, E::Delete) => S::Deleting,

            (S::Starting { .. }, E::Entered(monitor)) => S::Running { monitor: *monitor },
            (S::Running { monitor }, E::Pause) => S::Paused { monitor: *monitor },
            (S::Paused { monitor }, E::Resume) => S::Running { monitor: *monitor },
            (S::Running { .. }, E::Reset | E::Rebooted) | (S::Paused { .. }, E::Reset) => {
                S::Starting {
                    origin: Origin::Reboot,
                }
            }

            (S::Running { monitor } | S::Paused { monitor }, E::Stop) => S::Stopping {
                monitor: *monitor,
                cause: StopCause::Requested,
            },
            (S::Running { monitor }, E::PoweredOff) => S::Stopping {
                monitor: *monitor,
                cause: StopCause::PoweredOff,
            },
            // It did not get far enough to have a guest that could be asked.
            (S::Starting { .. }, E::Stop) => S::Stopped {
                cause: StopCause::Requested,
            },
            // A guest that powers off while it is being stopped does what was wanted.
            (S::Stopping { .. }, E::PoweredOff | E::Rebooted) => self.clone(),
            // However it ended: it was to end.
            (S::Stopping { cause, .. }, E::Exited(_)) => S::Stopped { cause: *cause },

            (S::Starting { .. } | S::Running { .. } | S::Paused { .. }, E::Exited(exit)) => {
                S::Failed {
                    failure: Failure::MonitorEnded(*exit),
                }
            }
            // The first reason is the one that explains the later ones.
            (S::Failed { .. }, E::Exited(_) | E::Broke(_)) => self.clone(),
            (S::Deleting, E::Exited(_) | E::Broke(_) | E::Delete) => S::Deleting,
            // The process of a start that was called off.
            (S::Stopped { .. }, E::Exited(_)) => self.clone(),
            (
                S::Starting { .. } | S::Running { .. } | S::Paused { .. } | S::Stopping { .. },
                E::Broke(failure),
            ) => S::Failed {
                failure: failure.clone(),
            },

            _ => {
                return Err(Refused {
                    state: self.word(),
                    event: event.word(),
                });
            }
        })
    }
}

impl Event {
    /// A verb for messages: "cannot …".
    const fn word(&self) -> &'static str {
        match self {
            Self::Start(_) => "start",
            Self::Entered(_) => "enter its guest",
            Self::Pause => "be paused",
            Self::Resume => "resume",
            Self::Stop => "be stopped",
            Self::Reset => "be reset",
            Self::Rebooted => "reboot",
            Self::PoweredOff => "power off",
            Self::Exited(_) => "lose its monitor",
            Self::Broke(_) => "break",
            Self::Delete => "be deleted",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pid() -> MonitorPid {
        MonitorPid::new(7).expect("7 is a process")
    }

    fn states() -> [State; 8] {
        [
            State::Defined,
            State::Starting {
                origin: Origin::Boot,
            },
            State::Running { monitor: pid() },
            State::Paused { monitor: pid() },
            State::Stopping {
                monitor: pid(),
                cause: StopCause::Requested,
            },
            State::Stopped {
                cause: StopCause::PoweredOff,
            },
            State::Failed {
                failure: Failure::Monitor("silent".to_owned()),
            },
            State::Deleting,
        ]
    }

    fn events() -> [Event; 12] {
        [
            Event::Start(Source::Boot),
            Event::Start(Source::Snapshot),
            Event::Entered(pid()),
            Event::Pause,
            Event::Resume,
            Event::Stop,
            Event::Reset,
            Event::Rebooted,
            Event::PoweredOff,
            Event::Exited(Exit::Signal(9)),
            Event::Broke(Failure::Setup("no memory".to_owned())),
            Event::Delete,
        ]
    }

    /// A row per state, a column per event; the letter is the state after it, `.` a refusal.
    ///
    /// d defined, s starting, r running, p paused, t stopping, o stopped, f failed, x deleting
    const TABLE: [&str; 8] = [
        // B S E P R T ! b o X F D
        "s s . . . . . . . . . x", // defined
        ". . r . . o . . . f f .", // starting
        ". . . p . t s s t f f .", // running
        ". . . . r t s . . f f .", // paused
        ". . . . . . . t t o f .", // stopping
        "s s . . . . . . . o . x", // stopped
        "s s . . . . . . . f f x", // failed
        ". . . . . . . . . x x x", // deleting
    ];

    fn letter(state: &State) -> char {
        match state {
            State::Defined => 'd',
            State::Starting { .. } => 's',
            State::Running { .. } => 'r',
            State::Paused { .. } => 'p',
            State::Stopping { .. } => 't',
            State::Stopped { .. } => 'o',
            State::Failed { .. } => 'f',
            State::Deleting => 'x',
        }
    }

    #[test]
    fn every_pair_is_as_the_table_says() {
        for (state, row) in states().iter().zip(TABLE) {
            for (event, want) in events().iter().zip(row.split(' ')) {
                let got = state.after(event).map_or('.', |next| letter(&next));
                assert_eq!(got.to_string(), want, "{state:?} after {event:?}");
            }
            assert_eq!(row.split(' ').count(), events().len());
        }
    }

    #[test]
    fn a_refusal_says_what_was_wrong() {
        let refused = State::Defined.after(&Event::Pause).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "a machine that is defined cannot be paused"
        );
    }

    #[test]
    fn data_travels_along() {
        let running = states()[1].after(&Event::Entered(pid())).unwrap();
        assert_eq!(running, State::Running { monitor: pid() });
        let off = running.after(&Event::PoweredOff).unwrap();
        assert_eq!(
            off.after(&Event::Exited(Exit::Code(0))).unwrap(),
            State::Stopped {
                cause: StopCause::PoweredOff
            }
        );
        let killed = running.after(&Event::Exited(Exit::Signal(31))).unwrap();
        let State::Failed { failure } = killed else {
            panic!("a killed monitor is a failure, not {killed:?}");
        };
        assert!(failure.to_string().contains("system call"));
    }

    #[test]
    fn the_first_reason_stays() {
        let first = State::Failed {
            failure: Failure::Guest("triple fault".to_owned()),
        };
        assert_eq!(first.after(&Event::Exited(Exit::Signal(9))).unwrap(), first);
    }

    #[test]
    fn words_are_those_of_the_metric() {
        assert_eq!(states().map(|state| state.word()), State::WORDS);
    }
}
