//! The state machine: who exists, who is queued. Picking and charging, the hot
//! half, is in [`crate::slice`]; where a tenant stands is decided in
//! [`crate::place`].
//!
//! ```text
//!   enqueue ──▶ tenant's queue ──▶ share heap ───────┐
//!                    ▲    │        reservation heap ─┼─▶ pick ─▶ worker's slice
//!                    │    └──────▶ throttle heap     │             │
//!                    └───────── preempted ◀──────── charge ◀───────┘
//! ```
//!
//! Who owns what: [`Tenants`] owns every tenant; [`JobSlab`] every queued job;
//! the three heaps hold slot numbers of tenants that have queued jobs, and
//! only of those; `slices[w]` holds the job that worker `w` runs.
//!
//! On failure: every operation either refuses before it changed anything, or
//! cannot fail. A worker that dies with a slice open is charged for it by its
//! caller ([`Scheduler::charge`] with `Finished`) or never picks again.

use crate::account::{Account, Totals};
use crate::config::{Config, ConfigError, Params};
use crate::error::{AddError, EnqueueError, NoSuchWorker, ParamsError, SetError, UnknownTenant};
use crate::heap::SlotHeap;
use crate::queue::{JobSlab, Lane};
use crate::slice::Slice;
use crate::tags::{RateTag, Slope, VirtualTime};
use crate::tenant::{Life, Place, Tenant, Tenants};
use crate::units::{JobId, Nanos, TenantId, WorkerId};

/// What kind of work arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// A new request.
    Fresh,
    /// A request that was [`Blocked`](crate::SliceEnd::Blocked) and can go on;
    /// stands in line with the fresh ones.
    Woken,
}

/// A job was queued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Enqueued {
    /// Jobs of all tenants that a worker could run at once: with an idle
    /// worker and this above zero, wake it.
    pub runnable: usize,
    /// Set if this tenant is held back by its limit: until then.
    pub throttled_until: Option<Nanos>,
}

/// A tenant was removed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Removed {
    /// Its queued jobs, handed back: fresh before preempted, oldest first.
    pub jobs: Vec<JobId>,
    /// Its final account, but for `running` slices.
    pub account: Account,
    /// Slices of it that still run. They are to be charged as any other; the
    /// answer to [`Scheduler::charge`] names the tenant.
    pub running: u32,
}

/// The scheduler; see the [crate] documentation.
///
/// `now` is any monotone time. Where callers race and a `now` is older than one
/// seen before, the later one counts.
#[derive(Clone, Debug)]
pub struct Scheduler {
    pub(crate) config: Config,
    pub(crate) now: Nanos,
    pub(crate) tenants: Tenants,
    pub(crate) jobs: JobSlab,
    /// Runnable tenants by start tag.
    pub(crate) by_start: SlotHeap<VirtualTime>,
    /// Runnable tenants with a reservation by the time when it is due.
    pub(crate) by_reservation: SlotHeap<Nanos>,
    /// Throttled tenants by the time when they are released.
    pub(crate) by_release: SlotHeap<Nanos>,
    pub(crate) slices: Vec<Option<Slice>>,
    /// Virtual time: start tag of the last slice picked by shares.
    pub(crate) virtual_time: VirtualTime,
    /// Largest finish tag so far.
    pub(crate) last_finish: VirtualTime,
    pub(crate) queued: usize,
    pub(crate) runnable: usize,
    pub(crate) running: usize,
    pub(crate) reserved_millicores: u64,
    pub(crate) totals: Totals,
}

impl Scheduler {
    /// An empty scheduler.
    pub fn new(config: Config) -> Result<Self, ConfigError> {
        config.check()?;
        Ok(Self {
            config,
            now: Nanos::ZERO,
            tenants: Tenants::default(),
            jobs: JobSlab::new(),
            by_start: SlotHeap::new(),
            by_reservation: SlotHeap::new(),
            by_release: SlotHeap::new(),
            slices: vec![None; config.workers],
            virtual_time: VirtualTime::default(),
            last_finish: VirtualTime::default(),
            queued: 0,
            runnable: 0,
            running: 0,
            reserved_millicores: 0,
            totals: Totals::default(),
        })
    }

