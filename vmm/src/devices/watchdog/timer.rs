//! The watchdog's arithmetic: no clock, no threads.

use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// Milliseconds of one count.
pub(super) const PERIOD_MS: u32 = 100;
/// From how many counts it may begin: a second, so that no reboot loop is faster than the one that a
/// guest can make by rebooting; and an hour.
pub(super) const COUNTS: RangeInclusive<u32> = 10..=36_000;
/// Half a minute, until the guest says otherwise.
const COUNT_AT_FIRST: u32 = 300;

/// Counts down while it is to, and while the machine runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Timer {
    /// Within [`COUNTS`].
    count: u32,
    /// What was left at `since`, or is left while the machine stands still; none: it is off.
    left: Option<Duration>,
    /// None: the machine stands still.
    since: Option<Instant>,
}

/// As it is in a saved machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct WatchdogSaved {
    count: u32,
    left_ms: Option<u32>,
}

impl Default for WatchdogSaved {
    /// Off.
    fn default() -> Self {
        Self {
            count: COUNT_AT_FIRST,
            left_ms: None,
        }
    }
}

fn whole(count: u32) -> Duration {
    Duration::from_millis(u64::from(count) * u64::from(PERIOD_MS))
}

impl Timer {
    /// Standing still. What was saved may be anything: it is brought within bounds.
    pub(super) fn restored(saved: WatchdogSaved) -> Self {
        let count = saved.count.clamp(*COUNTS.start(), *COUNTS.end());
        let left = saved.left_ms.map(u64::from).map(Duration::from_millis);
        Self {
            count,
            left: left.map(|left| left.min(whole(*COUNTS.end()))),
            since: None,
        }
    }

    pub(super) fn save(&self, now: Instant) -> WatchdogSaved {
        let left = self.left(now).map(|left| left.as_millis());
        WatchdogSaved {
            count: self.count,
            // An hour at most.
            left_ms: left.map(|left| u32::try_from(left).unwrap_or(u32::MAX)),
        }
    }

    /// Whether it is on.
    pub(super) fn counts(&self) -> bool {
        self.left.is_some()
    }

    /// From how many it begins.
    pub(super) fn count(&self) -> u32 {
        self.count
    }

    /// How many are left, the one that has begun included; zero when it is off.
    pub(super) fn counts_left(&self, now: Instant) -> u32 {
        let left = self.left(now).unwrap_or_default();
        let counts = left.as_millis().div_ceil(u128::from(PERIOD_MS));
        u32::try_from(counts).unwrap_or(u32::MAX)
    }

    /// When nothing is left, if all stays as it is.
    pub(super) fn due(&self) -> Option<Instant> {
        Some(self.since? + self.left?)
    }

    /// For the next beginning; what is not within bounds is dropped.
    pub(super) fn set_count(&mut self, count: u32) {
        if COUNTS.contains(&count) {
            self.count = count;
        }
    }

    pub(super) fn begin(&mut self, now: Instant) {
        self.left = Some(whole(self.count));
        self.since = self.since.map(|_| now);
    }

    pub(super) fn end(&mut self) {
        self.left = None;
    }

    /// Begins again, if it is on.
    pub(super) fn again(&mut self, now: Instant) {
        if self.counts() {
            self.begin(now);
        }
    }

    pub(super) fn go(&mut self, now: Instant) {
        self.since = self.since.or(Some(now));
    }

    pub(super) fn stand(&mut self, now: Instant) {
        self.left = self.left(now);
        self.since = None;
    }

    fn left(&self, now: Instant) -> Option<Duration> {
        let gone = self.since.map(|since| now.saturating_duration_since(since));
        let left = self.left?;
        Some(left.saturating_sub(gone.unwrap_or_default()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What a guest or a host does to it.
    #[derive(Debug, Clone, Copy)]
    enum Act {
        Begin,
        End,
        Again,
        Set(u32),
        Go,
        Stand,
        Pass(u32),
        SaveAndRestore,
    }

    fn act() -> impl Strategy<Value = Act> {
        prop_oneof![
            Just(Act::Begin),
            Just(Act::End),
            Just(Act::Again),
            prop_oneof![any::<u32>(), COUNTS, Just(0), Just(u32::MAX)].prop_map(Act::Set),
            Just(Act::Go),
            Just(Act::Stand),
            (0_u32..5_000_000).prop_map(Act::Pass),
            Just(Act::SaveAndRestore),
        ]
    }

    proptest! {
        /// A model that adds up milliseconds one act at a time says the same.
        #[test]
        fn it_counts_the_time_in_which_it_is_on_and_the_machine_runs(
            acts in proptest::collection::vec(act(), 0..80)
        ) {
            let mut timer = Timer::restored(WatchdogSaved::default());
            let mut now = Instant::now();
            let (mut count, mut left, mut runs) = (COUNT_AT_FIRST, None::<u64>, false);
            for act in acts {
                let all = u64::from(count) * u64::from(PERIOD_MS);
                match act {
                    Act::Begin => {
                        timer.begin(now);
                        left = Some(all);
                    }
                    Act::End => {
                        timer.end();
                        left = None;
                    }
                    Act::Again => {
                        timer.again(now);
                        left = left.map(|_| all);
                    }
                    Act::Set(value) => {
                        timer.set_count(value);
                        if (10..=36_000).contains(&value) {
                            count = value;
                        }
                    }
                    Act::Go => {
                        timer.go(now);
                        runs = true;
                    }
                    Act::Stand => {
                        timer.stand(now);
                        runs = false;
                    }
                    Act::Pass(ms) => {
                        now += Duration::from_millis(u64::from(ms));
                        if runs {
                            left = left.map(|left| left.saturating_sub(u64::from(ms)));
                        }
                    }
                    Act::SaveAndRestore => {
                        timer = Timer::restored(timer.save(now));
                        runs = false;
                    }
                }
                prop_assert_eq!(timer.counts(), left.is_some());
                prop_assert_eq!(timer.count(), count);
                let counts = left.unwrap_or_default().div_ceil(u64::from(PERIOD_MS));
                prop_assert_eq!(u64::from(timer.counts_left(now)), counts);
                let is_due = timer.due().is_some_and(|due| due <= now);
                prop_assert_eq!(is_due, runs && left == Some(0));
            }
        }

        /// Whatever a state says, the timer is one that a guest could have made.
        #[test]
        fn what_was_saved_is_brought_within_bounds(count: u32, left_ms: Option<u32>) {
            let timer = Timer::restored(WatchdogSaved { count, left_ms });
            prop_assert!(COUNTS.contains(&timer.count()));
            prop_assert!(timer.counts_left(Instant::now()) <= *COUNTS.end());
            prop_assert_eq!(timer.counts(), left_ms.is_some());
            prop_assert_eq!(timer.due(), None);
        }
    }
}
