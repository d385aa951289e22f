//! Whether a request may run, has to wait, or is refused: before any guest code, in constant time.
//!
//! ```text
//!  arrive ─▶ rate ─▶ a place? ── yes ──▶ runs ──▶ departs: its place goes to a waiting request
//!                       └─ no ─▶ may it wait? ── yes ─▶ waits ──────────┘
//!                                     └─ no ─▶ refused: by whose doing, and when to come again
//! ```
//!
//! Places are instances. A tenant has `requests.in_flight` of them, the host as many as its pool.
//! Where seven eighths of the host's are taken, a tenant gets another one only while it has less
//! than its part: that of its shares among the tenants that have requests here and one that may come,
//! or that of its reservation, whichever is more. What becomes free then goes in turn to those who wait below
//! theirs. So a flood leaves places for everybody else, and nobody is shed below its reservation.
//!
//! A request that must wait is refused at once where it would wait past its deadline: the requests
//! before it times what a place took to come free of late. And where the tenant's queue stands, that
//! is, was not empty for a while, waiting is of no use to anybody: those that would wait longer than
//! a moment are refused as they arrive, and those that have when a place comes free. That is CoDel
//! (Nichols and Jacobson, "Controlling Queue Delay", ACM Queue 2012) with its two constants, moved
//! to the arrival as far as it can be foreseen there: a refusal is of most use when it is at once.
//! It leaves nothing for "last in, first out under overload" (Maurer, "Fail at Scale", ACM Queue
//! 2015) to do: no queue is long, and who was let in is served. CoDel's interval is to be about what an answer takes and its target a twentieth of
//! it, so a tenant whose requests take long may have a longer queue.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use insula_scheduler::Nanos;
use insula_types::quantity::Shares;
use insula_types::spec::TenantSpec;
use insula_types::{Outcome, TenantId};

use super::jobs::JobKey;
use crate::engine::Refused;

/// Requests of all tenants that wait for a place, at most.
const WAITING_MAX: usize = 100_000;
/// How long a queue stands before it is called standing: CoDel's interval.
const PATIENCE_MIN: Nanos = Nanos::from_millis(100);
/// What a request may wait in a standing queue, as a part of that: CoDel's target.
const TARGET_PART: u64 = 20;
/// How long a tenant can have been silent for its rate to be saved up: one second's worth.
const RATE_BURST: Nanos = Nanos::from_secs(1);
/// Bounds of what clients are told to wait.
const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(60);
/// A measurement's weight in its moving average is one in so many.
const MEAN: u64 = 8;

/// Why a request was refused before any guest code ran.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Shed {
    /// The tenant has as many requests running and waiting as its bounds allow.
    #[error("{running} requests run and {waiting} wait: the tenant's bounds")]
    TenantFull {
        /// With an instance.
        running: u32,
        /// Without one yet.
        waiting: u32,
        /// When there may be room.
        retry: Duration,
    },
    /// The tenant's requests come faster than its rate allows.
    #[error("the tenant's rate of {per_second} requests per second")]
    TenantRate {
        /// The bound.
        per_second: u32,
        /// When the rate allows one again.
        retry: Duration,
    },
    /// The tenant asks for more than it gets: its queue stands.
    #[error("the tenant's queue stands: another request would wait {wait:?}")]
    TenantBehind {
        /// What it would wait.
        wait: Duration,
    },
    /// It would wait past its own deadline.
    #[error("the request would wait {wait:?}, past its deadline")]
    TooLate {
        /// What it would wait.
        wait: Duration,
    },
    /// All instances of the host are in use.
    #[error("all {places} instances of the host are in use")]
    HostFull {
        /// How many there are.
        places: u32,
        /// When one may be free.
        retry: Duration,
    },
    /// All memory that the tenant may use is in use.
    #[error("the tenant's memory is in use")]
    TenantMemory,
    /// The host's memory is in use, and the tenant has its part.
    #[error("the host's memory is in use")]
    HostMemory,
    /// The tenant is being deleted.
    #[error("the tenant is being deleted")]
    TenantGone,
}

