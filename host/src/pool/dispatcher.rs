//! The run queue of the host and the loop that serves it.
//!
//! One scheduler and one table of jobs for all workers, under one lock that is held for a pick or
//! a charge and never across a poll. A worker that finds the queue empty says so while it holds
//! the lock; whoever queues something afterwards sees that and wakes it.
//!
//! On failure: a poll that panics settles its request as `host_error` and drops its future; a
//! job whose tenant is gone is killed and dropped at its next turn.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use insula_metrics::ShedReason;
use insula_scheduler as sched;
use insula_scheduler::{Class, Nanos, Pick, Scheduler, SliceEnd, WorkerId};
use insula_types::spec::TenantSpec;
use insula_types::{Outcome, ServiceId, TenantId};
use tokio::runtime::Handle;
use tokio::sync::Notify;

use super::admission::{Admission, Arrival, Shed};
use super::clock::Stopwatch;
use super::deadlines::{Deadlines, TICK};
use super::exchange::Exchange;
use super::jobs::{Job, JobKey, JobWaker, Jobs, Wakefulness, Work};
use super::pace::{Ending, Lane, TURN_NS};
use super::runners::{Lender, Load, Runners, Ticket};

/// How long a worker polls guests before it looks at its connections again.
const BATCH: Duration = Duration::from_micros(250);
/// After how much work without a pause others may take a worker's jobs. What a request has touched
/// is in its own core's cache: on another one it costs a quarter more.
const ALONE: Nanos = Nanos::from_micros(500);
/// How long a core is lent before the scheduler is asked again.
const LOAN: Duration = Duration::from_millis(2);

struct Inner {
    sched: Scheduler,
    jobs: Jobs,
    admission: Admission,
    /// Queued jobs by their homes.
    queued: Box<[usize]>,
}

/// What other threads may know of a worker.
#[derive(Debug, Default)]
struct WorkerSlot {
    /// Set under the pool's lock when the worker found nothing to run.
    idle: AtomicBool,
    /// A guest is being polled: the worker cannot look at its connections.
    in_slice: AtomicBool,
    /// When the worker last began to be busy, in nanoseconds of the pool's clock; 0 while it is not.
    busy_since: AtomicU64,
    wake: Notify,
    deadlines: Mutex<Deadlines>,
    /// CPU time of the worker's thread outside of slices.
    host_ns: AtomicU64,
    tid: AtomicI32,
    /// The worker's runtime: timers of its guests belong to it.
    runtime: OnceLock<Handle>,
    /// The core to which the worker is pinned.
    core: OnceLock<usize>,
}

impl WorkerSlot {
    /// It looks for something to do and finds nothing. Under the pool's lock.
    fn idles(&self) {
        self.idle.store(true, Ordering::SeqCst);
        self.busy_since.store(0, Ordering::Relaxed);
    }

    fn is_busy(&self, at: Nanos) {
        if self.busy_since.load(Ordering::Relaxed) == 0 {
            self.busy_since.store(at.as_nanos(), Ordering::Relaxed);
        }
    }

    /// It has been busy for so long that others should take over some of its jobs.
    fn is_behind(&self, at: Nanos) -> bool {
        let since = self.busy_since.load(Ordering::Relaxed);
        since != 0 && at.saturating_sub(Nanos::from_nanos(since)) >= ALONE
    }
}

/// See the module's documentation.
pub struct Pool {
    inner: Mutex<Inner>,
    workers: Box<[WorkerSlot]>,
    pub(super) runners: Runners,
    /// There are jobs that any worker may take: they take longer than a slice.
    help_wanted: AtomicBool,
    epoch: Instant,
    this: Weak<Self>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool")
            .field("workers", &self.workers.len())
            .finish_non_exhaustive()
    }
}

/// A worker's own state, kept between batches.
struct WorkerState {
    id: WorkerId,
    watch: Stopwatch,
    next_sweep: Instant,
    /// The thread may have slept since the last boundary.
    slept: bool,
    /// Set while a runner has the core.
    loan: Option<Loan>,
    /// The runner that had it last; perhaps in the middle of a slice.
    runner: Option<Arc<Ticket>>,
}

