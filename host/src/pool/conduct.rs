//! How a version behaves: what control compares a new version with its predecessor by.
//!
//! Counted are requests that the version had a chance to answer: its own refusals (a full queue,
//! a client that went away) say nothing about it. Durations are counted in steps of half an
//! octave, which is fine enough to tell twice as slow from as fast, and small enough to keep for
//! every version of an idle service.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use insula_types::Outcome;
use serde::{Deserialize, Serialize};

/// Steps of the durations: the first holds what ends within 64 µs, the last what takes longer than
/// any timeout allows.
pub const STEPS: usize = 48;
/// Two to the power of this are the nanoseconds of the first step.
const FIRST_BITS: u32 = 16;

/// Counts since they were taken last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Conduct {
    /// Requests that failed by the version's fault.
    pub failed: u32,
    /// All requests, by the step of their duration.
    #[serde(with = "steps")]
    pub ended: [u32; STEPS],
}

/// An array longer than those that serde knows.
mod steps {
    use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

    use super::STEPS;

    pub(super) fn serialize<S: Serializer>(
        steps: &[u32; STEPS],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        steps.as_slice().serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<[u32; STEPS], D::Error> {
        let steps = Vec::<u32>::deserialize(deserializer)?;
        let given = steps.len();
        let wrong = |_| de::Error::invalid_length(given, &"one count for each step");
        steps.try_into().map_err(wrong)
    }
}

/// Counters of one version.
#[derive(Debug)]
pub struct VersionStats {
    failed: AtomicU32,
    ended: [AtomicU32; STEPS],
}

impl Default for VersionStats {
    fn default() -> Self {
        Self {
            failed: AtomicU32::new(0),
            ended: [const { AtomicU32::new(0) }; STEPS],
        }
    }
}

/// What an ending says about the version: `None` for nothing.
const fn is_failure(outcome: Outcome, answered_5xx: bool) -> Option<bool> {
    match outcome {
        Outcome::Ok => Some(answered_5xx),
        Outcome::Trap
        | Outcome::OutOfFuel
        | Outcome::Timeout
        | Outcome::OutOfMemory
        | Outcome::BadResponse => Some(true),
        Outcome::TenantOverloaded
        | Outcome::HostOverloaded
        | Outcome::NotFound
        | Outcome::BadRequest
        | Outcome::Canceled
        | Outcome::HostError => None,
    }
}

/// The step of a duration: its octave and the half of that.
fn step(duration: Duration) -> usize {
    let ns = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
    let octave = ns.checked_ilog2().unwrap_or(0);
    if octave < FIRST_BITS {
        return 0;
    }
    let upper_half = u32::from(ns >> (octave - 1) & 1 == 1);
    let step = 1 + 2 * (octave - FIRST_BITS) + upper_half;
    usize::try_from(step).map_or(STEPS - 1, |step| step.min(STEPS - 1))
}

impl VersionStats {
    /// Counts the end of a request.
    pub fn ended(&self, outcome: Outcome, answered_5xx: bool, duration: Duration) {
        let Some(failure) = is_failure(outcome, answered_5xx) else {
            return;
        };
        self.ended[step(duration)].fetch_add(1, Ordering::Relaxed);
        if failure {
            self.failed.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Moves the counts out; `None` when there were none.
    pub fn take(&self) -> Option<Conduct> {
        let take = |counter: &AtomicU32| match counter.load(Ordering::Relaxed) {
            0 => 0,
            _ => counter.swap(0, Ordering::Relaxed),
        };
        let conduct = Conduct {
            failed: take(&self.failed),
            ended: std::array::from_fn(|step| take(&self.ended[step])),
        };
        conduct
            .ended
            .iter()
            .any(|count| *count > 0)
            .then_some(conduct)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_rise_by_half_octaves() {
        assert_eq!(step(Duration::ZERO), 0);
        assert_eq!(step(Duration::from_nanos((1 << 16) - 1)), 0);
        assert_eq!(step(Duration::from_nanos(1 << 16)), 1);
        assert_eq!(step(Duration::from_nanos((1 << 16) + (1 << 15))), 2);
        assert_eq!(step(Duration::from_nanos(1 << 17)), 3);
        assert!(
            step(Duration::from_secs(300)) < STEPS - 1,
            "the longest timeout is told apart"
        );
        assert_eq!(step(Duration::MAX), STEPS - 1);
    }

    #[test]
    fn only_the_versions_own_endings_count() {
        let stats = VersionStats::default();
        for outcome in Outcome::ALL {
            stats.ended(outcome, false, Duration::from_millis(1));
        }
        stats.ended(Outcome::Ok, true, Duration::from_millis(1));
        let conduct = stats.take().unwrap();
        assert_eq!(conduct.ended.iter().sum::<u32>(), 7);
        assert_eq!(conduct.failed, 6);
        assert_eq!(stats.take(), None, "each count is given once");
    }
}
