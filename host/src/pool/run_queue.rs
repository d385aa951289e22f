//! Who runs next, of all jobs that there are: the scheduler, the table of jobs and admission, which
//! change together.

use insula_metrics::ShedReason;
use insula_scheduler as sched;
use insula_scheduler::{Class, Nanos, Scheduler, SliceEnd, WorkerId};
use insula_types::{Outcome, TenantId};

use super::admission::Admission;
use super::jobs::{Job, JobKey, Jobs};

pub(super) fn key_of(tenant: TenantId) -> sched::TenantId {
    sched::TenantId::new(tenant.get())
}

/// See the module's documentation.
pub(super) struct RunQueue {
    pub(super) sched: Scheduler,
    pub(super) jobs: Jobs,
    pub(super) admission: Admission,
    /// Queued jobs by their homes.
    pub(super) queued: Box<[usize]>,
}

impl RunQueue {
    /// An empty queue for so many workers and instances.
    ///
    /// # Errors
    /// The scheduler's, when the number of workers is out of range.
    pub(super) fn new(workers: usize, instances: u32) -> Result<Self, sched::ConfigError> {
        Ok(Self {
            sched: Scheduler::new(sched::Config::new(workers))?,
            jobs: Jobs::default(),
            admission: Admission::new(instances, 1_000 * workers as u64),
            queued: vec![0; workers].into(),
        })
    }

    /// Takes a request out again that never had a place.
    pub(super) fn give_up(&mut self, key: JobKey, outcome: Outcome, at: Nanos) -> Option<Job> {
        let job = self.jobs.remove(key)?;
        let blame = self.admission.give_up(job.tenant, key);
        let outcome = match outcome {
            Outcome::Timeout => blame,
            other => other,
        };
        job.shed(outcome);
        self.forget_if_empty(job.tenant, at);
        Some(job)
    }

    /// Queues waiting requests for which there is a place; says which are their homes.
    pub(super) fn begin_waiting(&mut self, tenant: TenantId, at: Nanos) -> Vec<WorkerId> {
        let mut homes = Vec::new();
        while let Some(key) = self.admission.next(tenant, at) {
            homes.extend(self.begin(key, at));
        }
        homes
    }

    /// A waiting request has a place; says which is its home.
    pub(super) fn begin(&mut self, key: JobKey, at: Nanos) -> Option<WorkerId> {
        let job = self.jobs.get_mut(key)?;
        job.placed = Some(at);
        let home = job.home;
        self.enqueue(key, Class::Fresh, at);
        Some(home)
    }

    /// Charges a worker's slice. Says how many jobs can run, and whose home its job is where that is
    /// queued again.
    pub(super) fn charge(
        &mut self,
        worker: WorkerId,
        used: Nanos,
        end: SliceEnd,
        at: Nanos,
    ) -> Option<(usize, Option<WorkerId>)> {
        let charged = self.sched.charge(worker, used, end, at).ok()?;
        let mut home = None;
        if charged.fate == sched::Fate::Requeued
            && let Some(job) = self.jobs.get_mut(JobKey::of(charged.job))
        {
            self.queued[job.home.index()] += 1;
            home = Some(job.home);
        }
        Some((charged.runnable, home))
    }

    pub(super) fn enqueue(&mut self, key: JobKey, class: Class, at: Nanos) {
        let Some(job) = self.jobs.get_mut(key) else {
            return;
        };
        let (tenant, home) = (key_of(job.tenant), job.home);
        let queued = self.sched.enqueue(tenant, key.id(), home, class, at);
        self.queued[home.index()] += usize::from(queued.is_ok());
        if let Err(error) = queued {
            // Admission keeps the queue far below its cap, and a tenant stays in the scheduler
            // as long as it has jobs.
            tracing::error!(%error, "a job could not be queued");
            debug_assert!(false, "{error}");
        }
    }

    /// A job has ended: its place goes to one that waits, at the home that is told. Those that have
    /// waited for too long are refused, and handed back to be dropped without the lock.
    pub(super) fn finished(&mut self, job: &Job, at: Nanos) -> (Vec<Job>, Option<WorkerId>) {
        let stayed = job
            .placed
            .map_or(Nanos::ZERO, |since| at.saturating_sub(since));
        let freed = self.admission.depart(job.tenant, stayed, at);
        let begun = freed.next.and_then(|key| self.begin(key, at));
        let refused = freed.refused.into_iter();
        let refused: Vec<_> = refused.filter_map(|key| self.jobs.remove(key)).collect();
        for job in &refused {
            job.shed(freed.blame);
        }
        self.forget_if_empty(job.tenant, at);
        (refused, begun)
    }

    pub(super) fn forget_if_empty(&mut self, tenant: TenantId, at: Nanos) {
        if self.admission.forget_if_empty(tenant) {
            // It can only be unknown if it never was added.
            let _ = self.sched.remove_tenant(key_of(tenant), at);
        }
    }
}

impl Job {
    /// It never ran, and will not.
    fn shed(&self, outcome: Outcome) {
        let reason = match outcome {
            Outcome::TenantOverloaded => Some(ShedReason::Deadline),
            Outcome::HostOverloaded => Some(ShedReason::HostQueue),
            _ => None,
        };
        if let Some(reason) = reason {
            self.exchange.service.tenant.metrics.shed(reason);
        }
        self.exchange.settle(outcome);
    }
}
