//! What the simulated tenants do, decent ones and adversaries.

use insula_scheduler::SliceEnd;

use crate::prng::Prng;

/// How a tenant's jobs behave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Habit {
    /// Jobs that never end; slices between these percentages of the quantum.
    Hog { least: u64, most: u64 },
    /// Gives the core back just before the quantum, and is back at once.
    Yielder,
    /// A new request for each that ends, of 2–20 µs.
    Shorts,
    /// Sleeps, then comes with many jobs of about ten quanta.
    Burst { every_us: u64, jobs: u64 },
    /// A hog; one slice in twenty overruns by up to 100 times.
    Storm,
    /// Traps within 0–2 µs, and the next request is already there.
    Traps,
    /// Requests at random, of half to two quanta, waiting once for I/O.
    Service { every_us: u64 },
}

impl Habit {
    /// How long the next slice is, and how it ends.
    pub(crate) fn slice(self, quantum: u64, prng: &mut Prng) -> (u64, SliceEnd) {
        match self {
            Habit::Hog { least, most } => (
                prng.within(quantum * least / 100, quantum * most / 100),
                prng.choose(&[SliceEnd::Preempted, SliceEnd::Continued]),
            ),
            Habit::Yielder => (quantum - 1, SliceEnd::Blocked),
            Habit::Shorts => (prng.within(2_000, 20_000), SliceEnd::Finished),
            Habit::Burst { .. } => {
                let end = if prng.one_in(10) {
                    SliceEnd::Finished
                } else {
                    SliceEnd::Preempted
                };
                (quantum, end)
            }
            Habit::Storm if prng.one_in(20) => {
                let end = prng.choose(&[SliceEnd::Preempted, SliceEnd::Paused]);
                (prng.within(quantum, 100 * quantum), end)
            }
            Habit::Storm => (quantum, SliceEnd::Preempted),
            Habit::Traps => (prng.within(0, 2_000), SliceEnd::Finished),
            Habit::Service { .. } => {
                let end = prng.choose(&[SliceEnd::Finished, SliceEnd::Blocked]);
                (prng.within(quantum / 2, quantum * 2), end)
            }
        }
    }
}