impl Shed {
    /// When the client may try again, in whole seconds; `None` where that is of no use.
    #[must_use]
    pub fn retry_after(&self) -> Option<u64> {
        let after = match *self {
            Self::TenantFull { retry, .. }
            | Self::TenantRate { retry, .. }
            | Self::HostFull { retry, .. } => retry,
            Self::TenantBehind { wait } | Self::TooLate { wait } => wait,
            Self::TenantMemory | Self::HostMemory => RETRY_MIN,
            Self::TenantGone => return None,
        };
        let after = after.clamp(RETRY_MIN, RETRY_MAX);
        Some(after.as_secs() + u64::from(after.subsec_nanos() > 0))
    }
}

impl From<Refused> for Shed {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Limit => Self::TenantMemory,
            Refused::Host => Self::HostMemory,
        }
    }
}

/// What becomes of a request that was not refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Arrival {
    /// It has a place.
    Runs,
    /// It is to [wait](Admission::wait).
    Waits,
}

/// A place came free.
#[derive(Debug)]
pub(super) struct Freed {
    /// The request that has it now.
    pub(super) next: Option<JobKey>,
    /// Requests of the tenant that have waited for too long: no longer waiting.
    pub(super) refused: Vec<JobKey>,
    /// By whose doing.
    pub(super) blame: Outcome,
}

#[derive(Debug)]
struct Waiter {
    key: JobKey,
    since: Nanos,
}

/// What is known of a tenant.
#[derive(Debug)]
struct Tenant {
    spec: TenantSpec,
    /// Requests with a place.
    running: u32,
    /// Oldest first.
    waiting: VecDeque<Waiter>,
    /// Stands in the line of those that the host holds back.
    held: bool,
    /// When the next request may come, at the tenant's rate (generic cell rate algorithm).
    next_arrival: Nanos,
    leaving: bool,
    /// What a request has its place for, on average.
    stay: Nanos,
    /// Since when the queue was never empty.
    standing: Option<Nanos>,
    /// Until when it is taken for standing, once it was.
    behind_until: Nanos,
    /// Since when all places have been taken without one coming free.
    taken: Option<Nanos>,
    /// How long that lasts, on average; zero when that is not known.
    gap: Nanos,
}

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Admission {
    tenants: HashMap<TenantId, Tenant>,
    house: House,
    waiting: usize,
    /// Tenants with waiting requests that the host holds back; each gets its turn.
    held: VecDeque<TenantId>,
}

/// The places of the host.
#[derive(Debug)]
struct House {
    places: u32,
    taken: u32,
    /// Of the scheduler, in millicores.
    capacity: u64,
    /// Shares of all tenants that have requests here.
    active_shares: u64,
}

impl House {
    /// Whether a tenant may have one more place: by its own bound, and by the host's.
    fn has_place(&self, tenant: &Tenant) -> bool {
        if tenant.is_full() || self.taken >= self.places {
            return false;
        }
        let pressed = self.taken >= self.places - self.places / 8;
        !pressed || tenant.running < self.part(tenant)
    }

    /// To be called before a request counts as one of the tenant's.
    fn joins(&mut self, tenant: &Tenant) {
        if tenant.jobs() == 0 {
            self.active_shares += tenant.shares();
        }
    }

    /// To be called when a request has left a tenant.
    fn left(&mut self, tenant: &Tenant) {
        if tenant.jobs() == 0 {
            self.active_shares -= tenant.shares();
        }
    }

    /// A tenant's part of all places.
    fn part(&self, tenant: &Tenant) -> u32 {
        let places = u64::from(self.places);
        // One more may come at any time.
        let newcomer = u64::from(Shares::NORMAL.get());
        let active = self.active_shares.max(tenant.shares()) + newcomer;
        let by_shares = places * tenant.shares() / active;
        let reserved = tenant.spec.cpu.reservation.map_or(0, |rate| rate.get());
        let by_reservation = places * reserved / self.capacity.max(1);
        u32::try_from(by_shares.max(by_reservation).max(1)).unwrap_or(u32::MAX)
    }
}

