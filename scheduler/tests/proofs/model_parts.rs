//! What the reference is made of: a tag, a queue, a tenant, a slice.

use std::collections::VecDeque;

use insula_scheduler::{JobId, Params, WorkerId};

pub(crate) const SCALE: i128 = 1 << 48;
pub(crate) const CREDIT_QUANTA: i128 = 4;
pub(crate) const DEBT_QUANTA: i128 = 16;
pub(crate) const SCAN: usize = 16;
pub(crate) const PASSED_OVER: usize = 16;
pub(crate) const FRESH_RUN: usize = 32;

/// Half nanoseconds: 2,000 millicores then cost 1 per nanosecond of service.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tag {
    pub(crate) at: i128,
    pub(crate) slack: i128,
    pub(crate) per: i128,
}

impl Tag {
    pub(crate) fn spend(&mut self, used: i128, now: i128) {
        self.at = self.at.max(2 * now - self.slack) + used * self.per;
    }

    pub(crate) fn due(&self) -> i128 {
        (self.at.div_euclid(2) + self.at.rem_euclid(2)).max(0)
    }

    pub(crate) fn carried(old: Option<Self>, new: Option<Self>, now: i128) -> Option<Self> {
        let (Some(old), Some(mut new)) = (old, new) else {
            return new;
        };
        let distance = (old.at - 2 * now) / old.per * new.per;
        new.at = 2 * now + distance.max(-new.slack);
        Some(new)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stand {
    Off,
    Runnable,
    Throttled,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct Lane {
    pub(crate) jobs: VecDeque<(JobId, WorkerId)>,
    pub(crate) passed_over: usize,
}

impl Lane {
    pub(crate) fn take(&mut self, worker: WorkerId) -> (JobId, WorkerId) {
        let local = self.jobs.iter().take(SCAN).position(|job| job.1 == worker);
        let at = local
            .filter(|_| self.passed_over < PASSED_OVER)
            .unwrap_or(0);
        self.passed_over = if at == 0 { 0 } else { self.passed_over + 1 };
        self.jobs.remove(at).unwrap()
    }

    pub(crate) fn cancel(&mut self, job: JobId) -> bool {
        let Some(at) = self.jobs.iter().position(|queued| queued.0 == job) else {
            return false;
        };
        if at == 0 {
            self.passed_over = 0;
        }
        self.jobs.remove(at).is_some()
    }
}

#[derive(Clone, Debug)]
pub(crate) struct RefTenant {
    pub(crate) params: Params,
    pub(crate) start: i128,
    pub(crate) reservation: Option<Tag>,
    pub(crate) limit: Option<Tag>,
    pub(crate) lanes: [Lane; 3],
    pub(crate) fresh_run: usize,
    pub(crate) running: usize,
    pub(crate) stand: Stand,
    pub(crate) removed: bool,
    pub(crate) charged: u64,
    pub(crate) waited: i128,
    pub(crate) throttled: i128,
}

impl RefTenant {
    pub(crate) fn queued(&self) -> usize {
        self.lanes.iter().map(|lane| lane.jobs.len()).sum()
    }

    pub(crate) fn slope(&self) -> i128 {
        SCALE / i128::from(self.params.shares.get())
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct RefSlice {
    pub(crate) key: usize,
    pub(crate) job: JobId,
    pub(crate) home: WorkerId,
    pub(crate) reserved: bool,
    pub(crate) shared: bool,
    pub(crate) limited: bool,
}