    /// Adds a tenant with an empty queue, no debts, and its whole burst.
    pub fn add_tenant(
        &mut self,
        tenant: TenantId,
        params: Params,
        now: Nanos,
    ) -> Result<(), AddError> {
        self.advance(now);
        if self.tenants.slot(tenant).is_some() {
            return Err(AddError::Exists(tenant));
        }
        if self.tenants.len() >= self.config.tenants_max as usize {
            return Err(AddError::TooMany {
                limit: self.config.tenants_max,
            });
        }
        self.check_params(params, 0).map_err(AddError::Params)?;
        let mut fresh = Tenant::new(tenant, params, self.virtual_time, self.now);
        fresh.reservation = self.reservation_tag(params);
        fresh.limit = self.limit_tag(params);
        self.reserved_millicores += reserved(params);
        self.tenants.insert(fresh);
        Ok(())
    }

    /// Changes a tenant's parameters at once. What the tenant is ahead or
    /// behind, counted in service, stays: of its share (Stoica et al., RTSS
    /// 1996), of its reservation, of its limit up to the new burst.
    pub fn set_params(
        &mut self,
        tenant: TenantId,
        params: Params,
        now: Nanos,
    ) -> Result<(), SetError> {
        self.advance(now);
        let Some(slot) = self.tenants.slot(tenant) else {
            return Err(SetError::Unknown(UnknownTenant(tenant)));
        };
        let old = self.tenants.get(slot).params;
        self.check_params(params, reserved(old))
            .map_err(SetError::Params)?;
        let reservation = self.reservation_tag(params);
        let limit = self.limit_tag(params);
        let (now, virtual_time) = (self.now, self.virtual_time);
        let changed = self.tenants.get_mut(slot);
        changed.settle(now);
        let slope = Slope::of(params.shares);
        changed.start = changed.start.rescaled(virtual_time, changed.slope, slope);
        changed.slope = slope;
        changed.reservation = carried(changed.reservation, reservation, now);
        if changed.limit.is_none() && limit.is_some() {
            // Slices that run already were not charged to this limit.
            for slice in self
                .slices
                .iter_mut()
                .flatten()
                .filter(|slice| slice.slot == slot)
            {
                slice.limit_charged = Nanos::ZERO;
            }
        }
        changed.limit = carried(changed.limit, limit, now);
        changed.params = params;
        self.reserved_millicores = self.reserved_millicores - reserved(old) + reserved(params);
        self.place(slot);
        Ok(())
    }

    /// Removes a tenant. Its id may be used again at once.
    pub fn remove_tenant(
        &mut self,
        tenant: TenantId,
        now: Nanos,
    ) -> Result<Removed, UnknownTenant> {
        self.advance(now);
        let slot = self.tenants.slot(tenant).ok_or(UnknownTenant(tenant))?;
        let now = self.now;
        let gone = self.tenants.get_mut(slot);
        gone.settle(now);
        let account = gone.account(now);
        let jobs = gone.queue.drain(&mut self.jobs);
        let running = gone.running;
        gone.life = Life::Leaving;
        self.reserved_millicores -= reserved(gone.params);
        self.queued -= jobs.len();
        self.tenants.forget_id(tenant);
        self.place(slot);
        if running == 0 {
            self.tenants.release(slot);
        }
        Ok(Removed {
            jobs,
            account,
            running,
        })
    }

