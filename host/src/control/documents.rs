//! Records as the API shows them: the canonical spec, flat, and what only the host knows.

use insula_types::{Outcome, VersionNumber};
use insula_vmm::life::{MonitorPid, State};
use serde_json::{Map, Value, json};

use super::Control;
use crate::machines::book::Entry;
use crate::machines::network::Network;
use crate::state::machines::{Image, Machine, MachineTotals};
use crate::state::{
    Access, AddedVersion, Scope, Service, Tenant, Token, UsageTotals, Version, Volume,
};
use crate::storage::Usage;

/// Fields of a tenant that the host adds; a document that was read may be put with them.
pub(super) const TENANT_READ_ONLY: &[&str] = &["generation", "created_at"];
/// Fields of a service that the host adds.
pub(super) const SERVICE_READ_ONLY: &[&str] = &[
    "tenant",
    "generation",
    "created_at",
    "url",
    "active_version",
    "previous_version",
    "traffic",
];

/// Fields of a volume that the host adds.
pub(super) const VOLUME_READ_ONLY: &[&str] = &[
    "tenant",
    "used_bytes",
    "used_inodes",
    "read_only",
    "origin",
    "generation",
    "created_at",
];
/// Fields of a machine that the host adds.
pub(super) const MACHINE_READ_ONLY: &[&str] = &[
    "tenant",
    "generation",
    "created_at",
    "state",
    "reason",
    "monitor_pid",
    "snapshot_at",
    "digests",
    "network",
    "used",
];

fn with_spec(head: Value, spec: &impl serde::Serialize, tail: Value) -> Value {
    let mut object = Map::new();
    for part in [head, json!(spec), tail] {
        if let Value::Object(part) = part {
            object.extend(part);
        }
    }
    Value::Object(object)
}

pub(super) fn tenant(tenant: &Tenant) -> Value {
    with_spec(
        json!({"name": tenant.name}),
        &tenant.spec,
        json!({"generation": tenant.generation, "created_at": tenant.created}),
    )
}

pub(super) fn service(urls: &Urls, service: &Service) -> Value {
    let mut document = service_record(service);
    document["url"] = urls.of(service, None).into();
    document
}

/// A service without what only the host as it runs now knows.
pub(super) fn service_record(service: &Service) -> Value {
    with_spec(
        json!({"name": service.name, "tenant": service.tenant_name}),
        &service.spec,
        json!({
            "active_version": service.traffic.leading(),
            "previous_version": service.previous,
            "traffic": service.traffic,
            "generation": service.generation,
            "created_at": service.created,
        }),
    )
}

/// A volume, and what it takes where that is known.
pub(super) fn volume(volume: &Volume, used: Option<Usage>) -> Value {
    with_spec(
        json!({"name": volume.name, "tenant": volume.tenant_name}),
        &volume.spec,
        json!({
            "used_bytes": used.map(|used| used.bytes),
            "used_inodes": used.map(|used| used.inodes),
            "read_only": volume.read_only,
            "origin": volume.origin,
            "generation": volume.generation,
            "created_at": volume.created,
        }),
    )
}

/// A machine, with what it does now.
pub(super) fn machine(machine: &Machine, entry: Option<&Entry>, network: &Network) -> Value {
    let mut document = machine_record(machine);
    let state = entry.map_or_else(|| machine.life.clone(), Entry::state);
    document["state"] = state.word().into();
    document["monitor_pid"] = json!(state.monitor().map(MonitorPid::get));
    document["network"] = match (&machine.spec.net, network.missing()) {
        (None, _) => Value::Null,
        (Some(_), Some(why)) => json!({"missing": why}),
        (Some(_), None) => json!(network.wire(machine.id).map(|wire| json!({
            "address": wire.machine(),
            "gateway": wire.gateway(),
            "mac": wire.mac(),
        }))),
    };
    if let State::Failed { failure } = &state {
        document["reason"] = failure.to_string().into();
    }
    if let Some(entry) = entry {
        let used = entry.used();
        document["used"] = json!({
            "cpu_seconds": used.cpu.as_secs_f64(),
            "cpu_wait_seconds": used.waited.as_secs_f64(),
            "cpu_throttled_seconds": used.throttled.as_secs_f64(),
            "disk_read_bytes": used.disk_read_bytes,
            "disk_written_bytes": used.disk_written_bytes,
            "resident_bytes": entry.last().map(|last| last.times.resident_bytes),
            "net_received_bytes": used.net_received_bytes,
            "net_sent_bytes": used.net_sent_bytes,
            "stored_bytes": entry.last().map(|last| last.stored_bytes),
        });
    }
    document
}

/// A machine without what only the host as it runs now knows.
pub(super) fn machine_record(machine: &Machine) -> Value {
    with_spec(
        json!({"name": machine.name, "tenant": machine.tenant_name}),
        &machine.spec,
        json!({
            "digests": {
                "kernel": machine.images.kernel,
                "initrd": machine.images.initrd,
                "disks": machine.images.disks,
            },
            "generation": machine.generation,
            "created_at": machine.created,
        }),
    )
}

