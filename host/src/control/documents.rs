//! Records as the API shows them: the canonical spec, flat, and what only the host knows.

use insula_types::{Outcome, VersionNumber};
use serde_json::{Map, Value, json};

use super::Control;
use crate::state::{Access, Scope, Service, Tenant, Token, UsageTotals, Version};

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

pub(super) fn service(control: &Control, service: &Service) -> Value {
    with_spec(
        json!({"name": service.name, "tenant": service.tenant_name}),
        &service.spec,
        json!({
            "url": url(control, service),
            "active_version": service.traffic.leading(),
            "previous_version": service.previous,
            "traffic": service.traffic,
            "generation": service.generation,
            "created_at": service.created,
        }),
    )
}

/// Where a service answers.
pub(super) fn url(control: &Control, service: &Service) -> String {
    url_of(control, service, "")
}

/// Where one version of it answers, whatever its share, as long as it is kept ready.
pub(super) fn preview_url(control: &Control, service: &Service, number: VersionNumber) -> String {
    url_of(control, service, &format!("v{number}."))
}

fn url_of(control: &Control, service: &Service, prefix: &str) -> String {
    let host = format!(
        "{prefix}{}.{}.{}",
        service.name, service.tenant_name, control.config.domain
    );
    match control.ingress.get().map(|ingress| ingress.port()) {
        None | Some(80) => format!("http://{host}/"),
        Some(port) => format!("http://{host}:{port}/"),
    }
}

pub(super) fn version(control: &Control, service: &Service, version: &Version) -> Value {
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
        "preview_url": ready.then(|| preview_url(control, service, version.number)),
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