/// What a worker does with its core for the slice that it picked.
enum Loan {
    /// Its runner has it.
    Lent {
        key: JobKey,
        ticket: Arc<Ticket>,
        exchange: Arc<Exchange>,
        since: Instant,
    },
    /// A runner with an earlier slice has it still.
    Waiting,
}

thread_local! {
    /// Set on the threads of workers.
    static WORKER: RefCell<Option<WorkerState>> = const { RefCell::new(None) };
}

/// Gives a worker's own thread its state. `None` on other threads, and while a guest of this
/// worker is being polled.
fn with_worker<T>(use_it: impl FnOnce(&mut WorkerState) -> T) -> Option<T> {
    WORKER.with(|worker| worker.try_borrow_mut().ok()?.as_mut().map(use_it))
}

/// The calling worker's thread wakes up: what passed since the last boundary is not all its own.
pub(super) fn slept() {
    with_worker(|worker| worker.slept = true);
}

/// A request that may come in: it counts already.
#[derive(Debug)]
#[must_use = "it takes a place until it was submitted"]
pub struct Admitted(Arrival);

/// What a worker should do after a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum After {
    /// Look at the connections, then go on.
    Again,
    /// Wait for a wake.
    Idle,
    /// Wait for a wake, at most until then.
    Until(Instant),
}

/// How one slice ended.
pub(super) enum Slice {
    Done,
    Pending(Work),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
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

fn key_of(tenant: TenantId) -> sched::TenantId {
    sched::TenantId::new(tenant.get())
}

impl Pool {
    /// A pool for `workers` threads and `instances` instances at once.
    ///
    /// # Errors
    /// [`sched::ConfigError`] when the number of workers is out of range.
    pub fn new(workers: usize, instances: u32) -> Result<Arc<Self>, sched::ConfigError> {
        let sched = Scheduler::new(sched::Config::new(workers))?;
        let admission = Admission::new(instances, 1_000 * workers as u64);
        Ok(Arc::new_cyclic(|this| Self {
            inner: Mutex::new(Inner {
                sched,
                jobs: Jobs::default(),
                admission,
                queued: vec![0; workers].into(),
            }),
            workers: (0..workers).map(|_| WorkerSlot::default()).collect(),
            runners: Runners::default(),
            help_wanted: AtomicBool::new(false),
            epoch: Instant::now(),
            this: this.clone(),
        }))
    }

    fn nanos(&self, now: Instant) -> Nanos {
        Nanos::from_duration(now.saturating_duration_since(self.epoch))
    }

    fn now(&self) -> Nanos {
        self.nanos(Instant::now())
    }

    /// Adds a tenant or changes its envelope, effective at once.
    ///
    /// # Errors
    /// The scheduler's word when the reservations do not fit the host.
    pub fn set_tenant(&self, tenant: TenantId, spec: &TenantSpec) -> Result<(), String> {
        let now = self.now();
        let mut inner = lock(&self.inner);
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
        if inner.begin_waiting(tenant, now) {
            drop(inner);
            self.wake_all();
        }
        Ok(())
    }

    /// Removes a tenant: its requests are cancelled, and its place in the scheduler goes with
    /// the last of them.
    pub fn remove_tenant(&self, tenant: TenantId) {
        let keys = {
            let mut inner = lock(&self.inner);
            if !inner.admission.leave(tenant) {
                return;
            }
            inner.jobs.keys_where(|job| job.tenant == tenant)
        };
        self.kill_all(&keys);
        let now = self.now();
        lock(&self.inner).forget_if_empty(tenant, now);
    }

    /// Cancels all requests of a service.
    pub fn cancel_service(&self, service: ServiceId) {
        let keys = lock(&self.inner)
            .jobs
            .keys_where(|job| job.exchange.service.id == service);
        self.kill_all(&keys);
    }

    /// Cancels everything, for the end of a drain.
    pub fn cancel_all(&self) {
        let keys = lock(&self.inner).jobs.keys_where(|_| true);
        self.kill_all(&keys);
    }

    fn kill_all(&self, keys: &[JobKey]) {
        for key in keys {
            self.kill(*key, Outcome::Canceled);
        }
    }

    /// Jobs in the table.
    pub fn jobs(&self) -> usize {
        lock(&self.inner).admission.jobs()
    }

