//! The run queue of the host, as the ingress and the control plane see it.
//!
//! One scheduler and one table of jobs for all workers ([`RunQueue`]), under one lock that is held
//! for a pick or a charge and never across a poll. A worker that finds the queue empty says so while
//! it holds the lock; whoever queues something afterwards sees that and wakes it. What workers do is
//! in [`super::batch`].

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use insula_scheduler as sched;
use insula_scheduler::{Class, Nanos, WorkerId};
use insula_types::spec::TenantSpec;
use insula_types::{Outcome, ServiceId, TenantId};

use super::admission::{Arrival, Shed};
use super::exchange::Exchange;
use super::jobs::{Job, JobKey, JobWaker, Wakefulness, Work};
use super::offload::Offload;
use super::run_queue::{RunQueue, key_of};
use super::runners::{Lender, Runners};
use super::slot::WorkerSlot;

/// See the module's documentation.
pub struct Pool {
    pub(super) queue: Mutex<RunQueue>,
    pub(super) workers: Box<[WorkerSlot]>,
    pub(super) runners: Runners,
    /// For what blocks.
    pub(super) offload: Arc<Offload>,
    /// There are jobs that any worker may take: they take longer than a slice.
    pub(super) help_wanted: AtomicBool,
    pub(super) epoch: Instant,
    pub(super) this: Weak<Self>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool")
            .field("workers", &self.workers.len())
            .finish_non_exhaustive()
    }
}

/// A request that may come in: it counts already.
#[derive(Debug)]
#[must_use = "it takes a place until it was submitted"]
pub struct Admitted(Arrival);

/// Locks whatever a panic has left behind: what is guarded is consistent between statements.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn params(spec: &TenantSpec) -> sched::Params {
    let rate = |millicores: insula_types::Millicores| {
        let bare = u32::try_from(millicores.get()).unwrap_or(sched::Millicores::MAX);
        sched::Millicores::new(bare).ok()
    };
    sched::Params {
        shares: sched::Shares::new(spec.cpu.shares.get()).unwrap_or(sched::Shares::NORMAL),
        reservation: spec.cpu.reservation.and_then(rate),
        limit: spec.cpu.limit.and_then(rate),
    }
}

impl Pool {
    /// A pool for `workers` threads and `instances` instances at once.
    ///
    /// # Errors
    /// [`sched::ConfigError`] when the number of workers is out of range.
    pub fn new(workers: usize, instances: u32) -> Result<Arc<Self>, sched::ConfigError> {
        let queue = RunQueue::new(workers, instances)?;
        Ok(Arc::new_cyclic(|this| Self {
            queue: Mutex::new(queue),
            workers: (0..workers).map(|_| WorkerSlot::default()).collect(),
            runners: Runners::default(),
            offload: Arc::default(),
            help_wanted: AtomicBool::new(false),
            epoch: Instant::now(),
            this: this.clone(),
        }))
    }

    /// Threads for what blocks.
    #[must_use]
    pub fn offload(&self) -> Arc<Offload> {
        Arc::clone(&self.offload)
    }

    pub(super) fn nanos(&self, now: Instant) -> Nanos {
        Nanos::from_duration(now.saturating_duration_since(self.epoch))
    }

    pub(super) fn now(&self) -> Nanos {
        self.nanos(Instant::now())
    }

    /// Adds a tenant or changes its envelope, effective at once.
    ///
    /// # Errors
    /// The scheduler's word when the reservations do not fit the host.
    pub fn set_tenant(&self, tenant: TenantId, spec: &TenantSpec) -> Result<(), String> {
        let now = self.now();
        let mut inner = lock(&self.queue);
        let (key, params) = (key_of(tenant), params(spec));
        if inner.admission.knows(tenant) {
            inner
                .sched
                .set_params(key, params, now)
                .map_err(|error| error.to_string())?;
        } else {
            inner
                .sched
                .add_tenant(key, params, now)
                .map_err(|error| error.to_string())?;
        }
        inner.admission.set(tenant, spec);
        let begun = inner.begin_waiting(tenant, now);
        drop(inner);
        self.wake_homes(&begun);
        Ok(())
    }

