//! Looking at the [`Scheduler`] without changing it.

use crate::account::{Account, Totals};
use crate::config::Params;
use crate::scheduler::Scheduler;
use crate::units::{Nanos, TenantId};

impl Scheduler {
    /// Queued jobs that a worker could run at the last `now` seen: those not
    /// held back by a limit.
    pub const fn runnable(&self) -> usize {
        self.runnable
    }

    /// All queued jobs, held back or not.
    pub const fn queued_total(&self) -> usize {
        self.queued
    }

    /// A tenant's queued jobs.
    pub fn queued(&self, tenant: TenantId) -> Option<usize> {
        self.tenants
            .slot(tenant)
            .map(|slot| self.tenants.get(slot).queue.len() as usize)
    }

    /// A tenant's running slices.
    pub fn running(&self, tenant: TenantId) -> Option<usize> {
        self.tenants
            .slot(tenant)
            .map(|slot| self.tenants.get(slot).running as usize)
    }

    /// When the next throttled tenant is released.
    pub fn next_release(&self) -> Option<Nanos> {
        self.by_release.least().map(|(until, _)| until)
    }

    /// A tenant's parameters.
    pub fn params(&self, tenant: TenantId) -> Option<Params> {
        self.tenants
            .slot(tenant)
            .map(|slot| self.tenants.get(slot).params)
    }

    /// A tenant's totals as of `now`. A running slice counts when it is charged.
    pub fn account(&self, tenant: TenantId, now: Nanos) -> Option<Account> {
        let now = self.now.max(now);
        self.tenants
            .slot(tenant)
            .map(|slot| self.tenants.get(slot).account(now))
    }

    /// Totals over all tenants there ever were.
    pub const fn totals(&self) -> Totals {
        self.totals
    }

    /// Sum of the present tenants' reservations, in millicores.
    pub const fn reserved_millicores(&self) -> u64 {
        self.reserved_millicores
    }
}
