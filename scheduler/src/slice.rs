//! Picking and charging slices: the hot half of the [`Scheduler`].
//!
//! A slice's length is known only when it has ended, and other workers pick in
//! the meantime. So a picked tenant is charged one quantum at once, on every
//! tag, and the difference when the slice is charged.

use crate::error::{ChargeError, PickError};
use crate::queue::Lane;
use crate::scheduler::Scheduler;
use crate::tenant::{Life, Tenant};
use crate::units::{JobId, Nanos, TenantId, WorkerId};

/// How far, in quanta, slices picked by reservation may push the start tag
/// beyond virtual time. See [`Scheduler::pick`].
pub(crate) const RESERVATION_DEBT_QUANTA: u64 = 16;

/// The least charge to a tag, so that slices which a coarse clock measured as
/// nothing cannot stop virtual time.
pub(crate) const LEAST_CHARGE: Nanos = Nanos::from_nanos(1);

/// A running slice.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slice {
    pub(crate) slot: u32,
    job: JobId,
    home: WorkerId,
    reserved: bool,
    /// What the pick charged to the start tag: a quantum, or nothing and then
    /// nothing will be.
    share_charged: Option<Nanos>,
    /// What the pick charged to the limit tag.
    pub(crate) limit_charged: Nanos,
}

/// What a worker should do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pick {
    /// Run this job for one slice, then [`Scheduler::charge`] it.
    Run {
        /// Whose job.
        tenant: TenantId,
        /// Which one.
        job: JobId,
        /// Where it would rather run; not the asking worker if that had none
        /// of its own near the front of the tenant's queue.
        home: WorkerId,
    },
    /// There are queued jobs, all held back by their tenants' limits: ask
    /// again then, or when something is enqueued or charged.
    Throttled {
        /// The earliest release.
        until: Nanos,
    },
    /// Nothing is queued.
    Idle,
}

/// How a slice ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SliceEnd {
    /// The job is over, whatever its outcome.
    Finished,
    /// The job waits for something; it comes back through
    /// [`Scheduler::enqueue`] as [`Class::Woken`](crate::Class::Woken).
    Blocked,
    /// The job could go on; it is queued again behind the tenant's other jobs.
    Preempted,
    /// The job could go on, and its turn among the preempted ones is not over: it is queued again
    /// before these. So a job that is long for a slice is done in a few turns, while what it works
    /// on is still in the core's caches.
    Continued,
    /// The slice is not over: the core was taken from it in its middle. It is queued again before
    /// all other jobs of its tenant, so that no more of them are begun than there are workers.
    Paused,
}

/// A slice was charged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Charged {
    /// Whose slice it was; perhaps a removed tenant's.
    pub tenant: TenantId,
    /// Which job's.
    pub job: JobId,
    /// What became of the job.
    pub fate: Fate,
    /// Jobs of all tenants that a worker could run at once.
    pub runnable: usize,
}

/// What became of a job whose slice was charged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is queued again.
    Requeued,
    /// The scheduler has forgotten it: finished or blocked.
    Released,
    /// It was preempted, but its tenant has been removed: the caller must
    /// drop it.
    Orphaned,
}

/// Why a tenant's turn came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    Reservation,
    Shares,
}

impl Scheduler {
    /// What `worker` should run now. Cost: O(log runnable tenants).
    ///
    /// 1. Of the reservations that are due, the one due first (mClock's
    ///    constraint-based phase, OSDI 2010). Only such picks
    ///    advance the reservation tag: time that a tenant gets by its shares
    ///    while the host is quiet is not held against its guarantee later
    ///    (there: the correction of reservation tags in the weight-based phase).
    /// 2. Else the least start tag (SFQ), and virtual time becomes that tag.
    ///
    /// A slice picked by reservation is charged to the start tag as well, so
    /// that reserved time counts against the share; but only while the tag is
    /// within 16 quanta of virtual time. A tenant whose reservation exceeds its
    /// share would else pile up debt for as long as it is guaranteed more than
    /// it is due, and starve on the day that its reservation is lowered.
    pub fn pick(&mut self, worker: WorkerId, now: Nanos) -> Result<Pick, PickError> {
        self.check_worker(worker).map_err(PickError::NoSuchWorker)?;
        if self.slices[worker.index()].is_some() {
            return Err(PickError::SliceOpen(worker));
        }
        self.advance(now);
        let due = self
            .by_reservation
            .least()
            .filter(|&(due, _)| due <= self.now);
        if let Some((_, slot)) = due {
            return Ok(self.start(slot, worker, Turn::Reservation));
        }
        if let Some((_, slot)) = self.by_start.least() {
            return Ok(self.start(slot, worker, Turn::Shares));
        }
        Ok(self
            .next_release()
            .map_or(Pick::Idle, |until| Pick::Throttled { until }))
    }

