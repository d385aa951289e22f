//! The table of jobs, and what wakes them.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Weak};
use std::task::Wake;
use std::time::Instant;

use insula_scheduler::{JobId, Nanos, WorkerId};
use insula_types::{Outcome, TenantId};

use super::dispatcher::Pool;
use super::exchange::Exchange;
use super::runners::Ticket;

/// A job's place in the table and the generation of that place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct JobKey {
    index: u32,
    generation: u32,
}

impl JobKey {
    pub(super) const fn new(index: u32, generation: u32) -> Self {
        Self { index, generation }
    }

    pub(super) fn id(self) -> JobId {
        JobId::new(u64::from(self.generation) << 32 | u64::from(self.index))
    }

    pub(super) fn of(id: JobId) -> Self {
        let [generation, index] = [id.get() >> 32, id.get() & u64::from(u32::MAX)]
            .map(|half| u32::try_from(half).unwrap_or(0));
        Self { index, generation }
    }
}

/// What a job runs: the guest, until its verdict is settled.
pub(super) type Work = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Whether a job stands in the run queue, and if not, what would put it there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Wakefulness {
    /// In the run queue, or waiting for admission: waking it changes nothing.
    Queued = 0,
    /// Being polled: a wake turns it into `Woken`.
    Running = 1,
    /// Being polled, and woken since: it will be queued again.
    Woken = 2,
    /// Waiting: a wake queues it.
    Parked = 3,
}

/// The waker of one job.
pub(super) struct JobWaker {
    pool: Weak<Pool>,
    key: JobKey,
    state: AtomicU8,
}

impl JobWaker {
    pub(super) fn new(pool: Weak<Pool>, key: JobKey) -> Self {
        Self {
            pool,
            key,
            state: AtomicU8::new(Wakefulness::Queued as u8),
        }
    }

    /// Unconditional: only the dispatcher, holding the pool's lock, takes a job out of a queue.
    pub(super) fn set(&self, to: Wakefulness) {
        self.state.store(to as u8, Ordering::SeqCst);
    }

    /// Whether it was woken while it was polled.
    pub(super) fn is_woken(&self) -> bool {
        self.state.load(Ordering::SeqCst) == Wakefulness::Woken as u8
    }

    /// Changes the state only from `from`; says whether it did.
    pub(super) fn change(&self, from: Wakefulness, to: Wakefulness) -> bool {
        self.state
            .compare_exchange(from as u8, to as u8, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok()
    }
}

impl Wake for JobWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    /// A wake cannot be lost: it either finds the job running and marks it, which the dispatcher
    /// sees when it tries to park it, or finds it parked and queues it. Both changes are single
    /// compare-exchanges on one word.
    fn wake_by_ref(self: &Arc<Self>) {
        if self.change(Wakefulness::Running, Wakefulness::Woken) {
            return;
        }
        if self.change(Wakefulness::Parked, Wakefulness::Queued)
            && let Some(pool) = self.pool.upgrade()
        {
            pool.enqueue_woken(self.key);
        }
    }
}

/// One job.
pub(super) struct Job {
    pub(super) tenant: TenantId,
    pub(super) home: WorkerId,
    pub(super) waker: Arc<JobWaker>,
    pub(super) exchange: Arc<Exchange>,
    pub(super) deadline: Instant,
    /// `None` while it is being polled.
    pub(super) work: Option<Work>,
    /// CPU time that is left of its turn among its tenant's preempted requests.
    pub(super) turn_ns: u64,
    /// Set while a runner polls it.
    pub(super) ticket: Option<Arc<Ticket>>,
    /// Set when it is to be dropped instead of polled.
    pub(super) killed: Option<Outcome>,
    /// Since when it has a place among its tenant's running requests; `None` while it waits for one.
    pub(super) placed: Option<Nanos>,
}

/// All jobs, by key.
#[derive(Default)]
pub(super) struct Jobs {
    places: Vec<(u32, Option<Job>)>,
    free: Vec<u32>,
}

impl Jobs {
    /// The key that [`Jobs::insert`] will use next.
    pub(super) fn next_key(&self) -> JobKey {
        match self.free.last() {
            Some(&index) => JobKey::new(index, self.places[index as usize].0),
            None => JobKey::new(u32::try_from(self.places.len()).unwrap_or(u32::MAX), 0),
        }
    }

    /// Inserts at [`Jobs::next_key`].
    pub(super) fn insert(&mut self, job: Job) {
        match self.free.pop() {
            Some(index) => self.places[index as usize].1 = Some(job),
            None => self.places.push((0, Some(job))),
        }
    }

    pub(super) fn get_mut(&mut self, key: JobKey) -> Option<&mut Job> {
        let (generation, job) = self.places.get_mut(key.index as usize)?;
        job.as_mut().filter(|_| *generation == key.generation)
    }

    pub(super) fn contains(&self, key: JobKey) -> bool {
        self.places
            .get(key.index as usize)
            .is_some_and(|(generation, job)| *generation == key.generation && job.is_some())
    }

    pub(super) fn remove(&mut self, key: JobKey) -> Option<Job> {
        let (generation, job) = self.places.get_mut(key.index as usize)?;
        if *generation != key.generation {
            return None;
        }
        let job = job.take()?;
        *generation = generation.wrapping_add(1);
        self.free.push(key.index);
        Some(job)
    }

    pub(super) fn keys_where(&self, wanted: impl Fn(&Job) -> bool) -> Vec<JobKey> {
        let indexed = (0u32..).zip(&self.places);
        indexed
            .filter(|(_, (_, job))| job.as_ref().is_some_and(&wanted))
            .map(|(index, (generation, _))| JobKey::new(index, *generation))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_survive_the_schedulers_ids() {
        for key in [
            JobKey::new(0, 0),
            JobKey::new(7, u32::MAX),
            JobKey::new(u32::MAX, 3),
        ] {
            assert_eq!(JobKey::of(key.id()), key);
        }
    }
}
