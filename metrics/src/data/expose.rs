//! The page of the data plane.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use insula_types::{Outcome, ServiceName, TenantName};

use super::{DataMetrics, NO_LIMIT, OTHER_SERVICE, ServiceMetrics, TenantMetrics};
use crate::cells::{Count, Distribution, seconds};
use crate::labels::{Direction, InstanceState, Kind, MemoryRefusal, OutboundResult, ShedReason};
use crate::page::{Page, Series, Type, number};

/// The handles that exist at one moment, so that no lock is held while a page is written.
struct Snapshot {
    tenants: Vec<Tenant>,
}

struct Tenant {
    name: TenantName,
    metrics: Arc<TenantMetrics>,
    services: Vec<(Option<ServiceName>, Arc<ServiceMetrics>)>,
}

impl DataMetrics {
    /// The page, in the text format 0.0.4, families sorted by name.
    #[must_use]
    pub fn expose(&self) -> String {
        let snapshot = self.snapshot();
        let mut page = Page::default();
        snapshot.cpu(&mut page);
        snapshot.fuel(&mut page);
        self.host(&mut page);
        self.ingress_bytes(&snapshot, &mut page);
        snapshot.starts(&mut page);
        snapshot.instances(&mut page);
        snapshot.log_lines(&mut page);
        snapshot.memory(&mut page);
        snapshot.memory_refusals(&mut page);
        snapshot.outbound(&mut page);
        snapshot.durations(&mut page);
        self.requests(&snapshot, &mut page);
        self.shed_total(&snapshot, &mut page);
        snapshot.storage(&mut page);
        page.into_text()
    }

    fn snapshot(&self) -> Snapshot {
        let tenants = self.read();
        let tenants = tenants.iter().map(|(name, entry)| Tenant {
            name: name.clone(),
            metrics: Arc::clone(&entry.metrics),
            services: entry
                .other
                .iter()
                .map(|other| (None, Arc::clone(other)))
                .chain(
                    entry
                        .services
                        .iter()
                        .map(|(name, metrics)| (Some(name.clone()), Arc::clone(metrics))),
                )
                .collect(),
        });
        Snapshot {
            tenants: tenants.collect(),
        }
    }

    fn host(&self, page: &mut Page) {
        page.family(
            "insula_host_cpu_seconds_total",
            Type::Counter,
            "CPU time of the host itself, charged to no tenant.",
            |series| series.counter(&[], seconds(self.inner.host_cpu_ns.get())),
        );
        page.family(
            "insula_host_guest_memory_budget_bytes",
            Type::Gauge,
            "Memory that all guests together may use; above seven eighths of it by shares.",
            |series| series.gauge(&[], number(self.inner.guest_memory_budget.load(Relaxed))),
        );
        page.family(
            "insula_host_guest_memory_bytes",
            Type::Gauge,
            "Memory of all guests together.",
            |series| series.gauge(&[], number(self.inner.guest_memory.load(Relaxed))),
        );
        page.family(
            "insula_host_workers",
            Type::Gauge,
            "Worker threads that serve guests.",
            |series| series.gauge(&[], number(self.inner.host_workers.load(Relaxed))),
        );
    }

    fn ingress_bytes(&self, snapshot: &Snapshot, page: &mut Page) {
        page.family(
            "insula_ingress_bytes_total",
            Type::Counter,
            "Bytes of request and response heads and bodies; no tenant where none was found.",
            |series| {
                let mut of = |tenant: &str, bytes: &[Count]| {
                    for direction in Direction::ALL {
                        let labels = [("tenant", tenant), ("direction", direction.as_str())];
                        count_if_any(series, &labels, &bytes[direction.index()]);
                    }
                };
                of("", &self.inner.unrouted.edge.bytes);
                for tenant in &snapshot.tenants {
                    of(tenant.name.as_str(), &tenant.metrics.edge.bytes);
                }
            },
        );
    }

    fn requests(&self, snapshot: &Snapshot, page: &mut Page) {
        page.family(
            "insula_requests_total",
            Type::Counter,
            "Requests by how they ended; no tenant and no service where none was found.",
            |series| {
                let mut of = |tenant: &str, service: &str, requests: &[Count]| {
                    for outcome in Outcome::ALL {
                        let labels = [
                            ("tenant", tenant),
                            ("service", service),
                            ("outcome", outcome.as_str()),
                        ];
                        count_if_any(series, &labels, &requests[outcome.index()]);
                    }
                };
                of("", "", &self.inner.unrouted.requests);
                snapshot.each_service(|tenant, service, metrics| {
                    of(tenant, service, &metrics.requests)
                });
            },
        );
    }

