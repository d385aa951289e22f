//! A tenant's limits, held by its services and its machines together.
//!
//! *Memory.* A machine's is promised whole while it runs, and its tenant's services have what is left
//! of the limit: the data plane is told so whenever a machine begins or ends.
//!
//! *CPU.* The scheduler holds services back, the kernel machines, and neither knows of the other. So
//! once a second a tenant's machines are given what its services left of the limit in the last second.
//! Services come first: they answer requests. What they do not use is the machines' a second later,
//! and what they use more is taken from the machines a second later; over a longer time both
//! together use the limit, and not twice.

use std::collections::HashMap;
use std::rc::Rc;
use std::time::Duration;

use insula_types::spec::CpuEnvelope;
use insula_types::{Bytes, MachineId, Millicores, TenantId, TenantName};
use tokio::time::{Instant, MissedTickBehavior};

use super::Control;
use crate::control::problem::Problem;
use crate::messages::ToData;
use crate::state::Tenant;

/// How often the limit is divided anew.
const EVERY: Duration = Duration::from_secs(1);
/// What machines keep of a limit, in percent, whatever services use: enough to shut down.
const LEAST_PERCENT: u64 = 5;

/// Divides until the host ends.
pub(crate) async fn share(control: Rc<Control>) {
    let mut interval = tokio::time::interval(EVERY);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut before: HashMap<TenantId, (Instant, u64)> = HashMap::new();
    loop {
        interval.tick().await;
        let running = running(&control);
        before.retain(|tenant, _| running.contains_key(tenant));
        for (tenant, name) in running {
            let used = control.ledger.borrow().tenant(tenant).total().cpu_ns;
            let now = Instant::now();
            let last = before.insert(tenant, (now, used));
            let Some((at, used_before)) = last else {
                continue;
            };
            let passed = now.duration_since(at);
            let services = millicores(used.saturating_sub(used_before), passed);
            if let Err(problem) = divide(&control, tenant, name, services).await {
                tracing::warn!(%tenant, problem = problem.detail(), "a limit was not divided");
            }
        }
    }
}

/// Tenants with a machine that has a processor.
fn running(control: &Control) -> HashMap<TenantId, TenantName> {
    let book = control.machines.book.borrow();
    let running = book.iter().filter(|(_, entry)| entry.state().has_memory());
    running
        .map(|(_, entry)| (entry.tenant, entry.tenant_name.clone()))
        .collect()
}

fn millicores(cpu_ns: u64, passed: Duration) -> u64 {
    let passed = passed.as_nanos().max(1);
    u64::try_from(u128::from(cpu_ns) * 1_000 / passed).unwrap_or(u64::MAX)
}

/// What is left for machines, of a limit and of what services use.
fn left(limit: u64, services: u64) -> u64 {
    let least = (limit * LEAST_PERCENT / 100).max(1);
    limit.saturating_sub(services).max(least)
}

impl Control {
    /// A tenant's envelope, and what its machines have of it, for the data plane.
    pub(crate) fn envelope(&self, tenant: &Tenant) -> ToData {
        let promised = self.machines.book.borrow().committed(Some(tenant.id));
        ToData::Tenant {
            id: tenant.id,
            name: tenant.name.clone(),
            spec: tenant.spec.clone(),
            // Each machine was admitted; if all together were no size any more, it would be the most.
            promised: Bytes::new(promised).unwrap_or(Bytes::MAX),
        }
    }

    /// Leaves the memory of a machine that has ended to its tenant's services.
    pub(super) fn give_back_memory(self: &Rc<Self>, id: MachineId) {
        let book = self.machines.book.borrow();
        let Some(ended) = book.get(id).filter(|entry| !entry.state().has_memory()) else {
            return;
        };
        let (tenant, background) = (ended.tenant_name.clone(), Rc::clone(self));
        self.spawn(async move {
            // Where the tenant is gone, nobody is left who could use it.
            if let Err(problem) = background.divide_memory(&tenant).await {
                tracing::warn!(%tenant, problem = problem.detail(), "memory was not given back");
            }
        });
    }

    /// Tells the data plane how much of a tenant's memory its machines have now.
    pub(super) async fn divide_memory(&self, tenant: &TenantName) -> Result<(), Problem> {
        // No tenant changes or goes meanwhile.
        let _mutation = self.mutation.lock().await;
        let tenant = tenant.clone();
        let tenant = self.store(move |store| store.tenant(&tenant)).await?;
        self.link.apply(self.envelope(&tenant)).await?;
        Ok(())
    }
}

async fn divide(
    control: &Rc<Control>,
    tenant: TenantId,
    name: TenantName,
    services: u64,
) -> Result<(), Problem> {
    let found = control.store(move |store| store.tenant(&name)).await?;
    let cpu = found.spec.cpu;
    let limit = cpu.limit.map(|limit| left(limit.get(), services));
    let limit = limit.and_then(|limit| Millicores::new(limit).ok());
    let groups = &control.machines.groups;
    let envelope = CpuEnvelope { limit, ..cpu };
    let set = groups.set_tenant(tenant, &envelope);
    set.map_err(|error| Problem::internal(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn together_they_have_the_limit() {
        assert_eq!(left(500, 0), 500);
        assert_eq!(left(500, 200), 300);
        assert_eq!(left(500, 490), 25);
        assert_eq!(left(500, 9_000), 25);
        assert_eq!(left(1, 1), 1);
    }

    #[test]
    fn use_is_measured_over_the_time_that_passed() {
        assert_eq!(millicores(500_000_000, Duration::from_secs(1)), 500);
        assert_eq!(millicores(500_000_000, Duration::from_secs(2)), 250);
        assert_eq!(millicores(u64::MAX, Duration::ZERO), u64::MAX);
    }
}