    /// Queues a job. `home` is the worker on which it would rather run.
    /// Cost: O(log tenants) when it is the tenant's first, else O(1).
    pub fn enqueue(
        &mut self,
        tenant: TenantId,
        job: JobId,
        home: WorkerId,
        class: Class,
        now: Nanos,
    ) -> Result<Enqueued, EnqueueError> {
        self.advance(now);
        let slot = self
            .tenants
            .slot(tenant)
            .ok_or(EnqueueError::Unknown(UnknownTenant(tenant)))?;
        self.check_worker(home)
            .map_err(EnqueueError::NoSuchWorker)?;
        if self.queued >= self.config.queued_max as usize {
            return Err(EnqueueError::Full {
                limit: self.config.queued_max,
            });
        }
        let now = self.now;
        let entry = self.tenants.get_mut(slot);
        entry.settle(now);
        if entry.is_asleep() {
            // It slept: neither its share (SFQ) nor a reservation
            // (mClock) is saved up.
            entry.start = entry.start.max(self.virtual_time);
            if let Some(tag) = &mut entry.reservation {
                tag.forget_before(now);
            }
        }
        let lane = match class {
            Class::Fresh | Class::Woken => Lane::Fresh,
        };
        entry.queue.push(&mut self.jobs, job, home, lane);
        self.queued += 1;
        self.place(slot);
        let throttled_until = match self.tenants.get(slot).place {
            Place::Throttled { until } => Some(until),
            Place::Off | Place::Runnable => None,
        };
        Ok(Enqueued {
            runnable: self.runnable,
            throttled_until,
        })
    }

    /// Takes a queued job out again; says whether it was queued. Cost: O(jobs
    /// queued by that tenant). A running job is not queued: stop it, and charge
    /// it `Finished`.
    pub fn cancel(&mut self, tenant: TenantId, job: JobId, now: Nanos) -> bool {
        self.advance(now);
        let Some(slot) = self.tenants.slot(tenant) else {
            return false;
        };
        let now = self.now;
        let entry = self.tenants.get_mut(slot);
        entry.settle(now);
        let found = entry.queue.cancel(&mut self.jobs, job);
        if found {
            self.queued -= 1;
            self.place(slot);
        }
        found
    }

    /// Releases the tenants whose throttling has ended by `now`, and returns
    /// [`Scheduler::runnable`]. For the timer that [`Scheduler::next_release`]
    /// armed; every other operation does it by itself.
    pub fn tick(&mut self, now: Nanos) -> usize {
        self.advance(now);
        self.runnable
    }

    pub(crate) fn check_worker(&self, worker: WorkerId) -> Result<(), NoSuchWorker> {
        let workers = self.config.workers;
        if worker.index() < workers {
            Ok(())
        } else {
            Err(NoSuchWorker { worker, workers })
        }
    }

    fn check_params(&self, params: Params, own_millicores: u64) -> Result<(), ParamsError> {
        let Some(asked) = params.reservation else {
            return Ok(());
        };
        if let Some(limit) = params.limit.filter(|&limit| limit < asked) {
            return Err(ParamsError::ReservationAboveLimit {
                reservation: asked,
                limit,
            });
        }
        let capacity = 1_000 * self.config.workers as u64;
        let free = capacity - (self.reserved_millicores - own_millicores);
        if u64::from(asked.get()) > free {
            let free_millicores = u32::try_from(free).unwrap_or(u32::MAX);
            return Err(ParamsError::Overcommitted {
                asked,
                free_millicores,
            });
        }
        Ok(())
    }

    fn reservation_tag(&self, params: Params) -> Option<RateTag> {
        let window = self.config.reservation_window;
        params
            .reservation
            .map(|rate| RateTag::reservation(rate, window, self.now))
    }

    fn limit_tag(&self, params: Params) -> Option<RateTag> {
        let burst = self.config.limit_burst;
        params
            .limit
            .map(|rate| RateTag::limit(rate, burst, self.now))
    }
}

fn reserved(params: Params) -> u64 {
    params.reservation.map_or(0, |rate| u64::from(rate.get()))
}

fn carried(old: Option<RateTag>, new: Option<RateTag>, now: Nanos) -> Option<RateTag> {
    match (old, new) {
        (Some(old), Some(new)) => Some(old.carried_into(new, now)),
        (_, new) => new,
    }
}
