//! Wall-clock deadlines of the jobs of one worker.
//!
//! Nearly every request ends within milliseconds, and its deadline lies seconds ahead. So a job
//! first stands in a queue of young ones, and only those that are still alive when they have
//! grown old enter the heap.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::time::{Duration, Instant};

use super::jobs::JobKey;

/// How often deadlines are looked at, and so how late one can be noticed.
pub(super) const TICK: Duration = Duration::from_millis(20);

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct Deadlines {
    young: VecDeque<(Instant, Instant, JobKey)>,
    old: BinaryHeap<Reverse<(Instant, JobKey)>>,
}

impl Deadlines {
    pub(super) fn add(&mut self, now: Instant, deadline: Instant, job: JobKey) {
        self.young.push_back((now, deadline, job));
    }

    pub(super) fn is_empty(&self) -> bool {
        self.young.is_empty() && self.old.is_empty()
    }

    /// The jobs whose deadline has passed. `alive` says which jobs are still there.
    pub(super) fn expired(&mut self, now: Instant, alive: impl Fn(JobKey) -> bool) -> Vec<JobKey> {
        while let Some((since, deadline, job)) = self.young.front().copied() {
            if now.saturating_duration_since(since) < TICK && deadline > now {
                break;
            }
            self.young.pop_front();
            if alive(job) {
                self.old.push(Reverse((deadline, job)));
            }
        }
        let mut expired = Vec::new();
        while let Some(Reverse((deadline, job))) = self.old.peek().copied() {
            if deadline > now && alive(job) {
                break;
            }
            self.old.pop();
            if deadline <= now {
                expired.push(job);
            }
        }
        expired
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_expire_in_order_and_the_dead_are_forgotten() {
        let mut deadlines = Deadlines::default();
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let keys: Vec<JobKey> = (0..3).map(|index| JobKey::new(index, 0)).collect();
        deadlines.add(at(0), at(100), keys[0]);
        deadlines.add(at(0), at(50), keys[1]);
        deadlines.add(at(1), at(5), keys[2]);
        let dead = keys[0];
        let alive = |job| job != dead;
        assert!(
            deadlines.expired(at(10), alive).is_empty(),
            "a young head holds the queue back"
        );
        assert_eq!(deadlines.expired(at(21), alive), [keys[2]]);
        assert_eq!(deadlines.expired(at(60), alive), [keys[1]]);
        assert!(deadlines.is_empty());
    }
}