fn mean(known: Nanos, seen: Nanos) -> Nanos {
    if known == Nanos::ZERO {
        return seen;
    }
    let (known, seen) = (known.as_nanos(), seen.as_nanos());
    Nanos::from_nanos(known - known / MEAN + seen / MEAN)
}

fn length(queue: &VecDeque<Waiter>) -> u32 {
    u32::try_from(queue.len()).unwrap_or(u32::MAX)
}

impl Tenant {
    fn new(spec: TenantSpec) -> Self {
        Self {
            spec,
            running: 0,
            waiting: VecDeque::new(),
            held: false,
            next_arrival: Nanos::ZERO,
            leaving: false,
            stay: Nanos::ZERO,
            standing: None,
            behind_until: Nanos::ZERO,
            taken: None,
            gap: Nanos::ZERO,
        }
    }

    fn jobs(&self) -> u32 {
        self.running.saturating_add(length(&self.waiting))
    }

    /// It has all the places that it may have.
    fn is_full(&self) -> bool {
        self.running >= self.spec.requests.in_flight
    }

    /// By whose doing its requests wait.
    fn blame(&self) -> Outcome {
        if self.is_full() {
            Outcome::TenantOverloaded
        } else {
            Outcome::HostOverloaded
        }
    }

    fn shares(&self) -> u64 {
        u64::from(self.spec.cpu.shares.get())
    }

    /// What one more request would wait, as far as that is known.
    fn wait(&self, at: Nanos) -> Nanos {
        let silent = self.taken.map(|since| at.saturating_sub(since));
        self.gap
            .max(silent.unwrap_or_default())
            .saturating_mul(u64::from(length(&self.waiting)) + 1)
    }

    fn patience(&self) -> Nanos {
        PATIENCE_MIN.max(self.stay.saturating_mul(2))
    }

    fn target(&self) -> Nanos {
        Nanos::from_nanos(self.patience().as_nanos() / TARGET_PART)
    }

    /// Whether the queue was not empty for so long that it is of no use. For as long again as it
    /// refuses anybody for that reason: it is empty now and then because of it.
    fn stands(&self, at: Nanos) -> bool {
        at < self.behind_until
            || self
                .standing
                .is_some_and(|since| at.saturating_sub(since) > self.patience())
    }

    fn stays_behind(&mut self, at: Nanos) {
        self.behind_until = at.saturating_add(self.patience());
    }

    fn check_rate(&mut self, at: Nanos) -> Result<(), Shed> {
        let Some(per_second) = self.spec.requests.per_second else {
            return Ok(());
        };
        let due = self.next_arrival.max(at);
        let latest = at.saturating_add(RATE_BURST);
        if due > latest {
            let retry = due.saturating_sub(latest).as_duration();
            return Err(Shed::TenantRate { per_second, retry });
        }
        let interval = Nanos::from_nanos(1_000_000_000 / u64::from(per_second));
        self.next_arrival = due.saturating_add(interval);
        Ok(())
    }

    /// Whether one more request may wait, before its deadline.
    fn check_queue(&mut self, at: Nanos, deadline: Nanos) -> Result<(), Shed> {
        let wait = self.wait(at);
        // Half, since a guess is wrong now and then: who was let in should not be refused later.
        if self.stands(at) && wait.saturating_mul(2) > self.target() {
            self.stays_behind(at);
            let wait = wait.as_duration();
            return Err(Shed::TenantBehind { wait });
        }
        if at.saturating_add(wait) > deadline {
            let wait = wait.as_duration();
            return Err(Shed::TooLate { wait });
        }
        Ok(())
    }

    fn full(&self, at: Nanos) -> Shed {
        Shed::TenantFull {
            running: self.running,
            waiting: length(&self.waiting),
            retry: self.wait(at).max(self.stay).as_duration(),
        }
    }

