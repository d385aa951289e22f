//! Threads for slices that may be long.
//!
//! Fuel cannot stop a guest in the middle of one bulk operation, of a storm of page faults or of a
//! host call. The kernel can. So a slice that may be long runs on a thread of its own. It has the
//! core while a worker lends it its own, that is, sleeps; the worker asks the kernel for short turns,
//! so that it gets the core back the moment it wakes. While no worker lends it one, the runner is
//! under `SCHED_IDLE`: it gets what nobody else wants.
//!
//! ```text
//!  worker ── lend(job) ──▶ runner polls it, once
//!    │ waits for: input, a new job, 2 ms, the slice's end
//!    ├─ slice has ended: charge the rest, as after any slice
//!    └─ anything else:   charge what it took so far, queue the job again as preempted;
//!                        whoever picks it lends a core to the same runner again
//! ```
//!
//! To the scheduler this is a slice like any other, cut into pieces. Who owns what: a [`Ticket`] is
//! shared by the runner and by the job in the table; the job's future is the runner's until the
//! ticket has its result.
//!
//! On failure: with all runners taken, or no thread to be had, the slice runs on the worker. Where
//! the kernel does not let us change a thread's claim (no `CAP_SYS_NICE`), runners keep that of any
//! thread, and a paused one competes with the workers until its slice ends. A runner that is
//! preempted while it holds a lock of the host's is waited for asleep, so it gets the core to let
//! go of it. The slice of a tenant that reaches its limit runs on to its end where the core is idle,
//! and is charged: a tenant can be ahead of its limit by one slice, as everywhere.

use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::Waker;
use std::time::Duration;

use insula_scheduler::WorkerId;
use insula_types::Outcome;
use tokio::runtime::Handle;

use super::clock::{self, Claim};
use super::dispatcher::{Pool, Slice, poll_once};
use super::exchange::Exchange;
use super::jobs::Work;

/// Runners of one host, at most.
const RUNNERS_MAX: usize = 64;
/// A runner that has had nothing to do for this long ends, and gives its heap back.
const IDLE_MAX: Duration = Duration::from_secs(5);

/// A slice that a runner has run.
pub(super) struct Ended {
    /// How.
    pub(super) slice: Slice,
    /// CPU time of all of it.
    pub(super) taken_ns: u64,
}

/// One slice on a runner.
pub(super) struct Ticket {
    /// The runner's thread; 0 before it has begun.
    tid: AtomicI32,
    /// The runner's CPU clock when the slice began.
    began_ns: AtomicU64,
    /// What was charged of it so far.
    charged_ns: AtomicU64,
    result: Mutex<Option<Ended>>,
    /// The worker that lends, or lent last, its core.
    lender: AtomicU32,
}

impl Ticket {
    fn new(lender: WorkerId) -> Self {
        let ticket = Self {
            tid: AtomicI32::new(0),
            began_ns: AtomicU64::new(0),
            charged_ns: AtomicU64::new(0),
            result: Mutex::new(None),
            lender: AtomicU32::new(0),
        };
        ticket.lent_by(lender);
        ticket
    }

    /// That worker lends its core, and is to be woken when the slice ends.
    pub(super) fn lent_by(&self, worker: WorkerId) {
        let index = u32::try_from(worker.index()).unwrap_or(0);
        self.lender.store(index, Ordering::SeqCst);
        self.claim(Claim::Normal);
    }

    /// Nobody lends it a core any more.
    pub(super) fn pause(&self) {
        self.claim(Claim::Leftover);
    }

    fn claim(&self, claim: Claim) {
        let tid = self.tid.load(Ordering::Acquire);
        if tid != 0 && clock::claims_can_change() {
            // The runner may have gone on to another slice: it sets its own claim then.
            clock::set_claim(tid, claim);
        }
    }

    fn result(&self) -> MutexGuard<'_, Option<Ended>> {
        self.result.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the slice has ended.
    pub(super) fn has_ended(&self) -> bool {
        self.result().is_some()
    }

    /// CPU time of the slice that was not charged yet, and how it ended if it has.
    pub(super) fn settle(&self) -> (u64, Option<Ended>) {
        // The runner cannot begin another slice while its clock is read.
        let mut result = self.result();
        let ended = result.take();
        let taken = match &ended {
            Some(ended) => ended.taken_ns,
            None => self.taken_so_far(),
        };
        drop(result);
        let charged = self.charged_ns.fetch_max(taken, Ordering::Relaxed);
        (taken.saturating_sub(charged), ended)
    }

    fn taken_so_far(&self) -> u64 {
        match self.tid.load(Ordering::Acquire) {
            0 => 0,
            tid => clock::other_thread_cpu_ns(tid)
                .saturating_sub(self.began_ns.load(Ordering::Relaxed)),
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
    runners: Vec<Option<Sender<Task>>>,
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
}

/// A slice to be run.
pub(super) struct Load {
    pub(super) work: Work,
    pub(super) waker: Waker,
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
        lender: WorkerId,
        home: &Handle,
        load: Load,
    ) -> Result<Arc<Ticket>, Load> {
        let mut bench = self.bench();
        let Some(runner) = bench.idle.pop().or_else(|| bench.start(pool)) else {
            return Err(load);
        };
        let ticket = Arc::new(Ticket::new(lender));
        let task = Task {
            ticket: ticket.clone(),
            load,
            home: home.clone(),
        };
        let Some(sender) = bench.runners.get(runner).and_then(Option::as_ref) else {
            return Err(task.load);
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
        self.tids().retain(|known| *known != tid);
        true
    }

    /// The kernel's ids of all runners.
    pub(super) fn tids(&self) -> MutexGuard<'_, Vec<i32>> {
        self.tids.lock().unwrap_or_else(PoisonError::into_inner)
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
        let name = format!("insula-runner-{number}");
        let thread = std::thread::Builder::new().name(name);
        if let Err(error) = thread.spawn(move || run(&pool, number, &tasks)) {
            tracing::warn!(%error, "a runner could not be started");
            return None;
        }
        match free {
            Some(number) => self.runners[number] = Some(sender),
            None => self.runners.push(Some(sender)),
        }
        Some(number)
    }
}

/// A runner's life.
fn run(pool: &Weak<Pool>, number: usize, tasks: &Receiver<Task>) {
    let tid = rustix::thread::gettid().as_raw_nonzero().get();
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
        let began_ns = clock::thread_cpu_ns();
        ticket.began_ns.store(began_ns, Ordering::Relaxed);
        ticket.tid.store(tid, Ordering::Release);
        let slice = {
            let _home = home.enter();
            poll_once(load.work, load.killed, load.waker, &load.exchange)
        };
        drop(load.exchange);
        let ended_ns = clock::thread_cpu_ns();
        *ticket.result() = Some(Ended {
            slice,
            taken_ns: ended_ns - began_ns,
        });
        let Some(pool) = pool.upgrade() else {
            return;
        };
        let between = began_ns.saturating_sub(last_ns);
        pool.runners.host_ns.fetch_add(between, Ordering::Relaxed);
        last_ns = ended_ns;
        if clock::claims_can_change() {
            // It may have been paused since: what it does next is the host's.
            clock::set_claim(0, Claim::Normal);
        }
        pool.runners.bench().idle.push(number);
        pool.wake_worker(ticket.lender.load(Ordering::SeqCst) as usize);
    }
}
