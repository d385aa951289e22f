//! What the host is, and what of it is promised: the control plane's families.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use insula_types::{Bytes, Millicores};

use crate::page::{Page, Type, number};

/// What this binary is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuildInfo {
    /// Insula's version.
    pub version: String,
    /// The version of wasmtime.
    pub wasmtime: String,
    /// The commit that it was built from, or `unknown`.
    pub commit: String,
}

/// The control plane's metrics; clones share the same numbers.
#[derive(Debug, Clone)]
pub struct ControlMetrics {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    build: BuildInfo,
    kvm_support: OnceLock<String>,
    cpu_capacity_millicores: AtomicU64,
    cpu_reserved_millicores: AtomicU64,
    memory_bytes: AtomicU64,
    memory_committed_bytes: AtomicU64,
}

impl ControlMetrics {
    /// Metrics of a host of which only the build is known yet.
    #[must_use]
    pub fn new(build: BuildInfo) -> Self {
        Self {
            inner: Arc::new(Inner {
                build,
                kvm_support: OnceLock::new(),
                cpu_capacity_millicores: AtomicU64::new(0),
                cpu_reserved_millicores: AtomicU64::new(0),
                memory_bytes: AtomicU64::new(0),
                memory_committed_bytes: AtomicU64::new(0),
            }),
        }
    }

    /// How the host supports KVM (`hardware`, `emulated`, `absent`); found once, so only the
    /// first call counts.
    pub fn set_kvm_support(&self, support: &str) {
        self.inner.kvm_support.get_or_init(|| support.to_owned());
    }

    /// The CPU that can be divided.
    pub fn set_cpu_capacity(&self, capacity: Millicores) {
        self.inner
            .cpu_capacity_millicores
            .store(capacity.get(), Relaxed);
    }

    /// The sum of all reservations; `None` while nothing is reserved.
    pub fn set_cpu_reserved(&self, reserved: Option<Millicores>) {
        let millicores = reserved.map_or(0, Millicores::get);
        self.inner
            .cpu_reserved_millicores
            .store(millicores, Relaxed);
    }

    /// The memory that can be divided.
    pub fn set_memory(&self, memory: Bytes) {
        self.inner.memory_bytes.store(memory.get(), Relaxed);
    }

    /// The memory promised to tenants; `None` while nothing is promised.
    pub fn set_memory_committed(&self, committed: Option<Bytes>) {
        let bytes = committed.map_or(0, Bytes::get);
        self.inner.memory_committed_bytes.store(bytes, Relaxed);
    }

    /// The page, in the text format 0.0.4, families sorted by name.
    #[must_use]
    pub fn expose(&self) -> String {
        let inner = &*self.inner;
        let mut page = Page::default();
        page.family(
            "insula_build_info",
            Type::Gauge,
            "What this binary is made of; always 1.",
            |series| {
                let build = &inner.build;
                let labels = [
                    ("version", build.version.as_str()),
                    ("wasmtime", build.wasmtime.as_str()),
                    ("commit", build.commit.as_str()),
                ];
                series.gauge(&labels, 1.0);
            },
        );
        let mut gauge = |name, help, value| {
            page.family(name, Type::Gauge, help, |series| series.gauge(&[], value));
        };
        gauge(
            "insula_host_cpu_capacity_cores",
            "CPU that can be divided among tenants.",
            number(inner.cpu_capacity_millicores.load(Relaxed)) / 1000.0,
        );
        gauge(
            "insula_host_cpu_reserved_cores",
            "Sum of the reservations of all tenants.",
            number(inner.cpu_reserved_millicores.load(Relaxed)) / 1000.0,
        );
        if let Some(support) = inner.kvm_support.get() {
            page.family(
                "insula_host_kvm",
                Type::Gauge,
                "How the host supports KVM; always 1.",
                |series| {
                    series.gauge(&[("support", support)], 1.0);
                },
            );
        }
        let mut gauge = |name, help, value| {
            page.family(name, Type::Gauge, help, |series| {
                series.gauge(&[], number(value))
            });
        };
        gauge(
            "insula_host_memory_bytes",
            "Memory that can be divided among tenants.",
            inner.memory_bytes.load(Relaxed),
        );
        gauge(
            "insula_host_memory_committed_bytes",
            "Memory promised to tenants.",
            inner.memory_committed_bytes.load(Relaxed),
        );
        page.into_text()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_shows_what_was_set() {
        let metrics = ControlMetrics::new(BuildInfo {
            version: "0.1.0".into(),
            wasmtime: "48.0.8".into(),
            commit: "un\"known".into(),
        });
        metrics.set_kvm_support("absent");
        metrics.set_kvm_support("hardware");
        metrics.set_cpu_capacity("1.9".parse().unwrap());
        metrics.set_cpu_reserved(Some("250m".parse().unwrap()));
        metrics.set_memory(Bytes::mib(512));
        let samples: Vec<_> = metrics
            .expose()
            .lines()
            .filter(|line| !line.starts_with('#'))
            .map(str::to_owned)
            .collect();
        assert_eq!(
            samples,
            [
                r#"insula_build_info{version="0.1.0",wasmtime="48.0.8",commit="un\"known"} 1"#,
                "insula_host_cpu_capacity_cores 1.9",
                "insula_host_cpu_reserved_cores 0.25",
                r#"insula_host_kvm{support="absent"} 1"#,
                "insula_host_memory_bytes 536870912",
                "insula_host_memory_committed_bytes 0",
            ]
        );
    }
}