pub(super) fn image(image: &Image) -> Value {
    json!({
        "name": image.name,
        "digest": image.digest,
        "size_bytes": image.size_bytes,
        "generation": image.generation,
        "created_at": image.created,
    })
}

/// What a tenant's machines used.
pub(super) fn machine_usage(totals: &MachineTotals) -> Value {
    let seconds = |ns: u64| std::time::Duration::from_nanos(ns).as_secs_f64();
    json!({
        "cpu_seconds": seconds(totals.cpu_ns),
        "cpu_wait_seconds": seconds(totals.wait_ns),
        "cpu_throttled_seconds": seconds(totals.throttled_ns),
        // Whole byte-seconds.
        "memory_byte_seconds": u128::from(totals.memory_kib_ms) * 1_024 / 1_000,
        "disk_read_bytes": totals.disk_read_bytes,
        "disk_written_bytes": totals.disk_written_bytes,
        "net_received_bytes": totals.net_received_bytes,
        "net_sent_bytes": totals.net_sent_bytes,
    })
}

/// What stands in the audit log for the value of a variable.
const WITHHELD: &str = "(withheld)";

/// A document as it may be kept for good: variables of an environment keep their names and lose
/// their values, which are passwords as often as not.
pub(super) fn without_secrets(mut document: Value) -> Value {
    if let Some(Value::Object(env)) = document.get_mut("env") {
        for value in env.values_mut() {
            *value = WITHHELD.into();
        }
    }
    document
}

/// Makes the addresses of services.
#[derive(Debug, Clone)]
pub(super) struct Urls {
    scheme: &'static str,
    domain: String,
    port: u16,
}

impl Urls {
    pub(super) fn new(control: &Control) -> Self {
        Self {
            scheme: control.config.ingress_scheme.as_str(),
            domain: control.config.domain.clone(),
            port: control.config.ingress.port(),
        }
    }

    /// Where a service answers, or one version of it.
    pub(super) fn of(&self, service: &Service, preview: Option<VersionNumber>) -> String {
        let prefix = preview.map_or_else(String::new, |number| format!("v{number}."));
        let (name, tenant, domain) = (&service.name, &service.tenant_name, &self.domain);
        let host = format!("{prefix}{name}.{tenant}.{domain}");
        match (self.scheme, self.port) {
            (scheme @ "http", 80) | (scheme @ "https", 443) => {
                format!("{scheme}://{host}/")
            }
            (scheme, port) => format!("{scheme}://{host}:{port}/"),
        }
    }
}

/// What an upload answers.
pub(super) fn deployed(urls: &Urls, added: &AddedVersion, active: bool) -> Value {
    let version = &added.version;
    json!({
        "version": version.number,
        "digest": version.digest,
        "size_bytes": version.size,
        "compile_ms": version.compile_ms,
        "active": active,
        "url": urls.of(&added.service, None),
        "preview_url": urls.of(&added.service, Some(version.number)),
    })
}

pub(super) fn version(urls: &Urls, service: &Service, version: &Version) -> Value {
    let percent = service.traffic.share(version.number).unwrap_or(0);
    let ready = service.held(version.number).is_some();
    json!({
        "name": version.number.to_string(),
        "version": version.number,
        "digest": version.digest,
        "size_bytes": version.size,
        "compile_ms": version.compile_ms,
        "created_at": version.created,
        "active": percent > 0,
        "percent": percent,
        "preview_url": ready.then(|| urls.of(service, Some(version.number))),
    })
}

pub(super) fn token(token: &Token) -> Value {
    let (scope, tenant) = match &token.scope {
        Scope::Host => ("host", None),
        Scope::Tenant(_, name) => ("tenant", Some(name)),
    };
    json!({
        "id": token.id,
        "name": token.name,
        "scope": scope,
        "tenant": tenant,
        "access": match token.access { Access::Read => "read", Access::Write => "write" },
        "created_at": token.created,
        "expires_at": token.expires,
    })
}

/// Seconds from a finer unit. Exact below 2^53 of the unit; beyond that a float's precision.
fn seconds(count: u128, per_second: u32) -> f64 {
    #[expect(
        clippy::cast_precision_loss,
        reason = "JSON numbers are floats to most readers"
    )]
    let count = count as f64;
    count / f64::from(per_second)
}

pub(super) fn usage(totals: &UsageTotals) -> Map<String, Value> {
    let mut requests = Map::new();
    requests.insert("total".to_owned(), totals.requests_total().into());
    for outcome in Outcome::ALL {
        let count = totals.requests[outcome.index()];
        requests.insert(outcome.as_str().to_owned(), count.into());
    }
    let document = json!({
        "fuel": totals.fuel,
        "cpu_seconds": seconds(u128::from(totals.cpu_ns), 1_000_000_000),
        "memory_byte_seconds": seconds(totals.memory_byte_ms, 1_000),
        "requests": requests,
        "ingress_bytes": {"in": totals.bytes_in, "out": totals.bytes_out},
    });
    match document {
        Value::Object(object) => object,
        _ => Map::new(),
    }
}
