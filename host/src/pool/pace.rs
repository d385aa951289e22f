//! How fast a service burns fuel, and whether its slices can be trusted to be short.
//!
//! Fuel bounds a slice in units of work, the scheduler wants it bounded in time, and what a unit
//! takes differs a thousandfold between tight loops and page-fault storms. So the quantum of a
//! request follows what was measured of its service. Where that does not help (one bulk operation
//! over 64 MiB burns its fuel at once and then takes 20 ms), the service's slices run on a
//! [runner](super::runners), where the kernel can take the core away from them in the middle. So do
//! those of a request that has computed for a millisecond, whatever its service: it is in no hurry,
//! and others are. Where requests of several tenants come to a worker, so do those of a service whose
//! requests usually take so long that a hand-over hardly counts: the others' need not wait for the
//! ends of their slices.
//!
//! ```text
//!   new ──▶ on runners, for 16 short slices ──▶ on workers
//!                 ▲                                │ a slice of more than 2 ms
//!                 └── for 64, 128, … 16,384 ◀──────┘
//! ```
//!
//! One overrun after 1,024 short slices on workers counts for nothing: now and then a few milliseconds
//! of a thread's time go to an interrupt, or to another machine of whoever lends us this one.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// What a slice on a worker should take: short beside what a request takes on the network.
const TARGET_NS: u64 = 100_000;
/// A slice on a worker that takes more than this has kept the core from others.
const OVERRUN_NS: u64 = 2_000_000;
/// A request that has used this much CPU time is a long one.
const LONG_NS: u64 = 1_000_000;
/// Requests that usually take this much are on runners from their first slice on, while others come
/// to the worker: a hand-over (about 20 µs) is less than a tenth of it.
const SLOW_NS: u64 = 250_000;
/// A slice is short up to this.
const SHORT_NS: u64 = 2 * TARGET_NS;
/// Bounds of the quantum, in fuel. The least still does more than it costs to begin a slice.
const QUANTUM_MIN: u64 = 10_000;
/// No code that we measured burns fuel faster than 0.05 ns a unit. A guest that is woken while it
/// runs ends its slices early and seems to.
const FASTEST: u64 = SCALE / 32;
/// 1 ns per 8 units, as in a tight loop: what is supposed before the first measurement.
const FIRST_PACE: u64 = SCALE / 8;
/// The pace is kept as a fixed-point number.
const SCALE: u64 = 1 << 16;
/// Short slices that a new service must show before it runs on workers.
const PROBATION: u32 = 16;
/// Short slices that a service must show after its first overrun; doubles with each.
const FIRST_PENALTY: u32 = 64;
const LAST_PENALTY: u32 = 16_384;

/// Short slices on workers that make good one overrun.
const PROVEN: u32 = 1_024;

/// CPU time that a preempted request may have before the next one of its tenant.
pub(super) const TURN_NS: u64 = 1_000_000;

/// Where a slice runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lane {
    /// On the worker's own thread.
    Worker,
    /// On a runner, which the worker lends its core.
    Runner,
}

/// How a slice ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    /// It burned this quantum of fuel, or was woken while it ran.
    Preempted {
        /// In fuel.
        quantum: u64,
    },
    /// The guest waits, or has ended.
    OfItself,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Pace {
    /// Nanoseconds per unit of fuel, times [`SCALE`].
    ns_per_fuel: AtomicU64,
    /// Short slices still to be shown.
    owed: AtomicU32,
    /// What the next overrun costs.
    penalty: AtomicU32,
    /// Short slices on workers since the last overrun, up to [`PROVEN`].
    proven: AtomicU32,
    /// CPU time that a request takes: a mean of the last ones, of which none counts for more than
    /// [`LONG_NS`].
    usual_ns: AtomicU64,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            ns_per_fuel: AtomicU64::new(FIRST_PACE),
            owed: AtomicU32::new(PROBATION),
            penalty: AtomicU32::new(FIRST_PENALTY),
            proven: AtomicU32::new(0),
            usual_ns: AtomicU64::new(0),
        }
    }
}

impl Pace {
    /// Where the next slice of a request runs that has used so much CPU time; `beside_others`, where
    /// requests of other tenants come to the same worker.
    pub(super) fn lane(&self, used_ns: u64, beside_others: bool) -> Lane {
        let owed = self.owed.load(Ordering::Relaxed) > 0;
        let slow = beside_others && self.usual_ns.load(Ordering::Relaxed) > SLOW_NS;
        if used_ns > LONG_NS || owed || slow {
            Lane::Runner
        } else {
            Lane::Worker
        }
    }

    /// The fuel of one slice, for a request that begins now.
    #[must_use]
    pub fn quantum(&self) -> u64 {
        let pace = self.ns_per_fuel.load(Ordering::Relaxed).max(FASTEST);
        (TARGET_NS * SCALE / pace).max(QUANTUM_MIN)
    }

