//! Work of a tenant that is no job: what a worker does for the tenant's
//! connections. It belongs to that worker, so that it cannot be queued for any
//! of them; but it has its turn, and its price, as a slice has.
//!
//! ```text
//!   aside ─▶ Due ─▶ some of it is done ─▶ charge_aside ─▶ aside …
//!        └─▶ Ahead, Throttled: later
//! ```

use crate::error::UnknownTenant;
use crate::scheduler::Scheduler;
use crate::slice::{LEAST_CHARGE, RESERVATION_DEBT_QUANTA};
use crate::tags::VirtualTime;
use crate::tenant::Tenant;
use crate::units::{Nanos, TenantId};

/// Whether it is a tenant's turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aside {
    /// A job of the tenant that came now would be picked.
    Due,
    /// Others' queued jobs come first.
    Ahead,
    /// Its limit holds the tenant back.
    Throttled {
        /// Until then.
        until: Nanos,
    },
}

impl Scheduler {
    /// Whether work beside jobs is in its turn, by the rules of [`Scheduler::pick`].
    /// Cost: O(1).
    pub fn aside(&mut self, tenant: TenantId, now: Nanos) -> Result<Aside, UnknownTenant> {
        self.advance(now);
        let slot = self.tenants.slot(tenant).ok_or(UnknownTenant(tenant))?;
        let asking = self.tenants.get(slot);
        let release = asking.limit.map_or(Nanos::ZERO, |tag| tag.due());
        if release > self.now {
            return Ok(Aside::Throttled { until: release });
        }
        let due = self.is_due(asking);
        let others_due = (self.by_reservation.least())
            .is_some_and(|(due, other)| other != slot && due <= self.now);
        let others_before = (self.by_start.least())
            .is_some_and(|(start, other)| other != slot && start < self.effective_start(asking));
        Ok(if due || !(others_due || others_before) {
            Aside::Due
        } else {
            Aside::Ahead
        })
    }

    /// Charges work beside jobs: `used` is its measured length. Work that was
    /// [`Aside::Ahead`] may be charged too, where a worker had nothing else to do.
    /// Cost: O(log runnable tenants).
    pub fn charge_aside(
        &mut self,
        tenant: TenantId,
        used: Nanos,
        now: Nanos,
    ) -> Result<(), UnknownTenant> {
        self.advance(now);
        let slot = self.tenants.slot(tenant).ok_or(UnknownTenant(tenant))?;
        let (now, cost) = (self.now, used.max(LEAST_CHARGE));
        let charged = self.tenants.get(slot);
        let reserved = self.is_due(charged);
        let start = self.effective_start(charged);
        if !reserved {
            // As in a pick, where nobody is before it.
            let first = (self.by_start.least()).map_or(start, |(least, _)| least.min(start));
            self.virtual_time = self.virtual_time.max(first);
        }
        let debt = self.config.quantum.saturating_mul(RESERVATION_DEBT_QUANTA);
        let virtual_time = self.virtual_time;
        let charged = self.tenants.get_mut(slot);
        charged.settle(now);
        charged.start = start;
        if !reserved || start <= virtual_time.after(debt, charged.slope) {
            charged.start = start.after(cost, charged.slope);
        }
        if let (true, Some(tag)) = (reserved, &mut charged.reservation) {
            tag.spend(cost, now);
        }
        if let Some(tag) = &mut charged.limit {
            tag.spend(cost, now);
        }
        charged.note_slice(used, reserved);
        self.last_finish = self.last_finish.max(charged.start);
        self.totals.charged = self.totals.charged.saturating_add(used);
        self.totals.slices += 1;
        self.place(slot);
        self.end_busy_period();
        Ok(())
    }

    /// What its start tag would be if it came now: sleep earns nothing.
    fn effective_start(&self, tenant: &Tenant) -> VirtualTime {
        if tenant.is_asleep() {
            tenant.start.max(self.virtual_time)
        } else {
            tenant.start
        }
    }

    /// Whether its reservation is due. One that sleeps has none left over from before.
    fn is_due(&self, tenant: &Tenant) -> bool {
        tenant.reservation.is_some_and(|mut tag| {
            if tenant.is_asleep() {
                tag.forget_before(self.now);
            }
            tag.due() <= self.now
        })
    }
}
