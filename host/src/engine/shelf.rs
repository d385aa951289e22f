//! Instances that wait for the next request of their service.
//!
//! A service may say that one instance serves several requests, one after the other
//! (`"reuse":{"requests":128}`): it gives up that no request sees what another left in memory, and
//! saves what making an instance costs. Other services and other tenants are as far away as ever: a
//! shelf belongs to one version of one service as it was last written, and goes with it.
//!
//! ```text
//!   take ──▶ request ──▶ ended well, fewer than `requests` ──▶ put ──┐
//!     ▲                        └── trap, timeout, cancelled, or it    │
//!     │                            still holds a request's things: gone │
//!     └──────────────── newest first ◀───────────────────────────────┘
//!                         older than [`IDLE_MAX`]: swept
//! ```
//!
//! What waits is on its tenant's account: its memory counts against the tenant's limit, and its
//! byte-seconds are those of the next request it serves. It waits only while the tenant and the
//! host have room, and no more wait on the host than [`Room`] has places.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use insula_types::spec::Reuse;
use wasmtime::Store;
use wasmtime_wasi_http::p2::bindings::Proxy;

use super::guest::Guest;

/// How long an instance waits for its next request.
const IDLE_MAX: Duration = Duration::from_secs(2);

/// How many instances may wait on the host: the pool has these places beside those of instances
/// that run.
#[derive(Debug)]
pub struct Room(AtomicU32);

impl Room {
    /// So many.
    #[must_use]
    pub fn new(places: u32) -> Arc<Self> {
        Arc::new(Self(AtomicU32::new(places)))
    }

    fn take(&self) -> bool {
        let one_less = |places: u32| places.checked_sub(1);
        let taken = self
            .0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less);
        taken.is_ok()
    }

    fn give_back(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// An instance between two requests.
pub(super) struct Idle {
    pub(super) store: Store<Guest>,
    pub(super) proxy: Proxy,
    /// Requests served.
    pub(super) served: u32,
    since: Instant,
}

/// See the module's documentation.
pub struct Shelf {
    reuse: Reuse,
    room: Arc<Room>,
    idle: Mutex<Vec<Idle>>,
}

impl std::fmt::Debug for Shelf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shelf")
            .field("reuse", &self.reuse)
            .finish_non_exhaustive()
    }
}

impl Shelf {
    /// An empty one.
    #[must_use]
    pub const fn new(reuse: Reuse, room: Arc<Room>) -> Self {
        let idle = Mutex::new(Vec::new());
        Self { reuse, room, idle }
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Idle>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The instance that has waited for the shortest time: its memory is in the caches.
    pub(super) fn take(&self) -> Option<Idle> {
        let taken = self.idle().pop()?;
        self.room.give_back();
        Some(taken)
    }

    /// Keeps an instance that has `served` so many requests, if it may serve another and there is
    /// room for it.
    pub(super) fn put(&self, mut store: Store<Guest>, proxy: Proxy, served: u32) {
        let guest = store.data_mut();
        let fit = served < self.reuse.requests.get() && guest.is_clean() && guest.memory.has_room();
        if !fit || !self.room.take() {
            return;
        }
        store.data_mut().rest();
        self.idle().push(Idle {
            store,
            proxy,
            served,
            since: Instant::now(),
        });
    }

    /// Ends what has waited for too long.
    pub fn sweep(&self, now: Instant) {
        let mut idle = self.idle();
        let old = |waiting: &Idle| now.saturating_duration_since(waiting.since) >= IDLE_MAX;
        // The newest are at the end.
        let count = idle.iter().take_while(|waiting| old(waiting)).count();
        let swept: Vec<Idle> = idle.drain(..count).collect();
        drop(idle);
        for waiting in swept {
            self.room.give_back();
            drop(waiting);
        }
    }
}

impl Drop for Shelf {
    fn drop(&mut self) {
        for _ in self.idle().iter() {
            self.room.give_back();
        }
    }
}
