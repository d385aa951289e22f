//! What every tenant used since its creation.
//!
//! Deltas from data are added to sums in memory, which the API shows, and to `pending`, which is
//! added to the stored sums every few seconds. A crash loses at most what was pending; sums never
//! go back otherwise.

use std::collections::HashMap;

use insula_types::{ServiceId, TenantId};

use crate::messages::UsageDelta;
use crate::state::machines::MachineTotals;
use crate::state::{StoredUsage, UsageTotals};

/// Sums of one tenant.
#[derive(Debug, Clone, Default)]
pub(crate) struct TenantUsage {
    /// Of services that are gone.
    deleted: UsageTotals,
    services: HashMap<ServiceId, UsageTotals>,
}

impl TenantUsage {
    /// All services, deleted ones too.
    pub(crate) fn total(&self) -> UsageTotals {
        let mut sum = self.deleted;
        for part in self.services.values() {
            sum.add(part);
        }
        sum
    }

    pub(crate) fn service(&self, service: ServiceId) -> UsageTotals {
        self.services.get(&service).copied().unwrap_or_default()
    }
}

/// What is added to the stored sums next.
pub(crate) type Pending = HashMap<(TenantId, ServiceId), UsageTotals>;

#[derive(Debug, Default)]
pub(crate) struct Ledger {
    tenants: HashMap<TenantId, TenantUsage>,
    pending: Pending,
    machines: HashMap<TenantId, MachineTotals>,
    pending_machines: HashMap<TenantId, MachineTotals>,
}

impl Ledger {
    /// Takes what was stored before the start.
    pub(crate) fn load(&mut self, stored: Vec<StoredUsage>) {
        for row in stored {
            let tenant = self.tenants.entry(row.tenant).or_default();
            match row.service {
                Some(service) => tenant.services.entry(service).or_default().add(&row.totals),
                None => tenant.deleted.add(&row.totals),
            }
        }
    }

    /// There is a tenant.
    pub(crate) fn add_tenant(&mut self, tenant: TenantId) {
        self.tenants.entry(tenant).or_default();
    }

    /// There is a service.
    pub(crate) fn add_service(&mut self, tenant: TenantId, service: ServiceId) {
        self.tenants
            .entry(tenant)
            .or_default()
            .services
            .entry(service)
            .or_default();
    }

    /// A service is gone; what it used stays.
    pub(crate) fn retire_service(&mut self, tenant: TenantId, service: ServiceId) {
        if let Some(tenant) = self.tenants.get_mut(&tenant)
            && let Some(sum) = tenant.services.remove(&service)
        {
            tenant.deleted.add(&sum);
        }
    }

    /// A tenant is gone, and all that it used.
    pub(crate) fn remove_tenant(&mut self, tenant: TenantId) {
        self.tenants.remove(&tenant);
        self.pending.retain(|(of, _), _| *of != tenant);
        self.machines.remove(&tenant);
        self.pending_machines.remove(&tenant);
    }

    pub(crate) fn absorb(&mut self, deltas: &[UsageDelta]) {
        for delta in deltas {
            // What a deleted tenant's last requests used is nobody's any more.
            let Some(tenant) = self.tenants.get_mut(&delta.tenant) else {
                continue;
            };
            let part = UsageTotals::from(delta);
            // A service that is not known was deleted while its last requests ran.
            tenant
                .services
                .get_mut(&delta.service)
                .unwrap_or(&mut tenant.deleted)
                .add(&part);
            self.pending
                .entry((delta.tenant, delta.service))
                .or_default()
                .add(&part);
        }
    }

    /// Takes what tenants' machines used before the start.
    pub(crate) fn load_machines(&mut self, stored: Vec<(TenantId, MachineTotals)>) {
        for (tenant, totals) in stored {
            self.machines.entry(tenant).or_default().add(&totals);
        }
    }

    /// A tenant's machine used something.
    pub(crate) fn absorb_machine(&mut self, tenant: TenantId, part: &MachineTotals) {
        self.machines.entry(tenant).or_default().add(part);
        self.pending_machines.entry(tenant).or_default().add(part);
    }

    /// All machines of a tenant, deleted ones too.
    pub(crate) fn machines(&self, tenant: TenantId) -> MachineTotals {
        self.machines.get(&tenant).copied().unwrap_or_default()
    }

    /// Takes what is to be stored of machines.
    pub(crate) fn take_pending_machines(&mut self) -> HashMap<TenantId, MachineTotals> {
        std::mem::take(&mut self.pending_machines)
    }

    /// Puts back what could not be stored.
    pub(crate) fn put_back_machines(&mut self, pending: &HashMap<TenantId, MachineTotals>) {
        for (tenant, part) in pending {
            self.pending_machines.entry(*tenant).or_default().add(part);
        }
    }

    pub(crate) fn tenant(&self, tenant: TenantId) -> TenantUsage {
        self.tenants.get(&tenant).cloned().unwrap_or_default()
    }

    /// Takes what is to be stored.
    pub(crate) fn take_pending(&mut self) -> Pending {
        std::mem::take(&mut self.pending)
    }

    /// Takes what is to be stored by another host.
    pub(crate) fn take_for_another(&mut self) -> Vec<UsageDelta> {
        let pending = self.take_pending();
        let delta = |((tenant, service), sum): ((TenantId, ServiceId), UsageTotals)| UsageDelta {
            tenant,
            service,
            requests: sum.requests,
            fuel: sum.fuel,
            cpu_ns: sum.cpu_ns,
            memory_byte_ms: u64::try_from(sum.memory_byte_ms).unwrap_or(u64::MAX),
            bytes_in: sum.bytes_in,
            bytes_out: sum.bytes_out,
        };
        pending.into_iter().map(delta).collect()
    }

    /// Puts back what could not be stored.
    pub(crate) fn put_back(&mut self, pending: &Pending) {
        for (key, part) in pending {
            self.pending.entry(*key).or_default().add(part);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn delta(tenant: u64, service: u64, fuel: u64) -> UsageDelta {
        UsageDelta {
            tenant: TenantId::new(tenant),
            service: ServiceId::new(service),
            requests: Default::default(),
            fuel,
            cpu_ns: 0,
            memory_byte_ms: 0,
            bytes_in: 0,
            bytes_out: 0,
        }
    }

    #[test]
    fn sums_never_go_back_when_a_service_goes() {
        let tenant = TenantId::new(1);
        let mut ledger = Ledger::default();
        ledger.add_service(tenant, ServiceId::new(1));
        ledger.absorb(&[delta(1, 1, 5), delta(2, 9, 7)]);
        assert_eq!(ledger.tenant(tenant).service(ServiceId::new(1)).fuel, 5);
        ledger.retire_service(tenant, ServiceId::new(1));
        ledger.absorb(&[delta(1, 1, 2)]);
        assert_eq!(ledger.tenant(tenant).total().fuel, 7);
        let pending = ledger.take_pending();
        assert_eq!(pending.len(), 1, "nothing of a tenant that is not there");
        ledger.put_back(&pending);
        ledger.remove_tenant(tenant);
        assert!(ledger.take_pending().is_empty());
    }
}