    /// A request has a place.
    fn placed(&mut self, at: Nanos) {
        self.running += 1;
        if self.is_full() {
            self.taken.get_or_insert(at);
        }
    }

    /// A place came free, whoever gets it.
    fn departed(&mut self, stayed: Nanos, at: Nanos) {
        self.running -= 1;
        self.stay = mean(self.stay, stayed);
        if let Some(since) = self.taken.take() {
            self.gap = mean(self.gap, at.saturating_sub(since));
        }
    }

    /// Those that have waited for too long, oldest first.
    fn take_overdue(&mut self, at: Nanos) -> Vec<JobKey> {
        if !self.stands(at) {
            return Vec::new();
        }
        let target = self.target();
        let overdue = |waiter: &Waiter| at.saturating_sub(waiter.since) > target;
        let count = self.waiting.iter().take_while(|&w| overdue(w)).count();
        if count > 0 {
            self.stays_behind(at);
        }
        let overdue = self.waiting.drain(..count).map(|waiter| waiter.key);
        overdue.collect()
    }

    /// The request that gets a place: the oldest.
    fn take_next(&mut self, at: Nanos) -> Option<JobKey> {
        let next = self.waiting.pop_front();
        self.shortened();
        let key = next?.key;
        self.placed(at);
        Some(key)
    }

    /// To be called whenever a request has left the queue.
    fn shortened(&mut self) {
        if self.waiting.is_empty() {
            self.standing = None;
        }
    }
}

impl Admission {
    /// `places` instances, on a host whose scheduler divides so many millicores.
    pub(super) fn new(places: u32, capacity: u64) -> Self {
        Self {
            tenants: HashMap::new(),
            house: House {
                places,
                taken: 0,
                capacity,
                active_shares: 0,
            },
            waiting: 0,
            held: VecDeque::new(),
        }
    }

    /// Adds a tenant or changes its bounds.
    pub(super) fn set(&mut self, id: TenantId, spec: &TenantSpec) {
        if let Some(tenant) = self.tenants.get_mut(&id) {
            let before = tenant.shares();
            tenant.spec = spec.clone();
            if tenant.jobs() > 0 {
                self.house.active_shares += tenant.shares();
                self.house.active_shares -= before;
            }
        } else {
            self.tenants.insert(id, Tenant::new(spec.clone()));
        }
    }

    pub(super) fn knows(&self, id: TenantId) -> bool {
        self.tenants.contains_key(&id)
    }

    /// Lets no request of the tenant in any more. `false` when there is no such tenant.
    pub(super) fn leave(&mut self, id: TenantId) -> bool {
        self.tenants
            .get_mut(&id)
            .map(|tenant| tenant.leaving = true)
            .is_some()
    }

    /// Forgets a tenant that was to leave, when nothing of it is left; says whether it did.
    pub(super) fn forget_if_empty(&mut self, id: TenantId) -> bool {
        let gone = |tenant: &Tenant| tenant.leaving && tenant.jobs() == 0;
        let forget = self.tenants.get(&id).is_some_and(gone);
        if forget {
            self.tenants.remove(&id);
        }
        forget
    }

    /// Requests that run or wait.
    pub(super) fn jobs(&self) -> usize {
        self.house.taken as usize + self.waiting
    }

    /// A request has come; it has until `deadline`.
    ///
    /// # Errors
    /// [`Shed`] says by whose doing it is refused.
    pub(super) fn arrive(
        &mut self,
        id: TenantId,
        at: Nanos,
        deadline: Nanos,
    ) -> Result<Arrival, Shed> {
        let tenant = self.tenants.get_mut(&id).ok_or(Shed::TenantGone)?;
        if tenant.leaving {
            return Err(Shed::TenantGone);
        }
        // Those who wait are before it.
        let runs = tenant.waiting.is_empty() && self.house.has_place(tenant);
        if !runs {
            let queued = length(&tenant.waiting);
            if queued >= tenant.spec.requests.queued || self.waiting >= WAITING_MAX {
                return Err(if tenant.is_full() {
                    tenant.full(at)
                } else {
                    Shed::HostFull {
                        places: self.house.places,
                        retry: tenant.stay.as_duration(),
                    }
                });
            }
            tenant.check_queue(at, deadline)?;
        }
        tenant.check_rate(at)?;
        if !runs {
            return Ok(Arrival::Waits);
        }
        self.house.joins(tenant);
        tenant.placed(at);
        self.house.taken += 1;
        Ok(Arrival::Runs)
    }

