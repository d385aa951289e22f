//! Threads for slices that may be long.
//!
//! Fuel cannot stop a guest in the middle of one bulk operation, of a storm of page faults or of a
//! host call. The kernel can. So a slice that may be long runs on a thread of its own, on the
//! worker's core and under `SCHED_IDLE`: it has the core while the worker lends it (sleeps), and
//! loses it the moment the worker wakes. Where another process takes a core that was lent, the
//! runner gets the claim of any thread for its next loans, until it gets on.
//!
//! ```text
//!  worker ── lend(job) ──▶ runner polls it until it waits, ends, or had 1 ms
//!    │ waits for: input, a new job, 2 ms, the slice's end
//!    ├─ slice has ended: charge the rest, as after any slice
//!    └─ anything else:   charge what it took so far, queue the job again as preempted;
//!                        whoever picks it lends a core to the same runner again
//! ```
//!
//! A core has one runner in the middle of a slice at a time: a slice that is picked meanwhile waits
//! for its end, and is paused and picked again whenever the worker wakes.
//!
//! To the scheduler this is a slice like any other, cut into pieces. Who owns what: a [`Ticket`] is
//! shared by the runner and by the job in the table; the job's future is the runner's until the
//! ticket has its result.
//!
//! On failure: with all runners taken, or no thread to be had, the slice runs on the worker. Where
//! the kernel does not let us give a thread its claim back (no `CAP_SYS_NICE`), runners keep that of
//! any thread: they get on beside other processes, and a worker may wait some milliseconds for them. A runner that is
//! preempted while it holds a lock of the host's is waited for asleep, so it gets the core to let
//! go of it. The slice of a tenant that reaches its limit runs on to its end where the core is idle,
//! and is charged: a tenant can be ahead of its limit by one slice, as everywhere.

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use insula_scheduler::WorkerId;
use insula_types::Outcome;
use tokio::runtime::Handle;

use super::batch::{Slice, poll_once};
use super::clock::{self, Claim};
use super::dispatcher::Pool;
use super::exchange::Exchange;
use super::jobs::{JobWaker, Wakefulness, Work};
use super::pace::{Ending, Lane};

/// Runners of one host, at most.
const RUNNERS_MAX: usize = 64;
/// CPU time after which a runner gives a job back that could go on: a hand-over is a fiftieth of it.
const TURN_NS: u64 = 1_000_000;
/// For how long a core is lent before it is judged whether the runner gets it: in a few milliseconds
/// something more urgent than any of us may have been there by chance.
const JUDGED_NS: u64 = 10_000_000;
/// A clock's reading that was not taken.
const NOT_YET: u64 = u64::MAX;
/// A runner that has had nothing to do for this long ends, and gives its heap back.
const IDLE_MAX: Duration = Duration::from_secs(5);

/// A worker that lends its core.
#[derive(Debug, Clone, Copy)]
pub(super) struct Lender {
    pub(super) worker: WorkerId,
    /// The core to which it is pinned, if it is.
    pub(super) core: Option<usize>,
}

/// What is known of a runner.
struct Runner {
    /// Its thread; 0 before it has begun.
    tid: AtomicI32,
    /// The core to which it is pinned; `usize::MAX` where it is not.
    core: AtomicUsize,
}

/// One slice on a runner.
pub(super) struct Ticket {
    runner: Arc<Runner>,
    /// The runner's CPU clock when the slice began.
    began_ns: AtomicU64,
    /// And when it ended.
    ended_ns: AtomicU64,
    /// It was lent a core and did not get it: it has the claim of any thread.
    starved: AtomicBool,
    /// For how long it was lent one since that was judged last, in nanoseconds, and what it had.
    lent_ns: AtomicU64,
    had_ns: AtomicU64,
    /// What was charged of it so far.
    charged_ns: AtomicU64,
    /// How it ended.
    result: Mutex<Option<Slice>>,
    /// The worker that lends, or lent last, its core.
    lender: AtomicU32,
}

impl Ticket {
    /// That worker lends its core, and is to be woken when the slice ends.
    pub(super) fn lent_by(&self, lender: Lender) {
        let index = u32::try_from(lender.worker.index()).unwrap_or(0);
        self.lender.store(index, Ordering::SeqCst);
        self.runner.move_to(lender.core);
        if self.starved.load(Ordering::Relaxed) {
            self.runner.claim(Claim::Normal);
        }
    }

    /// The loan is over: the slice could have had the core for `lent`, and had it for `used_ns`.
    pub(super) fn pause(&self, lent: Duration, used_ns: u64) {
        let lent_ns = u64::try_from(lent.as_nanos()).unwrap_or(u64::MAX);
        let lent_ns = self.lent_ns.load(Ordering::Relaxed).saturating_add(lent_ns);
        let had_ns = self.had_ns.load(Ordering::Relaxed) + used_ns;
        let was_starved = self.starved.load(Ordering::Relaxed);
        let judged = lent_ns >= JUDGED_NS;
        if judged {
            self.starved.store(had_ns < lent_ns / 4, Ordering::Relaxed);
        }
        let (lent_ns, had_ns) = if judged { (0, 0) } else { (lent_ns, had_ns) };
        self.lent_ns.store(lent_ns, Ordering::Relaxed);
        self.had_ns.store(had_ns, Ordering::Relaxed);
        if was_starved {
            self.runner.claim(Claim::Leftover);
        }
    }

