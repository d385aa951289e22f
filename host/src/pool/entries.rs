//! What the data plane knows of a tenant and of a service.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use http::{HeaderMap, HeaderName};
use insula_metrics::{DataMetrics, Direction, Kind, ServiceMetrics, TenantMetrics};
use insula_types::outbound::OutboundRule;
use insula_types::spec::RequestLimits;
use insula_types::{Outcome, ServiceId, ServiceName, TenantId, TenantName, VersionNumber};

use super::exchange::Record;
use super::offload::Offload;
use super::pace::Pace;
use super::request_id::RequestId;
use super::versions::{Active, Choice, Versions};
use crate::engine::{Mounted, TenantMemory};
use crate::ingress::logs::ServiceLog;
use crate::messages::{UsageDelta, VersionDelta};
use crate::outbound::{Outbound, Places};
use crate::storage::TenantStorage;

/// A tenant. Lives as long as anything of it does; its envelope is in the pool.
#[derive(Debug)]
pub struct TenantEntry {
    /// Its id.
    pub id: TenantId,
    /// Its name.
    pub name: TenantName,
    /// The memory of all its instances.
    pub memory: Arc<TenantMemory>,
    /// Its metric series.
    pub metrics: Arc<TenantMetrics>,
    /// Its volumes together.
    pub storage: Arc<TenantStorage>,
    /// Where its blocking work is done.
    pub offload: Arc<Offload>,
    /// For requests that its guests send.
    pub places: Arc<Places>,
    /// CPU time of its connections, in nanoseconds, that the scheduler has not charged yet.
    pub owed: AtomicU64,
}

impl TenantEntry {
    /// What a slice of so many nanoseconds pays for the work on connections that went before it: at
    /// most as much again. The rest is in the ledger only, or else whoever floods a tenant with
    /// requests that are refused would keep those from running that are not.
    pub(super) fn owed_ns(&self, slice_ns: u64) -> u64 {
        match self.owed.load(Ordering::Relaxed) {
            0 => 0,
            _ => self.owed.swap(0, Ordering::Relaxed).min(slice_ns),
        }
    }
}

/// A service as it is now; replaced whole when anything of it changes.
#[derive(Debug, Clone)]
pub struct ServiceEntry {
    /// Its id.
    pub id: ServiceId,
    /// Its name.
    pub name: ServiceName,
    /// Its tenant.
    pub tenant: Arc<TenantEntry>,
    /// The tighter of what the service, its tenant and the host allow.
    pub limits: RequestLimits,
    /// The environment of its guests.
    pub env: Arc<[(String, String)]>,
    /// Its volumes, and where its guests find them.
    pub mounts: Arc<[Mounted]>,
    /// The way out of its guests.
    pub outbound: Arc<Outbound>,
    /// Where it may lead to.
    pub outbound_rules: Arc<[OutboundRule]>,
    /// Whether answers carry `insula-usage`.
    pub usage_header: bool,
    /// What serves, and how much of it.
    pub versions: Versions,
    /// Versions whose code is still compiled.
    pub awaited: Arc<[VersionNumber]>,
    /// The header whose value decides while traffic is split.
    pub sticky_header: Option<HeaderName>,
    /// What outlives a change: counters and the log.
    pub stats: Arc<ServiceStats>,
}

/// Who pays for work on a connection. An idle connection keeps one for as long as it stands, so it
/// holds nothing of a version.
#[derive(Debug)]
pub struct Payer {
    tenant: Arc<TenantEntry>,
    stats: Arc<ServiceStats>,
}

impl Payer {
    /// Whether it is this service's.
    pub fn is(&self, service: &ServiceEntry) -> bool {
        Arc::ptr_eq(&self.stats, &service.stats)
    }

    /// Whose it is.
    #[must_use]
    pub fn tenant(&self) -> TenantId {
        self.tenant.id
    }

    /// Charges measured CPU time that the scheduler hears of later, with a slice.
    pub fn charge(&self, ns: u64) {
        self.charge_in_turn(ns);
        self.tenant.owed.fetch_add(ns, Ordering::Relaxed);
    }

    /// Charges measured CPU time of which the scheduler is told.
    pub(super) fn charge_in_turn(&self, ns: u64) {
        self.stats.charge_cpu(&self.tenant, ns);
    }
}

/// Counters of one service, moved out when control collects.
#[derive(Debug)]
pub struct ServiceStats {
    requests: [AtomicU64; Outcome::ALL.len()],
    fuel: AtomicU64,
    cpu_ns: AtomicU64,
    memory_byte_ms: AtomicU64,
    bytes_in: AtomicU64,
    bytes_out: AtomicU64,
    /// How fast it burns fuel.
    pub pace: Pace,
    /// Created by the first request: an idle service has no series.
    metrics: OnceLock<Arc<ServiceMetrics>>,
    registry: DataMetrics,
    /// Its log.
    pub log: Arc<ServiceLog>,
}

