//! Ids and quantities: newtypes with private fields and checked construction.

use std::fmt;
use std::time::Duration;

/// A point in time or a length of time, in nanoseconds.
///
/// Points count from an origin of the caller's choosing (any monotonic clock);
/// the scheduler only compares and subtracts them. Arithmetic is checked or
/// saturating; there is no `+`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Nanos(u64);

impl Nanos {
    /// No time.
    pub const ZERO: Self = Self(0);
    /// The largest time, 584 years.
    pub const MAX: Self = Self(u64::MAX);

    /// `nanos` nanoseconds.
    pub const fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    /// `micros` microseconds, saturating.
    pub const fn from_micros(micros: u64) -> Self {
        Self(micros.saturating_mul(1_000))
    }

    /// `millis` milliseconds, saturating.
    pub const fn from_millis(millis: u64) -> Self {
        Self(millis.saturating_mul(1_000_000))
    }

    /// `secs` seconds, saturating.
    pub const fn from_secs(secs: u64) -> Self {
        Self(secs.saturating_mul(1_000_000_000))
    }

    /// A standard duration, saturating at [`Nanos::MAX`].
    pub fn from_duration(duration: Duration) -> Self {
        Self(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX))
    }

    /// The same length as a standard duration.
    pub const fn as_duration(self) -> Duration {
        Duration::from_nanos(self.0)
    }

    /// The number of nanoseconds.
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// `self + other`, or nothing when it does not fit.
    pub const fn checked_add(self, other: Self) -> Option<Self> {
        match self.0.checked_add(other.0) {
            Some(sum) => Some(Self(sum)),
            None => None,
        }
    }

    /// `self + other`, at most [`Nanos::MAX`].
    pub const fn saturating_add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }

    /// `self - other`, at least zero.
    pub const fn saturating_sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }

    /// `self × factor`, at most [`Nanos::MAX`].
    pub const fn saturating_mul(self, factor: u64) -> Self {
        Self(self.0.saturating_mul(factor))
    }
}

impl fmt::Display for Nanos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ns", self.0)
    }
}

/// A quantity was outside its range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfRange {
    /// What was given.
    pub given: u64,
    /// The smallest lawful value.
    pub min: u64,
    /// The largest lawful value.
    pub max: u64,
}

impl fmt::Display for OutOfRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is outside {}..={}", self.given, self.min, self.max)
    }
}

impl std::error::Error for OutOfRange {}

fn in_range(given: u32, max: u32) -> Result<u32, OutOfRange> {
    if given == 0 || given > max {
        return Err(OutOfRange {
            given: u64::from(given),
            min: 1,
            max: u64::from(max),
        });
    }
    Ok(given)
}

/// A tenant's weight against its siblings when CPU is short: 1..=1,000,000.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Shares(u32);

impl Shares {
    /// The largest weight.
    pub const MAX: u32 = 1_000_000;
    /// The weight of a tenant that asked for none (contract: `normal`).
    pub const NORMAL: Self = Self(1_000);

    /// `shares`, if within 1..=[`Shares::MAX`].
    pub fn new(shares: u32) -> Result<Self, OutOfRange> {
        in_range(shares, Self::MAX).map(Self)
    }

    /// The number.
    pub const fn get(self) -> u32 {
        self.0
    }
}

/// A CPU rate in thousandths of a core: 1..=1,024,000 (1,024 cores).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Millicores(u32);

impl Millicores {
    /// The largest rate: every worker of the largest host.
    pub const MAX: u32 = 1_024_000;

    /// `millicores`, if within 1..=[`Millicores::MAX`].
    pub fn new(millicores: u32) -> Result<Self, OutOfRange> {
        in_range(millicores, Self::MAX).map(Self)
    }

    /// The number.
    pub const fn get(self) -> u32 {
        self.0
    }
}

/// The caller's key of a tenant; any number, never reinterpreted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TenantId(u64);

impl TenantId {
    /// The key `id`.
    pub const fn new(id: u64) -> Self {
        Self(id)
    }

    /// The number given.
    pub const fn get(self) -> u64 {
        self.0
    }
}

/// The caller's key of a job (one request of one tenant); the scheduler hands
/// it back and never looks inside. Uniqueness is the caller's affair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobId(u64);

impl JobId {
    /// The key `id`.
    pub const fn new(id: u64) -> Self {
        Self(id)
    }

    /// The number given.
    pub const fn get(self) -> u64 {
        self.0
    }
}

/// A worker thread's index, from 0; checked against the scheduler's number of
/// workers by every operation that takes one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerId(u16);

impl WorkerId {
    /// The worker at `index`.
    pub const fn new(index: u16) -> Self {
        Self(index)
    }

    /// The index.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}
