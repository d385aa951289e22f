//! What the scheduler is told once ([`Config`]) and per tenant ([`Params`]).

use std::fmt;

use crate::units::{Millicores, Nanos, Shares};

/// The most workers that one scheduler serves.
pub const WORKERS_MAX: usize = 1_024;

/// Set once, at [`Scheduler::new`](crate::Scheduler::new).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Number of workers, 1..=[`WORKERS_MAX`].
    pub workers: usize,
    /// Length of the slice that the dispatcher aims at. A picked tenant is
    /// charged this much at once and corrected when the measured length is
    /// known. Between 1 ns and 1 s.
    pub quantum: Nanos,
    /// CPU time by which a tenant may run ahead of its limit after a pause:
    /// usage over any t is at most limit·t + this, plus the slices that were
    /// running (at most one per worker).
    pub limit_burst: Nanos,
    /// How much elapsed time of missed reservation may be caught up later.
    /// Bounds the time for which a reservation that could not be used (or
    /// honoured) comes before all shares.
    pub reservation_window: Nanos,
    /// Most tenants at a time.
    pub tenants_max: u32,
    /// Most queued jobs at a time, over all tenants. A preempted job always
    /// finds room, so the queue may exceed this by one job per worker.
    pub queued_max: u32,
}

impl Config {
    /// The design's numbers for `workers` workers.
    pub const fn new(workers: usize) -> Self {
        Self {
            workers,
            quantum: Nanos::from_micros(100),
            limit_burst: Nanos::from_millis(10),
            reservation_window: Nanos::from_millis(100),
            tenants_max: 1 << 20,
            queued_max: 1 << 20,
        }
    }

    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        if self.workers == 0 || self.workers > WORKERS_MAX {
            return Err(ConfigError::Workers {
                given: self.workers,
            });
        }
        if self.quantum == Nanos::ZERO || self.quantum > Nanos::from_secs(1) {
            return Err(ConfigError::Quantum {
                given: self.quantum,
            });
        }
        if self.tenants_max == 0 || self.tenants_max > MOST {
            return Err(ConfigError::Tenants {
                given: self.tenants_max,
            });
        }
        if self.queued_max == 0 || self.queued_max > MOST {
            return Err(ConfigError::Queued {
                given: self.queued_max,
            });
        }
        Ok(())
    }
}

/// Tables are indexed by `u32`; one bit is kept free so that the jobs put back
/// by preemption (one per worker above the limit) always fit.
const MOST: u32 = 1 << 31;

/// A [`Config`] that cannot be honoured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConfigError {
    /// Not 1..=[`WORKERS_MAX`] workers.
    Workers {
        /// What was given.
        given: usize,
    },
    /// Not 1 ns..=1 s.
    Quantum {
        /// What was given.
        given: Nanos,
    },
    /// Not 1..=2^31 tenants.
    Tenants {
        /// What was given.
        given: u32,
    },
    /// Not 1..=2^31 queued jobs.
    Queued {
        /// What was given.
        given: u32,
    },
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Workers { given } => write!(f, "{given} workers, not 1..={WORKERS_MAX}"),
            Self::Quantum { given } => write!(f, "a quantum of {given}, not 1 ns..=1 s"),
            Self::Tenants { given } => write!(f, "{given} tenants, not 1..={MOST}"),
            Self::Queued { given } => write!(f, "{given} queued jobs, not 1..={MOST}"),
        }
    }
}

impl std::error::Error for ConfigError {}

/// A tenant's CPU control: the hypervisor's triple (mClock: Gulati, Merchant,
/// Varman, OSDI 2010).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Params {
    /// Weight when CPU is short.
    pub shares: Shares,
    /// Guaranteed when wanted.
    pub reservation: Option<Millicores>,
    /// Never more, even on an idle host; must not be below the reservation.
    pub limit: Option<Millicores>,
}

impl Params {
    /// `shares`, no reservation, no limit.
    pub const fn shares(shares: Shares) -> Self {
        Self {
            shares,
            reservation: None,
            limit: None,
        }
    }
}

impl Default for Params {
    fn default() -> Self {
        Self::shares(Shares::NORMAL)
    }
}