    fn shed_total(&self, snapshot: &Snapshot, page: &mut Page) {
        page.family(
            "insula_shed_total",
            Type::Counter,
            "Requests refused before any guest code ran.",
            |series| {
                let mut of = |tenant: &str, shed: &[Count]| {
                    for reason in ShedReason::ALL {
                        let labels = [("tenant", tenant), ("reason", reason.as_str())];
                        count_if_any(series, &labels, &shed[reason.index()]);
                    }
                };
                of("", &self.inner.unrouted.edge.shed);
                for tenant in &snapshot.tenants {
                    of(tenant.name.as_str(), &tenant.metrics.edge.shed);
                }
            },
        );
    }
}

impl Snapshot {
    fn each_service<'a>(&'a self, mut visit: impl FnMut(&'a str, &'a str, &'a ServiceMetrics)) {
        for tenant in &self.tenants {
            for (name, metrics) in &tenant.services {
                let service = name.as_ref().map_or(OTHER_SERVICE, ServiceName::as_str);
                visit(tenant.name.as_str(), service, metrics);
            }
        }
    }

    /// Every tenant with every kind of guest that it has.
    fn each_kind<'a>(
        &'a self,
        mut visit: impl FnMut(&[(&'static str, &'a str)], &'a TenantMetrics, Kind),
    ) {
        for tenant in &self.tenants {
            for kind in Kind::ALL {
                if kind == Kind::Wasm || tenant.metrics.has_machines.load(Relaxed) {
                    let labels = [("tenant", tenant.name.as_str()), ("kind", kind.as_str())];
                    visit(&labels, &tenant.metrics, kind);
                }
            }
        }
    }

    fn cpu(&self, page: &mut Page) {
        let mut times = |name, help, of: fn(&TenantMetrics) -> &[Count; 2]| {
            page.family(name, Type::Counter, help, |series| {
                self.each_kind(|labels, metrics, kind| {
                    series.counter(labels, seconds(of(metrics)[kind.index()].get()));
                });
            });
        };
        times(
            "insula_cpu_seconds_total",
            "CPU time measured around the tenant's own work.",
            |metrics| &metrics.cpu_ns,
        );
        times(
            "insula_cpu_throttled_seconds_total",
            "Time runnable but held back by the tenant's own limit.",
            |metrics| &metrics.cpu_throttled_ns,
        );
        times(
            "insula_cpu_wait_seconds_total",
            "Time runnable but waiting for a core.",
            |metrics| &metrics.cpu_wait_ns,
        );
    }

    fn fuel(&self, page: &mut Page) {
        page.family(
            "insula_fuel_consumed_total",
            Type::Counter,
            "Deterministic units of guest execution.",
            |series| {
                self.each_service(|tenant, service, metrics| {
                    count_if_any(
                        series,
                        &[("tenant", tenant), ("service", service)],
                        &metrics.fuel,
                    );
                });
            },
        );
    }

    fn instances(&self, page: &mut Page) {
        page.family(
            "insula_instances",
            Type::Gauge,
            "Instances now.",
            |series| {
                self.each_service(|tenant, service, metrics| {
                    for state in InstanceState::ALL {
                        if let Some(present) = metrics.instances[state.index()].read() {
                            let labels = [
                                ("tenant", tenant),
                                ("service", service),
                                ("state", state.as_str()),
                            ];
                            series.gauge(&labels, number(present));
                        }
                    }
                });
            },
        );
    }

    fn log_lines(&self, page: &mut Page) {
        page.family(
            "insula_log_lines_dropped_total",
            Type::Counter,
            "Log lines of guests that were not kept.",
            |series| {
                for tenant in &self.tenants {
                    let labels = [("tenant", tenant.name.as_str())];
                    count_if_any(series, &labels, &tenant.metrics.log_lines_dropped);
                }
            },
        );
    }

