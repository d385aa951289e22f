//! What a worker does with its core: picks jobs, polls them for a slice, charges what that took, and
//! lends the core where a slice may be long.
//!
//! On failure: a poll that panics settles its request as `host_error` and drops its future; a
//! job whose tenant is gone is killed and dropped at its next turn.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use insula_scheduler::{Nanos, Pick, SliceEnd, WorkerId};
use insula_types::Outcome;
use tokio::runtime::Handle;

use super::clock::{Stopwatch, claims_can_change};
use super::connections::{Connections, Left};
use super::deadlines::TICK;
use super::dispatcher::{Pool, lock};
use super::exchange::Exchange;
use super::jobs::{Job, JobKey, JobWaker, Wakefulness, Work};
use super::pace::{Ending, Lane, TURN_NS};
use super::resting;
use super::runners::{Load, Ticket};

/// How long a worker polls guests before it looks at its connections again.
const BATCH: Duration = Duration::from_micros(250);
/// For how long after a slice that was cut short the next one is expected to be as long.
const LONG_AHEAD: Duration = Duration::from_millis(1);
/// How long a core is lent before the scheduler is asked again.
const LOAN: Duration = Duration::from_millis(2);

/// A worker's own state, kept between batches.
pub(super) struct WorkerState {
    pub(super) id: WorkerId,
    pub(super) watch: Stopwatch,
    next_sweep: Instant,
    /// The thread may have slept since the last boundary.
    slept: bool,
    /// When a slice was last cut short here.
    cut_short: Option<Instant>,
    /// Set while a runner has the core.
    loan: Option<Loan>,
    /// The runner that had it last; perhaps in the middle of a slice.
    runner: Option<Arc<Ticket>>,
    pub(super) connections: Connections,
}

