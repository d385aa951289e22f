//! One tenant's state and the table of all of them.
//!
//! ```text
//!            first job                       tag due
//!   Off ───────────────────▶ Runnable ◀──────────────── Throttled
//!    ▲                        │    │                      ▲  │
//!    │      last job taken    │    │   limit tag ahead    │  │
//!    └────────────────────────┘    └──────────────────────┘  │
//!    └───────────────────────────────────────────────────────┘ last job cancelled
//! ```
//!
//! `Off` means that no job is queued; jobs of the tenant may still be running.
//! The table owns the tenants; the heaps in the scheduler hold slot numbers.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use crate::account::Account;
use crate::config::Params;
use crate::queue::JobQueue;
use crate::tags::{RateTag, Slope, VirtualTime};
use crate::units::{Nanos, TenantId};

/// Where a tenant stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Nothing is queued: in no heap, costs nothing.
    Off,
    /// In the share heap, and in the reservation heap if it has one.
    Runnable,
    /// In the throttle heap until then.
    Throttled { until: Nanos },
}

/// Whether the tenant still exists for the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Life {
    Present,
    /// Removed, but slices of it are still running.
    Leaving,
}

#[derive(Clone, Debug)]
pub(crate) struct Tenant {
    pub(crate) id: TenantId,
    pub(crate) life: Life,
    pub(crate) params: Params,
    pub(crate) slope: Slope,
    /// Start tag of the next slice (Goyal et al., SIGCOMM 1996).
    pub(crate) start: VirtualTime,
    pub(crate) reservation: Option<RateTag>,
    pub(crate) limit: Option<RateTag>,
    pub(crate) queue: JobQueue,
    pub(crate) running: u32,
    pub(crate) place: Place,
    /// How many of the scheduler's runnable jobs are this tenant's.
    pub(crate) counted: u32,
    account: Account,
    /// Up to when the waiting integrals of `account` are complete.
    settled: Nanos,
}

impl Tenant {
    pub(crate) fn new(id: TenantId, params: Params, start: VirtualTime, now: Nanos) -> Self {
        Self {
            id,
            life: Life::Present,
            params,
            slope: Slope::of(params.shares),
            start,
            reservation: None,
            limit: None,
            queue: JobQueue::new(),
            running: 0,
            place: Place::Off,
            counted: 0,
            account: Account::default(),
            settled: now,
        }
    }

    /// Brings the waiting integrals up to `now`. Must come before any change of
    /// place or queue length. A throttled tenant stops being throttled at its
    /// release time, whenever the scheduler gets to notice.
    pub(crate) fn settle(&mut self, now: Nanos) {
        let jobs = u64::from(self.queue.len());
        if jobs > 0 && now > self.settled {
            let released = match self.place {
                Place::Throttled { until } => until.max(self.settled).min(now),
                Place::Off | Place::Runnable => self.settled,
            };
            let held = released.saturating_sub(self.settled).saturating_mul(jobs);
            let ready = now.saturating_sub(released).saturating_mul(jobs);
            self.account.throttled = self.account.throttled.saturating_add(held);
            self.account.waited = self.account.waited.saturating_add(ready);
        }
        self.settled = self.settled.max(now);
    }

    /// It has no job, queued or running.
    pub(crate) fn is_asleep(&self) -> bool {
        self.queue.len() == 0 && self.running == 0
    }

    pub(crate) fn note_slice(&mut self, used: Nanos, reserved: bool) {
        self.account.charged = self.account.charged.saturating_add(used);
        self.account.slices += 1;
        if reserved {
            self.account.charged_reserved = self.account.charged_reserved.saturating_add(used);
        }
    }

    /// The account as of `now`.
    pub(crate) fn account(&self, now: Nanos) -> Account {
        let mut copy = self.clone();
        copy.settle(now);
        copy.account
    }
}

/// All tenants, by the caller's id and by slot.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tenants {
    by_id: HashMap<TenantId, u32, BuildHasherDefault<Mix>>,
    slots: Vec<Tenant>,
    free: Vec<u32>,
}

impl Tenants {
    pub(crate) fn slot(&self, id: TenantId) -> Option<u32> {
        self.by_id.get(&id).copied()
    }

    pub(crate) fn get(&self, slot: u32) -> &Tenant {
        &self.slots[slot as usize]
    }

    pub(crate) fn get_mut(&mut self, slot: u32) -> &mut Tenant {
        &mut self.slots[slot as usize]
    }

    /// Slots in use, leaving tenants included.
    pub(crate) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    #[expect(
        clippy::cast_possible_truncation,
        reason = "the caller keeps the number of slots within Config::tenants_max, a u32"
    )]
    pub(crate) fn insert(&mut self, tenant: Tenant) -> u32 {
        let id = tenant.id;
        let slot = if let Some(slot) = self.free.pop() {
            self.slots[slot as usize] = tenant;
            slot
        } else {
            self.slots.push(tenant);
            (self.slots.len() - 1) as u32
        };
        self.by_id.insert(id, slot);
        slot
    }

    /// The id is free for another tenant from now on; the slot is not.
    pub(crate) fn forget_id(&mut self, id: TenantId) {
        self.by_id.remove(&id);
    }

    pub(crate) fn release(&mut self, slot: u32) {
        self.free.push(slot);
    }
}

/// Hasher for ids that the host itself gives out: no defence against chosen
/// keys is needed, and the standard one costs a tenth of a pick. Finaliser of
/// splitmix64 (Steele, Lea, Flood, OOPSLA 2014).
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Mix(u64);

impl Hasher for Mix {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }

    fn write_u64(&mut self, value: u64) {
        let mut mixed = self
            .0
            .wrapping_add(value)
            .wrapping_add(0x9e37_79b9_7f4a_7c15);
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        self.0 = mixed ^ (mixed >> 31);
    }
}