    fn start(&mut self, slot: u32, worker: WorkerId, turn: Turn) -> Pick {
        let (now, quantum) = (self.now, self.config.quantum);
        let tenant = self.tenants.get_mut(slot);
        tenant.settle(now);
        let Some((job, home)) = tenant.queue.take(&mut self.jobs, worker) else {
            // A tenant in a heap has a queued job; see `place`.
            debug_assert!(false, "a runnable tenant without a job");
            return Pick::Idle;
        };
        let share_charged = match turn {
            Turn::Shares => {
                self.virtual_time = self.virtual_time.max(tenant.start);
                Some(quantum)
            }
            Turn::Reservation => {
                let debt = quantum.saturating_mul(RESERVATION_DEBT_QUANTA);
                let edge = self.virtual_time.after(debt, tenant.slope);
                (tenant.start <= edge).then_some(quantum)
            }
        };
        if let Some(charge) = share_charged {
            tenant.start = tenant.start.after(charge, tenant.slope);
        }
        if let (Turn::Reservation, Some(tag)) = (turn, &mut tenant.reservation) {
            tag.spend(quantum, now);
        }
        let mut limit_charged = Nanos::ZERO;
        if let Some(tag) = &mut tenant.limit {
            tag.spend(quantum, now);
            limit_charged = quantum;
        }
        tenant.running += 1;
        self.queued -= 1;
        self.running += 1;
        let (id, reserved) = (tenant.id, turn == Turn::Reservation);
        self.slices[worker.index()] = Some(Slice {
            slot,
            job,
            home,
            reserved,
            share_charged,
            limit_charged,
        });
        self.place(slot);
        Pick::Run {
            tenant: id,
            job,
            home,
        }
    }

    /// Ends the slice of `worker`: `used` is its measured length, however long.
    /// Cost: O(log runnable tenants).
    pub fn charge(
        &mut self,
        worker: WorkerId,
        used: Nanos,
        end: SliceEnd,
        now: Nanos,
    ) -> Result<Charged, ChargeError> {
        self.check_worker(worker)
            .map_err(ChargeError::NoSuchWorker)?;
        let slice = self.slices[worker.index()]
            .take()
            .ok_or(ChargeError::NoSlice(worker))?;
        self.advance(now);
        let (now, quantum) = (self.now, self.config.quantum);
        let tenant = self.tenants.get_mut(slice.slot);
        tenant.settle(now);
        tenant.running -= 1;
        tenant.note_slice(used, slice.reserved);
        correct_tags(tenant, &slice, used.max(LEAST_CHARGE), quantum);
        self.last_finish = self.last_finish.max(tenant.start);
        let fate = match (end, tenant.life) {
            (SliceEnd::Finished | SliceEnd::Blocked, _) => Fate::Released,
            (_, Life::Leaving) => Fate::Orphaned,
            (SliceEnd::Preempted, Life::Present) => self.requeue(&slice, Lane::Preempted),
            (SliceEnd::Continued, Life::Present) => self.requeue(&slice, Lane::Continued),
            (SliceEnd::Paused, Life::Present) => self.requeue(&slice, Lane::Paused),
        };
        let tenant = self.tenants.get(slice.slot);
        let id = tenant.id;
        let vacant = tenant.life == Life::Leaving && tenant.running == 0;
        self.running -= 1;
        self.totals.charged = self.totals.charged.saturating_add(used);
        self.totals.slices += 1;
        self.place(slice.slot);
        if vacant {
            self.tenants.release(slice.slot);
        }
        self.end_busy_period();
        Ok(Charged {
            tenant: id,
            job: slice.job,
            fate,
            runnable: self.runnable,
        })
    }
}

impl Scheduler {
    /// At the end of a busy period, a clean slate (SFQ, SIGCOMM 1996): nobody
    /// was kept waiting by past service.
    pub(crate) fn end_busy_period(&mut self) {
        if self.queued == 0 && self.running == 0 {
            self.virtual_time = self.virtual_time.max(self.last_finish);
        }
    }

    fn requeue(&mut self, slice: &Slice, lane: Lane) -> Fate {
        let tenant = self.tenants.get_mut(slice.slot);
        tenant
            .queue
            .push(&mut self.jobs, slice.job, slice.home, lane);
        self.queued += 1;
        Fate::Requeued
    }
}

/// Replaces what the pick charged by what was measured.
fn correct_tags(tenant: &mut Tenant, slice: &Slice, measured: Nanos, quantum: Nanos) {
    if let Some(charged) = slice.share_charged {
        tenant.start = tenant
            .start
            .before(charged, tenant.slope)
            .after(measured, tenant.slope);
    }
    if let (true, Some(tag)) = (slice.reserved, &mut tenant.reservation) {
        tag.correct(quantum, measured);
    }
    if let Some(tag) = &mut tenant.limit {
        tag.correct(slice.limit_charged, measured);
    }
}