    /// Puts a request in its tenant's queue, right after [`Admission::arrive`] said so.
    pub(super) fn wait(&mut self, id: TenantId, key: JobKey, at: Nanos) {
        let Some(tenant) = self.tenants.get_mut(&id) else {
            return;
        };
        self.house.joins(tenant);
        tenant.waiting.push_back(Waiter { key, since: at });
        tenant.standing.get_or_insert(at);
        self.waiting += 1;
        self.hold_if_needed(id);
    }

    /// A waiting request goes; says whose doing it is where its deadline has passed.
    pub(super) fn give_up(&mut self, id: TenantId, key: JobKey) -> Outcome {
        let Some(tenant) = self.tenants.get_mut(&id) else {
            return Outcome::TenantOverloaded;
        };
        let place = tenant.waiting.iter().position(|waiter| waiter.key == key);
        if let Some(place) = place {
            tenant.waiting.remove(place);
            tenant.shortened();
            self.waiting -= 1;
            self.house.left(tenant);
        }
        tenant.blame()
    }

    /// A request that had its place for `stayed` has ended.
    pub(super) fn depart(&mut self, id: TenantId, stayed: Nanos, at: Nanos) -> Freed {
        let mut freed = Freed {
            next: None,
            refused: Vec::new(),
            blame: Outcome::TenantOverloaded,
        };
        let Some(tenant) = self.tenants.get_mut(&id) else {
            return freed;
        };
        freed.blame = tenant.blame();
        tenant.departed(stayed, at);
        self.house.taken -= 1;
        if tenant.waiting.is_empty() && self.held.is_empty() {
            self.house.left(tenant);
            return freed;
        }
        freed.refused = tenant.take_overdue(at);
        self.waiting -= freed.refused.len();
        tenant.shortened();
        self.house.left(tenant);
        freed.next = self.next(id, at);
        freed
    }

    /// A request that gets a free place now: one of this tenant, or of another that was held back.
    pub(super) fn next(&mut self, id: TenantId, at: Nanos) -> Option<JobKey> {
        if let Some(key) = self.take(id, at) {
            return Some(key);
        }
        for _ in 0..self.held.len() {
            let held = self.held.pop_front()?;
            if let Some(tenant) = self.tenants.get_mut(&held) {
                tenant.held = false;
            }
            let next = self.take(held, at);
            self.hold_if_needed(held);
            if next.is_some() {
                return next;
            }
        }
        None
    }

    /// When a request that was refused after it had waited may be tried again, in seconds.
    pub(super) fn retry_after(&self, id: TenantId, at: Nanos) -> Option<u64> {
        self.tenants.get(&id)?.full(at).retry_after()
    }

    fn take(&mut self, id: TenantId, at: Nanos) -> Option<JobKey> {
        let tenant = self.tenants.get_mut(&id)?;
        if !self.house.has_place(tenant) {
            return None;
        }
        let key = tenant.take_next(at)?;
        self.waiting -= 1;
        self.house.taken += 1;
        Some(key)
    }

    /// Puts a tenant whose requests wait for the host, not for one another, into the line.
    fn hold_if_needed(&mut self, id: TenantId) {
        if let Some(tenant) = self.tenants.get_mut(&id)
            && !tenant.held
            && !tenant.is_full()
            && !tenant.waiting.is_empty()
        {
            tenant.held = true;
            self.held.push_back(id);
        }
    }
}

#[cfg(test)]
mod tests;