/// What a worker does with its core for the slice that it picked.
enum Loan {
    /// Its runner has it.
    Lent {
        key: JobKey,
        ticket: Arc<Ticket>,
        exchange: Arc<Exchange>,
        since: Instant,
        /// The worker's own CPU time until then.
        own_ns: u64,
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
pub(super) fn with_worker<T>(use_it: impl FnOnce(&mut WorkerState) -> T) -> Option<T> {
    WORKER.with(|worker| worker.try_borrow_mut().ok()?.as_mut().map(use_it))
}

/// The calling worker's thread wakes up: what passed since the last boundary is not all its own.
pub(super) fn slept() {
    with_worker(|worker| worker.slept = true);
}

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

impl Pool {
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
            cut_short: None,
            loan: None,
            runner: None,
            connections: Connections::default(),
        };
        WORKER.with(|worker| worker.replace(Some(state)));
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

    /// A slice was charged by a worker. Where its job is queued again it may be another worker's:
    /// that one hears of it, and this one may go on with it.
    fn queued_again(&self, worker: WorkerId, home: Option<WorkerId>) {
        if let Some(home) = home.filter(|home| *home != worker) {
            self.help_wanted.store(true, Ordering::Relaxed);
            self.workers[home.index()].wake.notify_one();
        }
    }

    /// Kills the jobs of a worker whose deadline has passed; says whether any are left.
    fn sweep(&self, worker: &mut WorkerState, now: Instant) -> bool {
        let slot = &self.workers[worker.id.index()];
        worker.next_sweep = now + TICK;
        let (expired, left) = {
            let inner = lock(&self.queue);
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
    pub(super) fn settle_host_time(&self, worker: &mut WorkerState) -> Instant {
        let (now, ns) = if std::mem::take(&mut worker.slept) {
            let now = Instant::now();
            (now, worker.watch.read(now))
        } else {
            worker.watch.lap()
        };
        self.add_host_ns(worker.id, ns);
        now
    }

    pub(super) fn add_host_ns(&self, worker: WorkerId, ns: u64) {
        let host = &self.workers[worker.index()].host_ns;
        host.fetch_add(ns, Ordering::Relaxed);
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
            self.call_in(worker, loan, began);
        }
        if resting::look(began) > 0 {
            return After::Again;
        }
        worker.connections.begin_round();
        let went = self.run_connections(worker, began, false);
        if went.alone {
            return After::Again;
        }
        let mut now = went.at;
        loop {
            let until = match self.pick(worker.id, now) {
                Picked::Run(next) => match self.run_slice(worker, next, now) {
                    Ran::Ended { at, end } => {
                        now = at;
                        // After a whole slice somebody's answer or input may have waited for it; and
                        // before one, this answer is not to wait.
                        if could_go_on(end) {
                            worker.cut_short = Some(now);
                        }
                        let since = |then| now.saturating_duration_since(then);
                        let long_ahead = worker.cut_short.is_some_and(|at| since(at) < LONG_AHEAD);
                        if long_ahead || since(began) >= BATCH {
                            let slot = &self.workers[worker.id.index()];
                            if slot.is_behind(self.nanos(now)) {
                                self.wake_idle(worker.id);
                            }
                            return After::Again;
                        }
                        continue;
                    }
                    Ran::Lent => Some(now + went.left.loan(LOAN)),
                },
                Picked::Idle | Picked::Throttled(_) if went.left == Left::Ready => {
                    self.run_connections(worker, now, true);
                    return After::Again;
                }
                Picked::Idle => None,
                Picked::Throttled(until) => Some(until),
            };
            let events = [until, ends, went.left.until(), resting::next_look()];
            let first = events.into_iter().flatten().min();
            return first.map_or(After::Idle, After::Until);
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
        let lane = match used {
            0 if exchange.is_cold() => Lane::Runner,
            _ => {
                // Where a runner has the claim of any thread, a worker that wakes waits for it longer
                // than for the end of a slice of its own.
                let beside_others = worker.connections.are_mixed(now) && claims_can_change();
                exchange.service.stats.pace.lane(used, beside_others)
            }
        };
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
                    if let Some(job) = lock(&self.queue).jobs.get_mut(key) {
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
        if let Some(job) = lock(&self.queue).jobs.get_mut(key) {
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
            own_ns: worker.watch.sum_ns(),
        });
        Ran::Lent
    }

    fn free_for_connections(&self, worker: &WorkerState) {
        let slot = &self.workers[worker.id.index()];
        slot.in_slice.store(false, Ordering::Relaxed);
    }

    /// Ends a loan: whoever has waited for its end may be next.
    fn call_in(&self, worker: &WorkerState, loan: Loan, now: Instant) {
        match loan {
            Loan::Waiting => self.pause(worker.id, Nanos::ZERO, now),
            Loan::Lent {
                key,
                ticket,
                exchange,
                since,
                own_ns,
            } => {
                if ticket.has_ended() {
                    self.charge_runner(worker.id, key, &ticket, &exchange, now);
                    return;
                }
                let used = ticket.charge();
                let own = Duration::from_nanos(worker.watch.sum_ns() - own_ns);
                let lent = now.saturating_duration_since(since).saturating_sub(own);
                ticket.pause(lent, used);
                exchange.charge_cpu(used);
                self.pause(worker.id, Nanos::from_nanos(used), now);
            }
        }
    }

    /// Charges the picked slice what it used so far; it is not over.
    fn pause(&self, worker: WorkerId, used: Nanos, now: Instant) {
        let at = self.nanos(now);
        // The scheduler knows the worker's slice: it was picked for it and not charged since.
        let charged = lock(&self.queue).charge(worker, used, SliceEnd::Paused, at);
        debug_assert!(charged.is_some());
        self.queued_again(worker, charged.and_then(|(_, home)| home));
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
        let mut guard = lock(&self.queue);
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
        let mut guard = lock(&self.queue);
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
        let used = used.saturating_add(exchange.take_owed());
        let used = used.saturating_add(exchange.service.tenant.owed_ns(used));
        let charged = inner.charge(worker, Nanos::from_nanos(used), end, at);
        let finished = gone.as_ref().map(|job| inner.finished(job, at));
        drop(guard);
        if let Some((refused, begun)) = finished {
            drop(refused);
            self.wake_homes(begun.as_slice());
        }
        self.queued_again(worker, charged.and_then(|(_, home)| home));
        if gone.is_some() {
            let used = exchange.cpu_ns.load(Ordering::Relaxed);
            exchange.service.stats.pace.request(used);
            exchange.finish();
        }
        if could_go_on(end) && charged.is_some_and(|(runnable, _)| runnable > 1) {
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