    /// Whether the slice is in the middle on a core that this worker lent.
    pub(super) fn runs_for(&self, worker: WorkerId) -> bool {
        !self.has_ended() && self.lender.load(Ordering::SeqCst) as usize == worker.index()
    }

    /// Whether the slice has ended.
    pub(super) fn has_ended(&self) -> bool {
        self.ended_ns.load(Ordering::SeqCst) != NOT_YET
    }

    /// How the slice ended, once.
    pub(super) fn result(&self) -> Option<Slice> {
        self.result_place().take()
    }

    fn result_place(&self) -> MutexGuard<'_, Option<Slice>> {
        self.result.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// CPU time of the slice that was not asked for before.
    pub(super) fn charge(&self) -> u64 {
        // The runner cannot begin another slice while its clock is read.
        let place = self.result_place();
        let taken = match self.ended_ns.load(Ordering::SeqCst) {
            NOT_YET => self.taken_so_far(),
            ended => ended.saturating_sub(self.began_ns.load(Ordering::Acquire)),
        };
        drop(place);
        let charged = self.charged_ns.fetch_max(taken, Ordering::Relaxed);
        taken.saturating_sub(charged)
    }

    fn end(&self, slice: Slice, ended_ns: u64) {
        *self.result_place() = Some(slice);
        self.ended_ns.store(ended_ns, Ordering::SeqCst);
    }

    fn taken_so_far(&self) -> u64 {
        match self.began_ns.load(Ordering::Acquire) {
            NOT_YET => 0,
            began => {
                let tid = self.runner.tid.load(Ordering::Relaxed);
                clock::other_thread_cpu_ns(tid).saturating_sub(began)
            }
        }
    }
}

impl Runner {
    fn claim(&self, claim: Claim) {
        let tid = self.tid.load(Ordering::Acquire);
        if tid != 0 && clock::claims_can_change() {
            // It may have gone on to another slice: every slice begins with a claim of its own.
            clock::set_claim(tid, claim);
        }
    }

    /// Pins it to a lent core. A refusal costs speed, nothing else.
    fn move_to(&self, core: Option<usize>) {
        let tid = rustix::process::Pid::from_raw(self.tid.load(Ordering::Acquire));
        let (Some(core), Some(tid)) = (core, tid) else {
            return;
        };
        if self.core.swap(core, Ordering::Relaxed) != core {
            let mut only = rustix::thread::CpuSet::new();
            only.set(core);
            let _ = rustix::thread::sched_setaffinity(Some(tid), &only);
        }
    }
}

/// What a runner is to do.
struct Task {
    ticket: Arc<Ticket>,
    load: Load,
    /// Timers that the guest waits for belong to its home's runtime.
    home: Handle,
}

/// Who is there, and who has nothing to do.
#[derive(Default)]
struct Bench {
    /// By number; `None` where one has ended.
    runners: Vec<Option<(Sender<Task>, Arc<Runner>)>>,
    /// The one that ended its slice last is the next to get one.
    idle: Vec<usize>,
}

/// See the module's documentation.
#[derive(Default)]
pub(super) struct Runners {
    bench: Mutex<Bench>,
    tids: Mutex<Vec<i32>>,
    /// CPU time of runners between slices.
    host_ns: AtomicU64,
    /// CPU time of runners that have ended: in their slices and between them.
    gone_ns: AtomicU64,
}

/// A slice to be run.
pub(super) struct Load {
    pub(super) work: Work,
    pub(super) waker: Arc<JobWaker>,
    pub(super) killed: Option<Outcome>,
    pub(super) exchange: Arc<Exchange>,
}

impl Runners {
    fn bench(&self) -> MutexGuard<'_, Bench> {
        self.bench.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a slice to a runner. `home` is the runtime of the job's own worker.
    ///
    /// # Errors
    /// Hands the load back when there is no runner for it.
    pub(super) fn lend(
        &self,
        pool: &Weak<Pool>,
        lender: Lender,
        home: &Handle,
        load: Load,
    ) -> Result<Arc<Ticket>, Load> {
        let mut bench = self.bench();
        let Some(number) = bench.idle.pop().or_else(|| bench.start(pool)) else {
            return Err(load);
        };
        let Some((sender, runner)) = bench.runners.get(number).and_then(Option::as_ref) else {
            return Err(load);
        };
        let ticket = Arc::new(Ticket {
            runner: runner.clone(),
            began_ns: AtomicU64::new(NOT_YET),
            ended_ns: AtomicU64::new(NOT_YET),
            starved: AtomicBool::new(false),
            lent_ns: AtomicU64::new(0),
            had_ns: AtomicU64::new(0),
            charged_ns: AtomicU64::new(0),
            result: Mutex::new(None),
            lender: AtomicU32::new(0),
        });
        ticket.lent_by(lender);
        let task = Task {
            ticket: ticket.clone(),
            load,
            home: home.clone(),
        };
        // A runner takes itself off the bench, under its lock, before it ends.
        match sender.send(task) {
            Ok(()) => Ok(ticket),
            Err(unsent) => Err(unsent.0.load),
        }
    }