    fn memory(&self, page: &mut Page) {
        page.family(
            "insula_memory_byte_seconds_total",
            Type::Counter,
            "Guest memory integrated over time.",
            |series| {
                self.each_kind(|labels, metrics, kind| {
                    let integral = &metrics.memory_integral[kind.index()];
                    series.counter(labels, number(integral.byte_seconds()));
                });
            },
        );
        page.family(
            "insula_memory_bytes",
            Type::Gauge,
            "Guest memory now.",
            |series| {
                self.each_kind(|labels, metrics, kind| {
                    // Workers may add and take back in either order as a scrape sees it.
                    let bytes = metrics.memory_bytes[kind.index()].load(Relaxed);
                    series.gauge(labels, number(u64::try_from(bytes).unwrap_or(0)));
                });
            },
        );
        page.family(
            "insula_memory_limit_bytes",
            Type::Gauge,
            "The tenant's memory limit.",
            |series| {
                for tenant in &self.tenants {
                    let limit = tenant.metrics.memory_limit_bytes.load(Relaxed);
                    if limit != NO_LIMIT {
                        series.gauge(&[("tenant", tenant.name.as_str())], number(limit));
                    }
                }
            },
        );
    }

    fn memory_refusals(&self, page: &mut Page) {
        page.family(
            "insula_memory_refused_total",
            Type::Counter,
            "Growth of a guest's memory that was refused.",
            |series| {
                for tenant in &self.tenants {
                    for reason in MemoryRefusal::ALL {
                        let labels = [
                            ("tenant", tenant.name.as_str()),
                            ("reason", reason.as_str()),
                        ];
                        let count = &tenant.metrics.memory_refusals[reason.index()];
                        count_if_any(series, &labels, count);
                    }
                }
            },
        );
    }

    fn storage(&self, page: &mut Page) {
        let mut gauge = |name, help, of: fn(&TenantMetrics) -> u64| {
            page.family(name, Type::Gauge, help, |series| {
                for tenant in &self.tenants {
                    let bytes = of(&tenant.metrics);
                    if bytes != NO_LIMIT {
                        series.gauge(&[("tenant", tenant.name.as_str())], number(bytes));
                    }
                }
            });
        };
        gauge(
            "insula_storage_bytes",
            "What the tenant's volumes take.",
            |metrics| metrics.storage_bytes.load(Relaxed),
        );
        gauge(
            "insula_storage_limit_bytes",
            "The tenant's storage limit.",
            |metrics| metrics.storage_limit_bytes.load(Relaxed),
        );
    }

    fn outbound(&self, page: &mut Page) {
        page.family(
            "insula_outbound_bytes_total",
            Type::Counter,
            "Bytes of heads and bodies that guests exchange with others; in is to the guest.",
            |series| {
                for tenant in &self.tenants {
                    for direction in Direction::ALL {
                        let labels = [
                            ("tenant", tenant.name.as_str()),
                            ("direction", direction.as_str()),
                        ];
                        let count = &tenant.metrics.outbound_bytes[direction.index()];
                        count_if_any(series, &labels, count);
                    }
                }
            },
        );
        page.family(
            "insula_outbound_requests_total",
            Type::Counter,
            "Requests that guests sent to others, by what became of them.",
            |series| {
                for tenant in &self.tenants {
                    for result in OutboundResult::ALL {
                        let labels = [
                            ("tenant", tenant.name.as_str()),
                            ("result", result.as_str()),
                        ];
                        let count = &tenant.metrics.outbound[result.index()];
                        count_if_any(series, &labels, count);
                    }
                }
            },
        );
    }

    fn durations(&self, page: &mut Page) {
        self.histograms(
            page,
            "insula_request_duration_seconds",
            "From the first byte in to the last byte out.",
            |metrics| metrics.duration.read(),
        );
    }

    fn starts(&self, page: &mut Page) {
        self.histograms(
            page,
            "insula_instance_start_seconds",
            "From the beginning of instantiation until the guest's handler is entered.",
            |metrics| metrics.start.read(),
        );
    }

    fn histograms(
        &self,
        page: &mut Page,
        name: &str,
        help: &str,
        read: impl Fn(&ServiceMetrics) -> Option<Distribution>,
    ) {
        page.family(name, Type::Histogram, help, |series| {
            self.each_service(|tenant, service, metrics| {
                if let Some(distribution) = read(metrics) {
                    series.histogram(&[("tenant", tenant), ("service", service)], distribution);
                }
            });
        });
    }
}

/// One series of a counter that does not exist before it counted.
fn count_if_any(series: &mut Series, labels: &[(&'static str, &str)], count: &Count) {
    let value = count.get();
    if value > 0 {
        series.counter(labels, number(value));
    }
}
