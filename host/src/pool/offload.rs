//! Threads for what blocks: files of guests, and names that are looked up for them.
//!
//! ```text
//!  job ── offload(work) ──▶ its tenant's lane ──▶ line ──▶ a thread ── CPU time ──▶ the tenant
//!                              │ 4 at once of one tenant; the rest waits in the lane
//! ```
//!
//! A worker never waits for a disk or a resolver, and no tenant can take all the threads that do.
//! What a thread used for a piece of work is charged to the tenant whose work it was as soon as it is
//! done, and to the scheduler with the job's next slice. The work is done even when its request has
//! ended meanwhile: half a change of a file is nothing that anybody wants.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use insula_types::TenantId;

use super::clock;

/// Threads of one host, at most.
const THREADS_MAX: usize = 32;
/// Pieces of work of one tenant that run at once.
const TENANT_MAX: u32 = 4;
/// A thread that has had nothing to do for this long ends.
const IDLE_MAX: Duration = Duration::from_secs(5);

/// A piece of work.
pub type Piece = Box<dyn FnOnce() + Send>;

/// Whom the time of a piece of work is charged to.
pub trait Payer: Send + Sync {
    /// It took so much CPU time.
    fn pays(&self, cpu_ns: u64);
}

struct Task {
    tenant: TenantId,
    piece: Piece,
    /// `None` for the host itself.
    payer: Option<Arc<dyn Payer>>,
}

/// The work of one tenant.
#[derive(Default)]
struct Lane {
    /// In the line, or on a thread.
    running: u32,
    waiting: VecDeque<Task>,
}

#[derive(Default)]
struct Desk {
    line: VecDeque<Task>,
    lanes: HashMap<TenantId, Lane>,
    threads: usize,
    idle: usize,
    tids: Vec<i32>,
    ended: bool,
}

#[derive(Default)]
struct Shared {
    desk: Mutex<Desk>,
    wake: Condvar,
    /// CPU time of threads that nobody pays for.
    host_ns: AtomicU64,
    /// CPU time of threads that have ended: for work and between it.
    gone_ns: AtomicU64,
}

/// See the module's documentation. Its threads end when it is dropped and the line is empty.
#[derive(Default)]
pub struct Offload {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Offload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Offload").finish_non_exhaustive()
    }
}

