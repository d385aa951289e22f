//! The data plane's families.
//!
//! ```text
//!  DataMetrics ── host: CPU of our own, workers, what reached no tenant
//!      │
//!      └─ tenants (one lock, taken to find a handle, never to count)
//!           ├─ TenantMetrics   CPU, memory, refusals, bytes, log drops
//!           └─ services ── ServiceMetrics   requests, durations, starts, fuel, instances
//! ```
//!
//! Handles are resolved once, when a route table is built, and kept beside the route; counting is
//! then additions to atomics, without a lock, a look-up or an allocation. A handle whose tenant or
//! service was removed still counts, into cells that no page shows any more; the same name added
//! again gets new cells and starts from 0. So after a removal a handle must not be looked up by
//! name for work that began before it.
//!
//! A tenant's CPU and memory series of kind `wasm` exist from the first look-up of its handle, so
//! that `rate()` sees the first increase. Everything else exists once it is not nothing: an
//! outcome once a request ended so, a service once it served, kind `vm` once a machine counted.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use insula_types::{Outcome, ServiceName, TenantName};

use crate::cells::{Count, Histogram, Integral};
use crate::labels::{Direction, InstanceState, Kind, MemoryRefusal, OutboundResult, ShedReason};

mod expose;

/// Services of one tenant that get series of their own, unless said otherwise; the rest share
/// [`OTHER_SERVICE`] (threats T19).
pub const SERVICES_PER_TENANT_MAX: usize = 1_024;

/// The service label of the services beyond the cap; no service can have this name.
pub const OTHER_SERVICE: &str = "_other";

/// Bounds of `insula_request_duration_seconds`, in nanoseconds: 100 µs to 60 s.
static REQUEST_BOUNDS: [u64; 18] = [
    100_000,
    250_000,
    500_000,
    1_000_000,
    2_500_000,
    5_000_000,
    10_000_000,
    25_000_000,
    50_000_000,
    100_000_000,
    250_000_000,
    500_000_000,
    1_000_000_000,
    2_500_000_000,
    5_000_000_000,
    10_000_000_000,
    30_000_000_000,
    60_000_000_000,
];

/// Bounds of `insula_instance_start_seconds`, in nanoseconds: 5 µs to 1 s.
static START_BOUNDS: [u64; 14] = [
    5_000,
    10_000,
    20_000,
    50_000,
    100_000,
    200_000,
    500_000,
    1_000_000,
    2_000_000,
    5_000_000,
    10_000_000,
    50_000_000,
    100_000_000,
    1_000_000_000,
];

/// The data plane's metrics; clones share the same numbers.
#[derive(Debug, Clone)]
pub struct DataMetrics {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    services_per_tenant_max: usize,
    host_cpu_ns: Count,
    host_workers: AtomicU64,
    guest_memory: AtomicU64,
    guest_memory_budget: AtomicU64,
    unrouted: Unrouted,
    tenants: RwLock<BTreeMap<TenantName, TenantEntry>>,
}

#[derive(Debug, Default)]
struct TenantEntry {
    metrics: Arc<TenantMetrics>,
    services: BTreeMap<ServiceName, Arc<ServiceMetrics>>,
    /// Shared by the services beyond the cap.
    other: Option<Arc<ServiceMetrics>>,
}

/// What one tenant does and uses, over all its services.
#[derive(Debug)]
pub struct TenantMetrics {
    cpu_ns: [Count; 2],
    cpu_wait_ns: [Count; 2],
    cpu_throttled_ns: [Count; 2],
    memory_bytes: [AtomicI64; 2],
    memory_integral: [Integral; 2],
    /// [`NO_LIMIT`] while there is none.
    memory_limit_bytes: AtomicU64,
    memory_refusals: [Count; MemoryRefusal::ALL.len()],
    /// [`NO_LIMIT`] while there is no volume.
    storage_bytes: AtomicU64,
    /// [`NO_LIMIT`] while there is none.
    storage_limit_bytes: AtomicU64,
    has_machines: AtomicBool,
    log_lines_dropped: Count,
    edge: Edge,
    outbound: [Count; OutboundResult::ALL.len()],
    outbound_bytes: [Count; Direction::ALL.len()],
}

/// The memory limit of a tenant of which none is known.
const NO_LIMIT: u64 = u64::MAX;

