//! What other threads may know of a worker.

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};

use insula_scheduler::Nanos;
use tokio::runtime::Handle;
use tokio::sync::Notify;

use super::deadlines::Deadlines;

/// After how much work without a pause others may take a worker's jobs. What a request has touched
/// is in its own core's cache: on another one it costs a quarter more.
const ALONE: Nanos = Nanos::from_micros(500);

/// See the module's documentation.
#[derive(Debug, Default)]
pub(super) struct WorkerSlot {
    /// Set under the pool's lock when the worker found nothing to run.
    pub(super) idle: AtomicBool,
    /// A guest is being polled: the worker cannot look at its connections.
    pub(super) in_slice: AtomicBool,
    /// When the worker last began to be busy, in nanoseconds of the pool's clock; 0 while it is not.
    pub(super) busy_since: AtomicU64,
    pub(super) wake: Notify,
    pub(super) deadlines: Mutex<Deadlines>,
    /// CPU time of the worker's thread outside of slices.
    pub(super) host_ns: AtomicU64,
    pub(super) tid: AtomicI32,
    /// The worker's runtime: timers of its guests belong to it.
    pub(super) runtime: OnceLock<Handle>,
    /// The core to which the worker is pinned.
    pub(super) core: OnceLock<usize>,
}

impl WorkerSlot {
    /// It looks for something to do and finds nothing. Under the pool's lock.
    pub(super) fn idles(&self) {
        self.idle.store(true, Ordering::SeqCst);
        self.busy_since.store(0, Ordering::Relaxed);
    }

    pub(super) fn is_busy(&self, at: Nanos) {
        if self.busy_since.load(Ordering::Relaxed) == 0 {
            self.busy_since.store(at.as_nanos(), Ordering::Relaxed);
        }
    }

    /// It has been busy for so long that others should take over some of its jobs.
    pub(super) fn is_behind(&self, at: Nanos) -> bool {
        let since = self.busy_since.load(Ordering::Relaxed);
        since != 0 && at.saturating_sub(Nanos::from_nanos(since)) >= ALONE
    }
}