    /// Learns from a slice. Racing calls may lose one another's word; the next slice repeats it.
    pub(super) fn slice(&self, lane: Lane, used_ns: u64, ending: Ending) {
        if let Ending::Preempted { quantum } = ending {
            let seen = used_ns.saturating_mul(SCALE) / quantum.max(1);
            let known = self.ns_per_fuel.load(Ordering::Relaxed);
            // Too long a slice is at other tenants' cost, too short a one only at its own.
            let pace = if seen > known {
                seen
            } else {
                known - (known - seen) / 8
            };
            self.ns_per_fuel.store(pace.max(FASTEST), Ordering::Relaxed);
        }
        let owed = self.owed.load(Ordering::Relaxed);
        match lane {
            Lane::Worker if used_ns > OVERRUN_NS => self.overran(),
            Lane::Worker if used_ns <= SHORT_NS => {
                let proven = self.proven.load(Ordering::Relaxed);
                if proven < PROVEN {
                    self.proven.store(proven + 1, Ordering::Relaxed);
                }
            }
            Lane::Runner if used_ns > OVERRUN_NS && owed < FIRST_PENALTY => self.punish(),
            Lane::Runner if used_ns <= SHORT_NS => {
                self.owed.store(owed.saturating_sub(1), Ordering::Relaxed);
            }
            _ => {}
        }
    }

    /// Learns what a whole request took. Racing calls may lose one another's word.
    pub(super) fn request(&self, used_ns: u64) {
        let usual = self.usual_ns.load(Ordering::Relaxed);
        let next = usual - usual / 8 + used_ns.min(LONG_NS) / 8;
        self.usual_ns.store(next, Ordering::Relaxed);
    }

    /// A worker's slice took too long.
    fn overran(&self) {
        if self.proven.swap(0, Ordering::Relaxed) < PROVEN {
            self.punish();
        }
    }

    fn punish(&self) {
        let penalty = self.penalty.load(Ordering::Relaxed);
        self.owed.store(penalty, Ordering::Relaxed);
        let next = penalty.saturating_mul(2).min(LAST_PENALTY);
        self.penalty.store(next, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proven() -> Pace {
        let pace = Pace::default();
        for _ in 0..PROBATION {
            assert_eq!(pace.lane(0, false), Lane::Runner);
            pace.slice(Lane::Runner, 20_000, Ending::OfItself);
        }
        pace
    }

    #[test]
    fn a_new_service_shows_short_slices_first() {
        assert_eq!(proven().lane(0, false), Lane::Worker);
        assert_eq!(proven().lane(LONG_NS + 1, false), Lane::Runner);
    }

    #[test]
    fn requests_that_usually_take_long_make_way_for_others() {
        let pace = proven();
        for _ in 0..2 {
            pace.request(1 << 40);
        }
        assert_eq!(pace.lane(0, true), Lane::Worker, "two are not the rule");
        pace.request(1 << 40);
        assert_eq!(pace.lane(0, true), Lane::Runner);
        assert_eq!(pace.lane(0, false), Lane::Worker, "nobody is in a hurry");
        for _ in 0..8 {
            pace.request(20_000);
        }
        assert_eq!(pace.lane(0, true), Lane::Worker);
    }

    #[test]
    fn an_overrun_costs_more_each_time() {
        let pace = proven();
        for penalty in [64, 128, 256] {
            pace.slice(Lane::Worker, OVERRUN_NS + 1, Ending::OfItself);
            for _ in 0..penalty {
                assert_eq!(pace.lane(0, false), Lane::Runner);
                pace.slice(Lane::Runner, 1, Ending::OfItself);
            }
            assert_eq!(pace.lane(0, false), Lane::Worker);
        }
        for _ in 0..30 {
            pace.slice(Lane::Worker, OVERRUN_NS + 1, Ending::OfItself);
        }
        assert_eq!(pace.owed.load(Ordering::Relaxed), LAST_PENALTY);
    }

    #[test]
    fn an_overrun_in_a_thousand_slices_costs_nothing() {
        let pace = proven();
        for _ in 0..3 {
            for _ in 0..PROVEN {
                pace.slice(Lane::Worker, SHORT_NS, Ending::OfItself);
            }
            pace.slice(Lane::Worker, OVERRUN_NS + 1, Ending::OfItself);
            assert_eq!(pace.lane(0, false), Lane::Worker);
        }
        pace.slice(Lane::Worker, OVERRUN_NS + 1, Ending::OfItself);
        assert_eq!(pace.lane(0, false), Lane::Runner, "the second");
    }

    #[test]
    fn a_service_that_always_overruns_stays_where_it_is() {
        let pace = Pace::default();
        for _ in 0..100_000 {
            pace.slice(Lane::Runner, 30_000_000, Ending::OfItself);
            assert_eq!(pace.lane(0, false), Lane::Runner);
        }
    }

    #[test]
    fn the_quantum_follows_what_fuel_takes() {
        let pace = proven();
        let quantum = pace.quantum();
        assert_eq!(quantum, 800_000, "100 µs at 8 units a nanosecond");
        // A page-fault storm: 100 ns a unit, a thousand times as much.
        pace.slice(Lane::Worker, quantum * 100, Ending::Preempted { quantum });
        let storm = Pace {
            owed: AtomicU32::new(0),
            ..pace
        };
        assert_eq!(storm.quantum(), QUANTUM_MIN);
        // And back, step by step, when it is over.
        for _ in 0..100 {
            let quantum = storm.quantum();
            storm.slice(Lane::Worker, quantum / 8, Ending::Preempted { quantum });
        }
        assert!(
            (790_000..=810_000).contains(&storm.quantum()),
            "{}",
            storm.quantum()
        );
    }
}