/// What one service does.
#[derive(Debug)]
pub struct ServiceMetrics {
    requests: [Count; Outcome::ALL.len()],
    fuel: Count,
    duration: Histogram<{ REQUEST_BOUNDS.len() }>,
    start: Histogram<{ START_BOUNDS.len() }>,
    instances: [Presence; InstanceState::ALL.len()],
}

/// Requests and bytes that never belonged to a tenant: an unknown host, a malformed head, a
/// connection refused. Exposed under empty labels, which Prometheus reads as absent ones.
#[derive(Debug, Default)]
pub struct Unrouted {
    requests: [Count; Outcome::ALL.len()],
    edge: Edge,
}

/// What the ingress counts, for a tenant or for nobody.
#[derive(Debug, Default)]
struct Edge {
    shed: [Count; ShedReason::ALL.len()],
    bytes: [Count; Direction::ALL.len()],
}

/// How many are in a state: those who came less those who went.
#[derive(Debug, Default)]
struct Presence {
    entered: Count,
    left: Count,
}

impl Default for DataMetrics {
    fn default() -> Self {
        Self::new()
    }
}

impl DataMetrics {
    /// Metrics of a data plane that has done nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self::with_services_max(SERVICES_PER_TENANT_MAX)
    }

    /// The same with another cap than [`SERVICES_PER_TENANT_MAX`].
    #[must_use]
    pub fn with_services_max(services_per_tenant_max: usize) -> Self {
        Self {
            inner: Arc::new(Inner {
                services_per_tenant_max,
                host_cpu_ns: Count::default(),
                host_workers: AtomicU64::new(0),
                guest_memory: AtomicU64::new(0),
                guest_memory_budget: AtomicU64::new(0),
                unrouted: Unrouted::default(),
                tenants: RwLock::default(),
            }),
        }
    }

    /// The handle of a tenant, which is added if it is new.
    #[must_use]
    pub fn tenant(&self, tenant: &TenantName) -> Arc<TenantMetrics> {
        if let Some(entry) = self.read().get(tenant) {
            return Arc::clone(&entry.metrics);
        }
        Arc::clone(&self.write().entry(tenant.clone()).or_default().metrics)
    }

    /// The handle of a service, which is added if it is new, with its tenant.
    ///
    /// Costs about 600 bytes; no series until the service has served.
    #[must_use]
    pub fn service(&self, tenant: &TenantName, service: &ServiceName) -> Arc<ServiceMetrics> {
        let known = |entry: &TenantEntry| entry.services.get(service).map(Arc::clone);
        if let Some(found) = self.read().get(tenant).and_then(known) {
            return found;
        }
        let mut tenants = self.write();
        let entry = tenants.entry(tenant.clone()).or_default();
        if let Some(found) = known(entry) {
            return found;
        }
        if entry.services.len() >= self.inner.services_per_tenant_max {
            return Arc::clone(entry.other.get_or_insert_default());
        }
        let metrics = Arc::<ServiceMetrics>::default();
        entry.services.insert(service.clone(), Arc::clone(&metrics));
        metrics
    }

    /// Takes a service's series away.
    pub fn remove_service(&self, tenant: &TenantName, service: &ServiceName) {
        if let Some(entry) = self.write().get_mut(tenant) {
            entry.services.remove(service);
        }
    }

    /// Takes away a tenant's series and those of all its services.
    pub fn remove_tenant(&self, tenant: &TenantName) {
        self.write().remove(tenant);
    }

    /// Where to count what belongs to no tenant.
    #[must_use]
    pub fn unrouted(&self) -> &Unrouted {
        &self.inner.unrouted
    }

    /// Adds CPU time that the host spent on its own account.
    pub fn add_host_cpu_ns(&self, cpu_ns: u64) {
        self.inner.host_cpu_ns.add(cpu_ns);
    }

    /// Sets the host's own CPU time where it is measured as a total; it never falls.
    pub fn raise_host_cpu_ns_to(&self, total_ns: u64) {
        self.inner.host_cpu_ns.raise_to(total_ns);
    }

    /// How many worker threads serve.
    pub fn set_host_workers(&self, workers: usize) {
        let workers = u64::try_from(workers).unwrap_or(u64::MAX);
        self.inner.host_workers.store(workers, Relaxed);
    }

    /// What all guests together use, and may use.
    pub fn set_guest_memory(&self, used_bytes: u64, budget_bytes: u64) {
        self.inner.guest_memory.store(used_bytes, Relaxed);
        self.inner.guest_memory_budget.store(budget_bytes, Relaxed);
    }

    /// CPU time charged so far: to all present tenants, and to the host itself, in nanoseconds.
    #[must_use]
    pub fn cpu_ns(&self) -> (u64, u64) {
        let tenants = self.read();
        let charged = tenants
            .values()
            .flat_map(|entry| &entry.metrics.cpu_ns)
            .map(Count::get)
            .sum();
        (charged, self.inner.host_cpu_ns.get())
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, BTreeMap<TenantName, TenantEntry>> {
        // The map is whole between any two statements under the lock, so poison means nothing.
        self.inner
            .tenants
            .read()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, BTreeMap<TenantName, TenantEntry>> {
        self.inner
            .tenants
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for TenantMetrics {
    fn default() -> Self {
        Self {
            cpu_ns: Default::default(),
            cpu_wait_ns: Default::default(),
            cpu_throttled_ns: Default::default(),
            memory_bytes: Default::default(),
            memory_integral: Default::default(),
            memory_limit_bytes: AtomicU64::new(NO_LIMIT),
            memory_refusals: Default::default(),
            storage_bytes: AtomicU64::new(NO_LIMIT),
            storage_limit_bytes: AtomicU64::new(NO_LIMIT),
            has_machines: AtomicBool::new(false),
            log_lines_dropped: Count::default(),
            edge: Edge::default(),
            outbound: Default::default(),
            outbound_bytes: Default::default(),
        }
    }
}

impl TenantMetrics {
    /// Adds CPU time measured around the tenant's own work.
    pub fn add_cpu_ns(&self, kind: Kind, cpu_ns: u64) {
        self.cpu_ns[self.of(kind)].add(cpu_ns);
    }

    /// CPU time charged so far, in nanoseconds.
    #[must_use]
    pub fn cpu_ns(&self, kind: Kind) -> u64 {
        self.cpu_ns[kind.index()].get()
    }

    /// Adds time spent runnable but waiting for a core.
    pub fn add_cpu_wait_ns(&self, kind: Kind, wait_ns: u64) {
        self.cpu_wait_ns[self.of(kind)].add(wait_ns);
    }

    /// Adds time spent runnable but held back by the tenant's own limit.
    pub fn add_cpu_throttled_ns(&self, kind: Kind, throttled_ns: u64) {
        self.cpu_throttled_ns[self.of(kind)].add(throttled_ns);
    }

    /// Sets the guest memory in use now, where it is known as a whole.
    pub fn set_memory_bytes(&self, kind: Kind, bytes: u64) {
        self.memory_bytes[self.of(kind)].store(signed(bytes), Relaxed);
    }

    /// Adds to the guest memory in use now, where every worker counts its own instances.
    pub fn memory_grew(&self, kind: Kind, bytes: u64) {
        self.memory_bytes[self.of(kind)].fetch_add(signed(bytes), Relaxed);
    }

    /// Takes back what [`memory_grew`](Self::memory_grew) added.
    pub fn memory_shrank(&self, kind: Kind, bytes: u64) {
        self.memory_bytes[self.of(kind)].fetch_sub(signed(bytes), Relaxed);
    }

    /// Adds `bytes` of guest memory held for `duration` to the integral; exact to the nanosecond.
    pub fn add_memory_held(&self, kind: Kind, bytes: u64, duration: Duration) {
        self.memory_integral[self.of(kind)].add(bytes, duration);
    }

    /// Sets the tenant's memory limit; `None` takes the series away.
    pub fn set_memory_limit(&self, limit_bytes: Option<u64>) {
        self.memory_limit_bytes
            .store(limit_bytes.unwrap_or(NO_LIMIT), Relaxed);
    }

    /// Sets what the tenant's volumes take; `None` takes the series away.
    pub fn set_storage(&self, bytes: Option<u64>) {
        self.storage_bytes.store(bytes.unwrap_or(NO_LIMIT), Relaxed);
    }

    /// Sets the tenant's storage limit; `None` takes the series away.
    pub fn set_storage_limit(&self, limit_bytes: Option<u64>) {
        self.storage_limit_bytes
            .store(limit_bytes.unwrap_or(NO_LIMIT), Relaxed);
    }

    /// How often so far memory was refused by a limit of the tenant's own, and by the host.
    pub fn raise_memory_refusals_to(&self, limit: u64, host: u64) {
        self.memory_refusals[MemoryRefusal::Limit.index()].raise_to(limit);
        self.memory_refusals[MemoryRefusal::Host.index()].raise_to(host);
    }

    /// Counts a request refused before any guest code ran.
    pub fn shed(&self, reason: ShedReason) {
        self.edge.shed[reason.index()].add(1);
    }

    /// Counts bytes of heads and bodies.
    pub fn add_ingress_bytes(&self, direction: Direction, bytes: u64) {
        self.edge.bytes[direction.index()].add(bytes);
    }

    /// Counts a request that a guest sent: once, when its answer's head is there or will not come.
    pub fn outbound_ended(&self, result: OutboundResult) {
        self.outbound[result.index()].add(1);
    }

    /// Counts bytes of heads and bodies that guests exchange with others.
    pub fn add_outbound_bytes(&self, direction: Direction, bytes: u64) {
        self.outbound_bytes[direction.index()].add(bytes);
    }

    /// Counts log lines that were not kept.
    pub fn log_lines_dropped(&self, lines: u64) {
        self.log_lines_dropped.add(lines);
    }

    /// The index of a kind, noting that machines exist.
    fn of(&self, kind: Kind) -> usize {
        if kind == Kind::Vm {
            self.has_machines.store(true, Relaxed);
        }
        kind.index()
    }
}

/// A size as a gauge's step; 8 EiB and more are 8 EiB.
fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

impl Default for ServiceMetrics {
    fn default() -> Self {
        Self {
            requests: Default::default(),
            fuel: Count::default(),
            duration: Histogram::new(&REQUEST_BOUNDS),
            start: Histogram::new(&START_BOUNDS),
            instances: Default::default(),
        }
    }
}

impl ServiceMetrics {
    /// Counts a request that ended, `duration` after its first byte came in.
    pub fn request_ended(&self, outcome: Outcome, duration: Duration) {
        self.requests[outcome.index()].add(1);
        self.duration.observe(duration);
    }

    /// Counts an instance whose handler was entered, `duration` after its instantiation began.
    pub fn instance_started(&self, duration: Duration) {
        self.start.observe(duration);
    }

    /// Adds fuel consumed, in units.
    pub fn add_fuel(&self, units: u64) {
        self.fuel.add(units);
    }

    /// Counts an instance as present until the guard is dropped.
    #[must_use]
    pub fn instance(self: &Arc<Self>, state: InstanceState) -> InstanceGuard {
        self.instances[state.index()].entered.add(1);
        InstanceGuard {
            service: Arc::clone(self),
            state,
        }
    }
}

/// Keeps one instance counted in `insula_instances`.
#[derive(Debug)]
pub struct InstanceGuard {
    service: Arc<ServiceMetrics>,
    state: InstanceState,
}

impl InstanceGuard {
    /// The instance does something else now.
    pub fn set(&mut self, state: InstanceState) {
        if state != self.state {
            self.service.instances[state.index()].entered.add(1);
            self.service.instances[self.state.index()].left.add(1);
            self.state = state;
        }
    }
}

impl Drop for InstanceGuard {
    fn drop(&mut self) {
        self.service.instances[self.state.index()].left.add(1);
    }
}

impl Unrouted {
    /// Counts a request that ended without having found a tenant.
    pub fn request_ended(&self, outcome: Outcome) {
        self.requests[outcome.index()].add(1);
    }

    /// Counts a request or a connection refused before a tenant was known.
    pub fn shed(&self, reason: ShedReason) {
        self.edge.shed[reason.index()].add(1);
    }

    /// Counts bytes of heads and bodies that no tenant can be charged for.
    pub fn add_ingress_bytes(&self, direction: Direction, bytes: u64) {
        self.edge.bytes[direction.index()].add(bytes);
    }
}

impl Presence {
    /// How many are here, or nothing while nobody ever was.
    ///
    /// Who left was read first, so it is never more than who entered.
    fn read(&self) -> Option<u64> {
        let left = self.left.get();
        let entered = self.entered.get();
        (entered > 0).then(|| entered.saturating_sub(left))
    }
}