    /// Removes a tenant: its requests are cancelled, and its place in the scheduler goes with
    /// the last of them.
    pub fn remove_tenant(&self, tenant: TenantId) {
        let keys = {
            let mut inner = lock(&self.queue);
            if !inner.admission.leave(tenant) {
                return;
            }
            inner.jobs.keys_where(|job| job.tenant == tenant)
        };
        self.kill_all(&keys);
        let now = self.now();
        lock(&self.queue).forget_if_empty(tenant, now);
    }

    /// Cancels all requests of a service.
    pub fn cancel_service(&self, service: ServiceId) {
        let keys = lock(&self.queue)
            .jobs
            .keys_where(|job| job.exchange.service.id == service);
        self.kill_all(&keys);
    }

    /// Cancels everything, for the end of a drain.
    pub fn cancel_all(&self) {
        let keys = lock(&self.queue).jobs.keys_where(|_| true);
        self.kill_all(&keys);
    }

    fn kill_all(&self, keys: &[JobKey]) {
        for key in keys {
            self.kill(*key, Outcome::Canceled);
        }
    }

    /// Jobs in the table.
    pub fn jobs(&self) -> usize {
        lock(&self.queue).admission.jobs()
    }

    /// Asks whether a request of a tenant that has until `deadline` may come in. One that may must be
    /// [submitted](Pool::submit).
    ///
    /// # Errors
    /// [`Shed`] says whose bound it was.
    pub fn admit(&self, tenant: TenantId, deadline: Instant) -> Result<Admitted, Shed> {
        let (at, deadline) = (self.now(), self.nanos(deadline));
        let arrival = lock(&self.queue).admission.arrive(tenant, at, deadline)?;
        Ok(Admitted(arrival))
    }

    /// Queues an admitted request. `work` runs the guest and settles the exchange; it is dropped
    /// unpolled when the request ends before its turn.
    pub fn submit(
        &self,
        admitted: Admitted,
        home: WorkerId,
        exchange: Arc<Exchange>,
        deadline: Instant,
        work: Work,
    ) -> JobKey {
        let now = Instant::now();
        let at = self.nanos(now);
        let tenant = exchange.service.tenant.id;
        let mut guard = lock(&self.queue);
        let inner = &mut *guard;
        let key = inner.jobs.next_key();
        inner.jobs.insert(Job {
            tenant,
            home,
            waker: Arc::new(JobWaker::new(self.this.clone(), key)),
            exchange,
            deadline,
            work: Some(work),
            turn_ns: 0,
            ticket: None,
            killed: None,
            placed: (admitted.0 == Arrival::Runs).then_some(at),
        });
        let begun = match admitted.0 {
            Arrival::Runs => {
                inner.enqueue(key, Class::Fresh, at);
                Vec::new()
            }
            Arrival::Waits => {
                inner.admission.wait(tenant, key, at);
                inner.begin_waiting(tenant, at)
            }
        };
        drop(guard);
        self.wake_homes(&begun);
        let slot = &self.workers[home.index()];
        lock(&slot.deadlines).add(now, deadline, key);
        slot.wake.notify_one();
        key
    }

    /// Ends a request from outside: its deadline passed, or its client went away. What it used
    /// is charged when a worker drops it.
    pub fn kill(&self, key: JobKey, outcome: Outcome) {
        let at = self.now();
        let mut guard = lock(&self.queue);
        let inner = &mut *guard;
        let Some(job) = inner.jobs.get_mut(key) else {
            return;
        };
        if job.placed.is_none() {
            // It never ran: there is nothing to measure.
            let removed = inner.give_up(key, outcome, at);
            drop(guard);
            drop(removed);
            return;
        }
        job.exchange.settle(outcome);
        job.killed.get_or_insert(outcome);
        let home = job.home;
        if job.waker.change(Wakefulness::Parked, Wakefulness::Queued) {
            inner.enqueue(key, Class::Woken, at);
            drop(guard);
            self.wake(home, at);
        }
    }