impl Shared {
    fn desk(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Offload {
    /// Queues a piece of work of a tenant. With no thread to be had it is dropped undone, which
    /// whoever waits for it can tell.
    pub fn submit(&self, tenant: TenantId, payer: Option<Arc<dyn Payer>>, piece: Piece) {
        let mut desk = self.shared.desk();
        let lane = desk.lanes.entry(tenant).or_default();
        let task = Task {
            tenant,
            piece,
            payer,
        };
        if lane.running >= TENANT_MAX {
            lane.waiting.push_back(task);
            return;
        }
        lane.running += 1;
        desk.line.push_back(task);
        if desk.idle >= desk.line.len() {
            drop(desk);
            self.shared.wake.notify_one();
            return;
        }
        if desk.threads < THREADS_MAX {
            desk.threads += 1;
            drop(desk);
            self.start();
        }
    }

    fn start(&self) {
        let shared = Arc::clone(&self.shared);
        let thread = std::thread::Builder::new().name("insula-offload".to_owned());
        if let Err(error) = thread.spawn(move || serve(&shared)) {
            tracing::warn!(%error, "no thread for what blocks");
            let mut desk = self.shared.desk();
            desk.threads -= 1;
            if desk.threads == 0 {
                desk.line.clear();
                desk.lanes.clear();
            }
        }
    }

    /// The kernel's ids of its threads.
    pub(super) fn tids(&self) -> Vec<i32> {
        self.shared.desk().tids.clone()
    }

    /// CPU time of its threads that have ended.
    pub(super) fn gone_ns(&self) -> u64 {
        self.shared.gone_ns.load(Ordering::Relaxed)
    }

    /// CPU time of its threads that nobody paid for.
    pub(super) fn host_ns(&self) -> u64 {
        self.shared.host_ns.load(Ordering::Relaxed)
    }
}

impl Drop for Offload {
    fn drop(&mut self) {
        self.shared.desk().ended = true;
        self.shared.wake.notify_all();
    }
}

/// A thread's life.
fn serve(shared: &Shared) {
    let tid = rustix::thread::gettid().as_raw_nonzero().get();
    shared.desk().tids.push(tid);
    let mut last_ns = 0;
    while let Some(task) = next(shared) {
        let Task {
            tenant,
            piece,
            payer,
        } = task;
        let began_ns = clock::thread_cpu_ns();
        // Its captured channel goes with it: whoever waits sees that there will be nothing.
        if catch_unwind(AssertUnwindSafe(piece)).is_err() {
            tracing::error!(%tenant, "work for a guest panicked");
        }
        let ended_ns = clock::thread_cpu_ns();
        let used_ns = ended_ns - began_ns;
        match payer {
            Some(payer) => payer.pays(used_ns),
            None => {
                shared.host_ns.fetch_add(used_ns, Ordering::Relaxed);
            }
        }
        let between = began_ns.saturating_sub(last_ns);
        shared.host_ns.fetch_add(between, Ordering::Relaxed);
        last_ns = ended_ns;
        leave(shared, tenant);
    }
    let rest = clock::thread_cpu_ns().saturating_sub(last_ns);
    shared.host_ns.fetch_add(rest, Ordering::Relaxed);
    // In this order: for a moment this thread's time is missing from the host's, which the next
    // reading mends; the other way round it would be counted as the host's for good.
    let own_ns = clock::thread_cpu_ns();
    shared.gone_ns.fetch_add(own_ns, Ordering::Relaxed);
    shared.desk().tids.retain(|known| *known != tid);
}

/// The next piece of work. `None` when the thread is to end; it is off the books then.
fn next(shared: &Shared) -> Option<Task> {
    let mut desk = shared.desk();
    loop {
        if let Some(task) = desk.line.pop_front() {
            return Some(task);
        }
        if desk.ended {
            desk.threads -= 1;
            return None;
        }
        desk.idle += 1;
        let woken = shared.wake.wait_timeout(desk, IDLE_MAX);
        let (woken, timed) = woken.unwrap_or_else(PoisonError::into_inner);
        desk = woken;
        desk.idle -= 1;
        if timed.timed_out() && desk.line.is_empty() {
            desk.threads -= 1;
            return None;
        }
    }
}

/// A piece of a tenant's is done: the next one of its lane stands in line.
fn leave(shared: &Shared, tenant: TenantId) {
    let mut guard = shared.desk();
    let desk = &mut *guard;
    let Some(lane) = desk.lanes.get_mut(&tenant) else {
        return;
    };
    match lane.waiting.pop_front() {
        // This thread is about to look at the line.
        Some(task) => desk.line.push_back(task),
        None => {
            lane.running = lane.running.saturating_sub(1);
            if lane.running == 0 {
                desk.lanes.remove(&tenant);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Instant;

    use super::*;

    #[derive(Default)]
    struct Purse(AtomicU64);

    impl Payer for Purse {
        fn pays(&self, cpu_ns: u64) {
            self.0.fetch_add(cpu_ns, Ordering::SeqCst);
        }
    }

    #[test]
    fn one_tenant_cannot_take_all_threads() {
        let offload = Offload::default();
        let purse = Arc::new(Purse::default());
        let gate = Arc::new(Mutex::new(()));
        let shut = gate.lock().unwrap();
        for _ in 0..100 {
            let gate = Arc::clone(&gate);
            let piece = move || drop(gate.lock());
            offload.submit(TenantId::new(1), Some(purse.clone()), Box::new(piece));
        }
        let (done, wait) = mpsc::channel();
        let piece = move || done.send(()).unwrap();
        offload.submit(TenantId::new(2), Some(purse.clone()), Box::new(piece));
        let within = Duration::from_secs(20);
        assert_eq!(wait.recv_timeout(within), Ok(()));
        assert!(offload.tids().len() <= 5);
        drop(shut);
        let (done, wait) = mpsc::channel();
        let piece = move || done.send(()).unwrap();
        offload.submit(TenantId::new(1), Some(purse), Box::new(piece));
        assert_eq!(wait.recv_timeout(within), Ok(()), "after the others");
    }

    #[test]
    fn the_tenant_pays_for_work_and_a_panic_costs_one_piece() {
        let offload = Offload::default();
        let purse = Arc::new(Purse::default());
        let tenant = TenantId::new(1);
        offload.submit(
            tenant,
            Some(purse.clone()),
            Box::new(|| panic!("as it was told to")),
        );
        let (done, wait) = mpsc::channel();
        let piece = move || {
            let begin = clock::thread_cpu_ns();
            while clock::thread_cpu_ns() - begin < 5_000_000 {}
            done.send(()).unwrap();
        };
        offload.submit(tenant, Some(purse.clone()), Box::new(piece));
        wait.recv_timeout(Duration::from_secs(20)).unwrap();
        // A thread pays after the piece has said so, and lets go of the purse after that; another
        // thread's next piece may come before.
        let patience = Instant::now() + Duration::from_secs(20);
        while Arc::strong_count(&purse) > 1 {
            assert!(Instant::now() < patience, "somebody has not paid");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(purse.0.load(Ordering::SeqCst) >= 5_000_000);
    }
}