    /// Asks whether a request of a tenant that has until `deadline` may come in. One that may must be
    /// [submitted](Pool::submit).
    ///
    /// # Errors
    /// [`Shed`] says whose bound it was.
    pub fn admit(&self, tenant: TenantId, deadline: Instant) -> Result<Admitted, Shed> {
        let (at, deadline) = (self.now(), self.nanos(deadline));
        let arrival = lock(&self.inner).admission.arrive(tenant, at, deadline)?;
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
        let mut guard = lock(&self.inner);
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
        match admitted.0 {
            Arrival::Runs => inner.enqueue(key, Class::Fresh, at),
            Arrival::Waits => {
                inner.admission.wait(tenant, key, at);
                inner.begin_waiting(tenant, at);
            }
        }
        drop(guard);
        let slot = &self.workers[home.index()];
        lock(&slot.deadlines).add(now, deadline, key);
        slot.wake.notify_one();
        key
    }

    /// Ends a request from outside: its deadline passed, or its client went away. What it used
    /// is charged when a worker drops it.
    pub fn kill(&self, key: JobKey, outcome: Outcome) {
        let at = self.now();
        let mut guard = lock(&self.inner);
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
        lock(&self.inner).admission.retry_after(tenant, at)
    }

    pub(super) fn enqueue_woken(&self, key: JobKey) {
        let at = self.now();
        let mut inner = lock(&self.inner);
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

    /// Whether a worker may look for a job: it has one of its own, or others need help.
    fn may_pick(&self, worker: WorkerId, own: usize, at: Nanos) -> bool {
        own > 0
            || self.help_wanted.swap(false, Ordering::Relaxed)
            || self
                .workers
                .iter()
                .enumerate()
                .any(|(index, slot)| index != worker.index() && slot.is_behind(at))
    }

    fn wake_idle(&self, except: WorkerId) {
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

    fn lender(&self, id: WorkerId) -> Lender {
        let core = self.workers[id.index()].core.get().copied();
        Lender { worker: id, core }
    }

    /// Called once by each worker's thread.
    pub(super) fn enter(&self, id: WorkerId) {
        let tid = rustix::thread::gettid().as_raw_nonzero().get();
        let slot = &self.workers[id.index()];
        slot.tid.store(tid, Ordering::Relaxed);
        slot.runtime.get_or_init(Handle::current);
        let state = WorkerState {
            id,
            watch: Stopwatch::new(),
            next_sweep: Instant::now(),
            slept: true,
            loan: None,
            runner: None,
        };
        WORKER.with(|worker| worker.replace(Some(state)));
    }

    /// CPU time of the host itself so far, in nanoseconds: the workers' outside of slices, and
    /// all of the other threads and children.
    pub fn host_cpu_ns(&self) -> u64 {
        let mut tids = self.runners.tids().clone();
        tids.extend(
            self.workers
                .iter()
                .map(|slot| slot.tid.load(Ordering::Relaxed)),
        );
        let workers: u64 = self
            .workers
            .iter()
            .map(|slot| slot.host_ns.load(Ordering::Relaxed))
            .sum();
        workers + self.runners.host_ns() + super::clock::other_cpu_ns(&tids)
    }

    /// Time that a tenant's runnable requests waited for a core, and time that its limit held
    /// them back, both since it was added.
    pub fn waited(&self, tenant: TenantId) -> Option<(Duration, Duration)> {
        let now = self.now();
        let account = lock(&self.inner).sched.account(key_of(tenant), now)?;
        Some((
            account.waited.as_duration(),
            account.throttled.as_duration(),
        ))
    }

    /// Kills the jobs of a worker whose deadline has passed; says whether any are left.
    fn sweep(&self, worker: &mut WorkerState, now: Instant) -> bool {
        let slot = &self.workers[worker.id.index()];
        worker.next_sweep = now + TICK;
        let (expired, left) = {
            let inner = lock(&self.inner);
            let mut deadlines = lock(&slot.deadlines);
            let expired = deadlines.expired(now, |key| inner.jobs.contains(key));
            (expired, !deadlines.is_empty())
        };
        for key in expired {
            self.kill(key, Outcome::Timeout);
        }
        left
    }

    /// Brings the worker's books up to date: all since the last boundary was the host's.
    fn settle_host_time(&self, worker: &mut WorkerState) -> Instant {
        let (now, ns) = if std::mem::take(&mut worker.slept) {
            let now = Instant::now();
            (now, worker.watch.read(now))
        } else {
            worker.watch.lap()
        };
        let host = &self.workers[worker.id.index()].host_ns;
        host.fetch_add(ns, Ordering::Relaxed);
        now
    }

    /// Polls guests in the scheduler's order for about [`BATCH`]. To be called by a worker.
    pub(super) fn run_batch(&self) -> After {
        with_worker(|worker| self.batch(worker)).unwrap_or(After::Idle)
    }

    fn batch(&self, worker: &mut WorkerState) -> After {
        let began = self.settle_host_time(worker);
        let mut ends = None;
        if began >= worker.next_sweep {
            let left = self.sweep(worker, began);
            ends = left.then_some(worker.next_sweep);
        } else if !lock(&self.workers[worker.id.index()].deadlines).is_empty() {
            ends = Some(worker.next_sweep);
        }
        if let Some(loan) = worker.loan.take() {
            self.call_in(worker.id, loan, began);
        }
        let mut now = began;
        loop {
            let until = match self.pick(worker.id, now) {
                Picked::Run(next) => match self.run_slice(worker, next, now) {
                    Ran::Ended { at, end } => {
                        now = at;
                        // After a whole slice somebody's answer or input may have waited for it.
                        let waited = now.saturating_duration_since(began);
                        if waited >= BATCH || could_go_on(end) {
                            let slot = &self.workers[worker.id.index()];
                            if slot.is_behind(self.nanos(now)) {
                                self.wake_idle(worker.id);
                            }
                            return After::Again;
                        }
                        continue;
                    }
                    Ran::Lent => now + LOAN,
                },
                Picked::Idle => return ends.map_or(After::Idle, After::Until),
                Picked::Throttled(until) => until,
            };
            return After::Until(ends.map_or(until, |sweep| sweep.min(until)));
        }
    }

    /// Runs a picked slice that begins at `now`, the worker's last boundary, and charges it; or
    /// lends the core to a runner for it.
    fn run_slice(&self, worker: &mut WorkerState, next: Next, now: Instant) -> Ran {
        let Next {
            key,
            what,
            killed,
            exchange,
            deadline,
            home,
        } = next;
        let (work, waker) = match what {
            What::Poll(work, waker) => (work, waker),
            What::OnRunner(ticket) => return self.lend(worker, key, ticket, exchange, now),
        };
        let used = exchange.cpu_ns.load(Ordering::Relaxed);
        let lane = exchange.service.stats.pace.lane(used);
        let killed = killed.or_else(|| (now >= deadline).then_some(Outcome::Timeout));
        let mut load = Load {
            work,
            waker,
            killed,
            exchange,
        };
        let runtime = self.workers[home.index()].runtime.get();
        if let (Lane::Runner, None, Some(runtime)) = (lane, killed, runtime) {
            if self.core_is_taken(worker) {
                return self.wait_for_core(worker, key, load);
            }
            let exchange = load.exchange.clone();
            let lender = self.lender(worker.id);
            match self.runners.lend(&self.this, lender, runtime, load) {
                Ok(ticket) => {
                    if let Some(job) = lock(&self.inner).jobs.get_mut(key) {
                        job.ticket = Some(ticket.clone());
                    }
                    return self.lent(worker, key, ticket, exchange, now);
                }
                Err(untaken) => load = untaken,
            }
        }
        let exchange = load.exchange;
        let slice = poll_once(load.work, load.killed, load.waker.into(), &exchange);
        let (at, used) = worker.watch.lap();
        let end = self.end_slice(worker.id, key, slice, used, &exchange, at);
        let ending = match end {
            SliceEnd::Preempted | SliceEnd::Continued => Ending::Preempted {
                quantum: exchange.quantum,
            },
            _ => Ending::OfItself,
        };
        let pace = &exchange.service.stats.pace;
        pace.slice(Lane::Worker, used, ending);
        Ran::Ended { at, end }
    }

    /// Whether a runner is in the middle of a slice on this worker's core. Two of them there would
    /// take it from one another.
    fn core_is_taken(&self, worker: &mut WorkerState) -> bool {
        let id = worker.id;
        worker.runner.take_if(|ticket| !ticket.runs_for(id));
        worker.runner.is_some()
    }

    /// The picked slice needs the core that a runner has: it stands in line again when that one has
    /// ended, or anything else happens.
    fn wait_for_core(&self, worker: &mut WorkerState, key: JobKey, load: Load) -> Ran {
        if let Some(job) = lock(&self.inner).jobs.get_mut(key) {
            load.waker.set(Wakefulness::Queued);
            job.work = Some(load.work);
        }
        self.free_for_connections(worker);
        worker.loan = Some(Loan::Waiting);
        Ran::Lent
    }

    /// A job was picked that is on a runner already.
    fn lend(
        &self,
        worker: &mut WorkerState,
        key: JobKey,
        ticket: Arc<Ticket>,
        exchange: Arc<Exchange>,
        now: Instant,
    ) -> Ran {
        if !ticket.runs_for(worker.id) && !ticket.has_ended() && self.core_is_taken(worker) {
            self.free_for_connections(worker);
            worker.loan = Some(Loan::Waiting);
            return Ran::Lent;
        }
        ticket.lent_by(self.lender(worker.id));
        // Asked after that: it has ended, or the runner will wake this worker.
        if ticket.has_ended() {
            let end = self.charge_runner(worker.id, key, &ticket, &exchange, now);
            return Ran::Ended { at: now, end };
        }
        self.lent(worker, key, ticket, exchange, now)
    }

    fn lent(
        &self,
        worker: &mut WorkerState,
        key: JobKey,
        ticket: Arc<Ticket>,
        exchange: Arc<Exchange>,
        since: Instant,
    ) -> Ran {
        self.free_for_connections(worker);
        worker.runner = Some(ticket.clone());
        worker.loan = Some(Loan::Lent {
            key,
            ticket,
            exchange,
            since,
        });
        Ran::Lent
    }

    fn free_for_connections(&self, worker: &WorkerState) {
        let slot = &self.workers[worker.id.index()];
        slot.in_slice.store(false, Ordering::Relaxed);
    }

    /// Ends a loan: whoever has waited for its end may be next.
    fn call_in(&self, worker: WorkerId, loan: Loan, now: Instant) {
        match loan {
            Loan::Waiting => self.pause(worker, Nanos::ZERO, now),
            Loan::Lent {
                key,
                ticket,
                exchange,
                since,
            } => {
                if ticket.has_ended() {
                    self.charge_runner(worker, key, &ticket, &exchange, now);
                    return;
                }
                let used = ticket.charge();
                ticket.pause(now.saturating_duration_since(since), used);
                exchange.charge_cpu(used);
                self.pause(worker, Nanos::from_nanos(used), now);
            }
        }
    }

    /// Charges the picked slice what it used so far; it is not over.
    fn pause(&self, worker: WorkerId, used: Nanos, now: Instant) {
        let at = self.nanos(now);
        // The scheduler knows the worker's slice: it was picked for it and not charged since.
        let charged = lock(&self.inner).charge(worker, used, SliceEnd::Paused, at);
        debug_assert!(charged.is_some());
    }

    /// A slice on a runner has ended: charges the rest of it. Its job ends or parks with it, or
    /// stands in line again.
    fn charge_runner(
        &self,
        worker: WorkerId,
        key: JobKey,
        ticket: &Ticket,
        exchange: &Exchange,
        now: Instant,
    ) -> SliceEnd {
        let used = ticket.charge();
        match ticket.result() {
            Some(slice) => self.end_slice(worker, key, slice, used, exchange, now),
            // Not reachable: only the picked job's worker asks for the result, and once.
            None => {
                debug_assert!(false, "a slice ended twice");
                self.pause(worker, Nanos::from_nanos(used), now);
                SliceEnd::Paused
            }
        }
    }

    fn pick(&self, worker: WorkerId, now: Instant) -> Picked {
        let at = self.nanos(now);
        let slot = &self.workers[worker.index()];
        let mut guard = lock(&self.inner);
        let inner = &mut *guard;
        if !self.may_pick(worker, inner.queued[worker.index()], at) {
            slot.idles();
            return match inner.sched.next_release() {
                Some(until) => Picked::Throttled(self.epoch + until.as_duration()),
                None => Picked::Idle,
            };
        }
        loop {
            match inner.sched.pick(worker, at) {
                Ok(Pick::Run { job, home, .. }) => {
                    inner.queued[home.index()] -= 1;
                    slot.is_busy(at);
                    let key = JobKey::of(job);
                    if let Some(next) = inner.jobs.get_mut(key).and_then(|job| job.start(key)) {
                        slot.idle.store(false, Ordering::SeqCst);
                        slot.in_slice.store(true, Ordering::Relaxed);
                        return Picked::Run(next);
                    }
                    // Not reachable: a queued job is in the table with its work. If it were
                    // not, the queue must not stand still for it.
                    debug_assert!(false, "a queued job without work");
                    let _ = inner.charge(worker, Nanos::ZERO, SliceEnd::Finished, at);
                }
                Ok(Pick::Throttled { until }) => {
                    slot.idles();
                    return Picked::Throttled(self.epoch + until.as_duration());
                }
                Ok(Pick::Idle) | Err(_) => {
                    slot.idles();
                    return Picked::Idle;
                }
            }
        }
    }

    /// Charges a slice, decides what becomes of its job, and offers other runnable work to an idle
    /// worker where this one is busy with requests that take longer than a slice. `used` was not
    /// charged yet.
    fn end_slice(
        &self,
        worker: WorkerId,
        key: JobKey,
        slice: Slice,
        used: u64,
        exchange: &Exchange,
        now: Instant,
    ) -> SliceEnd {
        exchange.charge_cpu(used);
        let at = self.nanos(now);
        let mut guard = lock(&self.inner);
        let inner = &mut *guard;
        let slot = &self.workers[worker.index()];
        slot.in_slice.store(false, Ordering::Relaxed);
        let (end, gone) = match slice {
            Slice::Done => (SliceEnd::Finished, inner.jobs.remove(key)),
            Slice::Pending(work) => {
                let end = inner.jobs.get_mut(key).map_or(SliceEnd::Finished, |job| {
                    job.work = Some(work);
                    job.ticket = None;
                    job.park_or_requeue(used)
                });
                (end, None)
            }
        };
        let charged = inner.charge(worker, Nanos::from_nanos(used), end, at);
        let refused = gone.as_ref().map(|job| inner.finished(job, at));
        drop(guard);
        drop(refused);
        if gone.is_some() {
            exchange.finish();
        }
        if could_go_on(end) && charged.is_some_and(|charged| charged.runnable > 1) {
            self.help_wanted.store(true, Ordering::Relaxed);
            self.wake_idle(worker);
        }
        end
    }
}

/// A slice that is about to run.
struct Next {
    key: JobKey,
    what: What,
    killed: Option<Outcome>,
    exchange: Arc<Exchange>,
    deadline: Instant,
    home: WorkerId,
}

/// Where the work of a job is.
enum What {
    /// Here.
    Poll(Work, Arc<JobWaker>),
    /// On a runner since an earlier pick.
    OnRunner(Arc<Ticket>),
}

/// What became of a picked slice.
enum Ran {
    /// It is over and charged.
    Ended { at: Instant, end: SliceEnd },
    /// A runner has the core for it.
    Lent,
}

enum Picked {
    Run(Next),
    Throttled(Instant),
    Idle,
}

const fn could_go_on(end: SliceEnd) -> bool {
    matches!(end, SliceEnd::Preempted | SliceEnd::Continued)
}

/// Runs one slice, or drops the job where it was killed or is late. A panic below ends only this
/// request.
pub(super) fn poll_once(
    mut work: Work,
    killed: Option<Outcome>,
    waker: Waker,
    exchange: &Exchange,
) -> Slice {
    if let Some(outcome) = killed {
        exchange.settle(outcome);
        let dropped = catch_unwind(AssertUnwindSafe(|| drop(work)));
        if dropped.is_err() {
            tracing::error!(
                request_id = %exchange.request_id,
                "dropping a guest panicked"
            );
        }
        return Slice::Done;
    }
    let mut context = Context::from_waker(&waker);
    match catch_unwind(AssertUnwindSafe(|| work.as_mut().poll(&mut context))) {
        Ok(Poll::Pending) => Slice::Pending(work),
        Ok(Poll::Ready(())) => Slice::Done,
        Err(_) => {
            exchange.settle(Outcome::HostError);
            tracing::error!(
                request_id = %exchange.request_id,
                "the host panicked below a guest"
            );
            // What is left of the future may panic again.
            let _ = catch_unwind(AssertUnwindSafe(|| drop(work)));
            Slice::Done
        }
    }
}

impl Job {
    /// Takes the work out, to be polled. `None` when somebody polls it.
    fn start(&mut self, key: JobKey) -> Option<Next> {
        let what = match (self.work.take(), &self.ticket) {
            (Some(work), _) => {
                self.waker.set(Wakefulness::Running);
                What::Poll(work, self.waker.clone())
            }
            (None, Some(ticket)) => What::OnRunner(ticket.clone()),
            (None, None) => return None,
        };
        Some(Next {
            key,
            what,
            killed: self.killed,
            exchange: self.exchange.clone(),
            deadline: self.deadline,
            home: self.home,
        })
    }

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

    /// What becomes of it after a slice that took `used_ns`, and did not end it.
    fn park_or_requeue(&mut self, used_ns: u64) -> SliceEnd {
        let parked =
            self.killed.is_none() && self.waker.change(Wakefulness::Running, Wakefulness::Parked);
        if parked {
            return SliceEnd::Blocked;
        }
        self.waker.set(Wakefulness::Queued);
        match self.turn_ns.checked_sub(used_ns) {
            Some(left) if left > 0 => {
                self.turn_ns = left;
                SliceEnd::Continued
            }
            _ => {
                self.turn_ns = TURN_NS;
                SliceEnd::Preempted
            }
        }
    }
}

impl Inner {
    /// Takes a request out again that never had a place.
    fn give_up(&mut self, key: JobKey, outcome: Outcome, at: Nanos) -> Option<Job> {
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

    /// Queues waiting requests for which there is a place; says whether there were any.
    fn begin_waiting(&mut self, tenant: TenantId, at: Nanos) -> bool {
        let mut any = false;
        while let Some(key) = self.admission.next(tenant, at) {
            self.begin(key, at);
            any = true;
        }
        any
    }

    /// A waiting request has a place.
    fn begin(&mut self, key: JobKey, at: Nanos) {
        if let Some(job) = self.jobs.get_mut(key) {
            job.placed = Some(at);
        }
        self.enqueue(key, Class::Fresh, at);
    }

    /// Charges a worker's slice and counts its job where it is queued again.
    fn charge(
        &mut self,
        worker: WorkerId,
        used: Nanos,
        end: SliceEnd,
        at: Nanos,
    ) -> Option<sched::Charged> {
        let charged = self.sched.charge(worker, used, end, at).ok()?;
        if charged.fate == sched::Fate::Requeued
            && let Some(job) = self.jobs.get_mut(JobKey::of(charged.job))
        {
            self.queued[job.home.index()] += 1;
        }
        Some(charged)
    }

    fn enqueue(&mut self, key: JobKey, class: Class, at: Nanos) {
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

    /// A job has ended: its place goes to one that waits. Those that have waited for too long are
    /// refused, and handed back to be dropped without the lock.
    fn finished(&mut self, job: &Job, at: Nanos) -> Vec<Job> {
        let stayed = job
            .placed
            .map_or(Nanos::ZERO, |since| at.saturating_sub(since));
        let freed = self.admission.depart(job.tenant, stayed, at);
        if let Some(key) = freed.next {
            self.begin(key, at);
        }
        let refused = freed.refused.into_iter();
        let refused: Vec<_> = refused.filter_map(|key| self.jobs.remove(key)).collect();
        for job in &refused {
            job.shed(freed.blame);
        }
        self.forget_if_empty(job.tenant, at);
        refused
    }

    fn forget_if_empty(&mut self, tenant: TenantId, at: Nanos) {
        if self.admission.forget_if_empty(tenant) {
            // It can only be unknown if it never was added.
            let _ = self.sched.remove_tenant(key_of(tenant), at);
        }
    }
}