impl ServiceStats {
    /// All zero.
    #[must_use]
    pub fn new(registry: DataMetrics, log: Arc<ServiceLog>) -> Self {
        Self {
            requests: Default::default(),
            fuel: AtomicU64::new(0),
            cpu_ns: AtomicU64::new(0),
            memory_byte_ms: AtomicU64::new(0),
            bytes_in: AtomicU64::new(0),
            bytes_out: AtomicU64::new(0),
            pace: Pace::default(),
            metrics: OnceLock::new(),
            registry,
            log,
        }
    }

    fn charge_cpu(&self, tenant: &TenantEntry, ns: u64) {
        self.cpu_ns.fetch_add(ns, Ordering::Relaxed);
        tenant.metrics.add_cpu_ns(Kind::Wasm, ns);
    }
}

impl ServiceEntry {
    /// The version that a request gets: that of its preview name, or by its sticky key, or
    /// else, by its id, any.
    #[must_use]
    pub fn version_for(
        &self,
        preview: Option<VersionNumber>,
        headers: &HeaderMap,
        request_id: &RequestId,
    ) -> Option<&Active> {
        let sticky = self.sticky_header.as_ref();
        let key = || match sticky.and_then(|name| headers.get(name)) {
            Some(value) => value.as_bytes(),
            None => request_id.as_bytes(),
        };
        let choice = match preview {
            Some(number) => Choice::Preview(number),
            None if self.versions.is_split() => Choice::Shared(key()),
            None => Choice::Shared(&[]),
        };
        self.versions.choose(self.id.get(), choice)
    }

    /// Whether the version that a request would get is still compiled.
    #[must_use]
    pub fn awaits(&self, preview: Option<VersionNumber>) -> bool {
        match preview {
            Some(number) => self.awaited.contains(&number),
            None => !self.awaited.is_empty(),
        }
    }

    /// Its metric series.
    pub fn metrics(&self) -> &Arc<ServiceMetrics> {
        let stats = &self.stats;
        stats
            .metrics
            .get_or_init(|| stats.registry.service(&self.tenant.name, &self.name))
    }

    /// Charges measured CPU time, as soon as it was measured.
    pub fn charge_cpu(&self, ns: u64) {
        self.stats.charge_cpu(&self.tenant, ns);
    }

    /// Who pays for work on its connections.
    #[must_use]
    pub fn payer(&self) -> Payer {
        Payer {
            tenant: Arc::clone(&self.tenant),
            stats: Arc::clone(&self.stats),
        }
    }

    /// Writes down the end of one request: the one place where that happens.
    pub fn record(&self, record: &Record) {
        let stats = &self.stats;
        stats.requests[record.outcome.index()].fetch_add(1, Ordering::Relaxed);
        stats.fuel.fetch_add(record.fuel, Ordering::Relaxed);
        stats
            .memory_byte_ms
            .fetch_add(record.memory_byte_ms, Ordering::Relaxed);
        stats.bytes_in.fetch_add(record.bytes_in, Ordering::Relaxed);
        stats
            .bytes_out
            .fetch_add(record.bytes_out, Ordering::Relaxed);
        let metrics = self.metrics();
        metrics.request_ended(record.outcome, record.duration);
        metrics.add_fuel(record.fuel);
        let tenant = &self.tenant.metrics;
        let millisecond = Duration::from_millis(1);
        tenant.add_memory_held(Kind::Wasm, record.memory_byte_ms, millisecond);
        tenant.add_ingress_bytes(Direction::In, record.bytes_in);
        tenant.add_ingress_bytes(Direction::Out, record.bytes_out);
    }

    /// Writes down a request that was refused before it became an exchange.
    pub fn record_refusal(&self, outcome: Outcome, duration: Duration, bytes_in: u64) {
        self.record(&Record {
            outcome,
            fuel: 0,
            memory_byte_ms: 0,
            bytes_in,
            bytes_out: 0,
            duration,
        });
    }

    /// Moves out how its versions behaved since the last call.
    pub fn take_conduct(&self) -> impl Iterator<Item = VersionDelta> + '_ {
        self.versions.ready().filter_map(|version| {
            Some(VersionDelta {
                service: self.id,
                version: version.number,
                conduct: version.stats.take()?,
            })
        })
    }

    /// Moves the counts since the last call out; `None` when there were none.
    pub fn take_usage(&self) -> Option<UsageDelta> {
        let stats = &self.stats;
        let take = |counter: &AtomicU64| counter.swap(0, Ordering::Relaxed);
        let delta = UsageDelta {
            tenant: self.tenant.id,
            service: self.id,
            requests: std::array::from_fn(|outcome| take(&stats.requests[outcome])),
            fuel: take(&stats.fuel),
            cpu_ns: take(&stats.cpu_ns),
            memory_byte_ms: take(&stats.memory_byte_ms),
            bytes_in: take(&stats.bytes_in),
            bytes_out: take(&stats.bytes_out),
        };
        let idle = delta.cpu_ns == 0 && delta.requests.iter().all(|count| *count == 0);
        (!idle).then_some(delta)
    }
}