    /// Takes a runner off the bench. `false` when it was given something in the meantime.
    fn leave(&self, number: usize, tid: i32) -> bool {
        let mut bench = self.bench();
        let Some(place) = bench.idle.iter().position(|idle| *idle == number) else {
            return false;
        };
        bench.idle.remove(place);
        bench.runners[number] = None;
        drop(bench);
        // In this order: for a moment this thread's time is missing from the host's, which the next
        // reading mends; the other way round it would be counted as the host's for good.
        let own_ns = clock::thread_cpu_ns();
        self.gone_ns.fetch_add(own_ns, Ordering::Relaxed);
        self.tids().retain(|known| *known != tid);
        true
    }

    /// The kernel's ids of all runners.
    pub(super) fn tids(&self) -> MutexGuard<'_, Vec<i32>> {
        self.tids.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// CPU time of runners that have ended.
    pub(super) fn gone_ns(&self) -> u64 {
        self.gone_ns.load(Ordering::Relaxed)
    }

    /// CPU time of runners that no slice was charged for.
    pub(super) fn host_ns(&self) -> u64 {
        self.host_ns.load(Ordering::Relaxed)
    }
}

impl Bench {
    /// Starts one more runner, if there may be one. It ends with the pool.
    fn start(&mut self, pool: &Weak<Pool>) -> Option<usize> {
        let free = self.runners.iter().position(Option::is_none);
        let number = free.unwrap_or(self.runners.len());
        if number >= RUNNERS_MAX {
            return None;
        }
        let (sender, tasks) = channel();
        let pool = pool.clone();
        let runner = Arc::new(Runner {
            tid: AtomicI32::new(0),
            core: AtomicUsize::new(usize::MAX),
        });
        let own = runner.clone();
        let name = format!("insula-runner-{number}");
        let thread = std::thread::Builder::new().name(name);
        if let Err(error) = thread.spawn(move || run(&pool, number, &own, &tasks)) {
            tracing::warn!(%error, "a runner could not be started");
            return None;
        }
        match free {
            Some(number) => self.runners[number] = Some((sender, runner)),
            None => self.runners.push(Some((sender, runner))),
        }
        Some(number)
    }
}

/// A runner's life.
fn run(pool: &Weak<Pool>, number: usize, own: &Runner, tasks: &Receiver<Task>) {
    let tid = rustix::thread::gettid().as_raw_nonzero().get();
    own.tid.store(tid, Ordering::Release);
    if let Some(pool) = pool.upgrade() {
        pool.runners.tids().push(tid);
    }
    let mut last_ns = 0;
    loop {
        let Task { ticket, load, home } = match tasks.recv_timeout(IDLE_MAX) {
            Ok(task) => task,
            Err(RecvTimeoutError::Timeout)
                if pool
                    .upgrade()
                    .is_some_and(|pool| !pool.runners.leave(number, tid)) =>
            {
                continue;
            }
            Err(_) => return,
        };
        own.claim(Claim::Leftover);
        let began_ns = clock::thread_cpu_ns();
        ticket.began_ns.store(began_ns, Ordering::Release);
        let (slice, ended_ns) = {
            let _home = home.enter();
            turn(load, began_ns)
        };
        ticket.end(slice, ended_ns);
        let Some(pool) = pool.upgrade() else {
            return;
        };
        let between = began_ns.saturating_sub(last_ns);
        pool.runners.host_ns.fetch_add(between, Ordering::Relaxed);
        last_ns = ended_ns;
        pool.runners.bench().idle.push(number);
        pool.wake_worker(ticket.lender.load(Ordering::SeqCst) as usize);
    }
}

/// Polls a job until it waits, ends, or has had its turn; says when that was, by the runner's clock.
fn turn(load: Load, began_ns: u64) -> (Slice, u64) {
    let Load {
        mut work,
        waker,
        killed,
        exchange,
    } = load;
    let pace = &exchange.service.stats.pace;
    let mut last_ns = began_ns;
    loop {
        let slice = poll_once(work, killed, waker.clone().into(), &exchange);
        let now_ns = clock::thread_cpu_ns();
        let took_ns = now_ns - last_ns;
        last_ns = now_ns;
        let Slice::Pending(pending) = slice else {
            pace.slice(Lane::Runner, took_ns, Ending::OfItself);
            return (slice, now_ns);
        };
        let over = now_ns - began_ns >= TURN_NS || exchange.verdict().is_some();
        // To be polled again, it must have been woken, and be so no longer.
        let again = !over && waker.change(Wakefulness::Woken, Wakefulness::Running);
        let ending = if again || waker.is_woken() {
            Ending::Preempted {
                quantum: exchange.quantum,
            }
        } else {
            Ending::OfItself
        };
        pace.slice(Lane::Runner, took_ns, ending);
        if !again {
            return (Slice::Pending(pending), now_ns);
        }
        work = pending;
    }
}