    /// Seconds after which a client may try again whose request was refused after it had waited.
    pub fn retry_after(&self, tenant: TenantId) -> Option<u64> {
        let at = self.now();
        lock(&self.queue).admission.retry_after(tenant, at)
    }

    pub(super) fn enqueue_woken(&self, key: JobKey) {
        let at = self.now();
        let mut inner = lock(&self.queue);
        let Some(home) = inner.jobs.get_mut(key).map(|job| job.home) else {
            return;
        };
        inner.enqueue(key, Class::Woken, at);
        drop(inner);
        self.wake(home, at);
    }

    /// Wakes a job's home; another worker as well where the home has been busy for long.
    fn wake(&self, home: WorkerId, at: Nanos) {
        let slot = &self.workers[home.index()];
        slot.wake.notify_one();
        if slot.in_slice.load(Ordering::Relaxed) && slot.is_behind(at) {
            self.wake_idle(home);
        }
    }

    /// Wakes the workers that have something to begin.
    pub(super) fn wake_homes(&self, homes: &[WorkerId]) {
        for home in homes {
            self.workers[home.index()].wake.notify_one();
        }
    }

    pub(super) fn wake_idle(&self, except: WorkerId) {
        for (index, slot) in self.workers.iter().enumerate() {
            if index != except.index() && slot.idle.swap(false, Ordering::SeqCst) {
                slot.wake.notify_one();
                return;
            }
        }
    }

    /// Waits until there may be something to run for this worker.
    pub(super) async fn wait(&self, worker: WorkerId) {
        self.workers[worker.index()].wake.notified().await;
    }

    /// Wakes one worker: a slice to which it lent its core has ended.
    pub(super) fn wake_worker(&self, index: usize) {
        self.workers[index].wake.notify_one();
    }

    /// Wakes all workers: to bring their books up to date, or to let them see a shutdown.
    pub fn wake_all(&self) {
        for slot in &self.workers {
            slot.wake.notify_one();
        }
    }

    /// A worker runs on this core only.
    pub(super) fn pinned(&self, id: WorkerId, core: Option<usize>) {
        if let Some(core) = core {
            self.workers[id.index()].core.get_or_init(|| core);
        }
    }

    pub(super) fn lender(&self, id: WorkerId) -> Lender {
        let core = self.workers[id.index()].core.get().copied();
        Lender { worker: id, core }
    }

    /// CPU time that this process has used for no tenant so far, in nanoseconds: the workers'
    /// outside of slices, and all of the other threads.
    pub fn host_cpu_ns(&self) -> u64 {
        let mut tids = self.runners.tids().clone();
        tids.extend(
            self.workers
                .iter()
                .map(|slot| slot.tid.load(Ordering::Relaxed)),
        );
        tids.extend(self.offload.tids());
        let workers: u64 = self
            .workers
            .iter()
            .map(|slot| slot.host_ns.load(Ordering::Relaxed))
            .sum();
        let others = super::clock::cpu_ns_without(&tids);
        let lent = self.runners.host_ns() + self.offload.host_ns();
        let gone = self.runners.gone_ns() + self.offload.gone_ns();
        workers + lent + others.saturating_sub(gone)
    }

    /// Time that a tenant's runnable requests waited for a core, and time that its limit held
    /// them back, both since it was added.
    pub fn waited(&self, tenant: TenantId) -> Option<(Duration, Duration)> {
        let now = self.now();
        let account = lock(&self.queue).sched.account(key_of(tenant), now)?;
        Some((
            account.waited.as_duration(),
            account.throttled.as_duration(),
        ))
    }
}
