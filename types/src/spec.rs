//! What a caller asks for: the resource envelope of a tenant, the limits of a service.
//!
//! The raw forms are read by serde with unknown fields refused; `TryFrom` checks what one field
//! cannot know alone and names all mistakes at once. What is printed is canonical: plain numbers
//! with the unit in the field's name. The canonical form is accepted as input too, so that a
//! document that was read can be written back.

use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroU32;

use serde::{Deserialize, Serialize};

use crate::VolumeName;
use crate::outbound::{OUTBOUND_MAX, OutboundRule};
use crate::quantity::{Bytes, Fuel, Millicores, Millis, Shares};
use crate::rollback::AutoRollback;
use crate::traffic::StickyHeader;
use crate::volume::{self, Mount, MountMode, StoreGrant, VolumeKind};

/// Everything that is wrong with a spec, each with the path of its field.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SpecErrors(Vec<String>);

impl SpecErrors {
    pub(crate) fn push(&mut self, path: &str, what: impl fmt::Display) {
        self.0.push(format!("{path}: {what}"));
    }

    /// The mistakes, one line each.
    #[must_use]
    pub fn lines(&self) -> &[String] {
        &self.0
    }

    pub(crate) fn into_result<T>(self, value: T) -> Result<T, Self> {
        if self.0.is_empty() {
            Ok(value)
        } else {
            Err(self)
        }
    }
}

impl fmt::Display for SpecErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("; "))
    }
}

impl std::error::Error for SpecErrors {}

/// The hypervisor's triple of CPU control.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct CpuEnvelope {
    /// Weight against siblings when CPU is short.
    pub shares: Shares,
    /// Guaranteed when wanted, in millicores.
    #[serde(rename = "reservation_millicores")]
    pub reservation: Option<Millicores>,
    /// Never more, even on an idle host, in millicores; absent = none.
    #[serde(rename = "limit_millicores")]
    pub limit: Option<Millicores>,
}

impl Default for CpuEnvelope {
    fn default() -> Self {
        Self {
            shares: Shares::NORMAL,
            reservation: None,
            limit: None,
        }
    }
}

/// How many requests of a tenant the host holds at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct RequestBounds {
    /// Requests with an instance.
    pub in_flight: u32,
    /// Requests that wait for one.
    pub queued: u32,
    /// Requests admitted per second; absent = no bound.
    pub per_second: Option<u32>,
}

impl Default for RequestBounds {
    fn default() -> Self {
        Self {
            in_flight: 256,
            queued: 1024,
            per_second: None,
        }
    }
}

/// The resource envelope of a tenant.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "RawTenantSpec", into = "TenantSpecOut")]
pub struct TenantSpec {
    /// CPU shares, reservation, limit.
    pub cpu: CpuEnvelope,
    /// Memory of all its guests together; absent = none but the host's.
    pub memory_limit: Option<Bytes>,
    /// Bytes of all its volumes together; absent = none but the host's.
    pub storage_limit: Option<Bytes>,
    /// Bounds on requests.
    pub requests: RequestBounds,
}

#[derive(Serialize)]
struct LimitOut {
    limit_bytes: Option<Bytes>,
}

#[derive(Serialize)]
struct TenantSpecOut {
    cpu: CpuEnvelope,
    memory: LimitOut,
    storage: LimitOut,
    requests: RequestBounds,
}

impl From<TenantSpec> for TenantSpecOut {
    fn from(spec: TenantSpec) -> Self {
        Self {
            cpu: spec.cpu,
            memory: LimitOut {
                limit_bytes: spec.memory_limit,
            },
            storage: LimitOut {
                limit_bytes: spec.storage_limit,
            },
            requests: spec.requests,
        }
    }
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct RawCpu {
    shares: Option<Shares>,
    reservation: Option<Millicores>,
    reservation_millicores: Option<u64>,
    limit: Option<Millicores>,
    limit_millicores: Option<u64>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RawLimit {
    #[serde(alias = "limit_bytes")]
    limit: Option<Bytes>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RawRequests {
    in_flight: Option<u32>,
    queued: Option<u32>,
    per_second: Option<u32>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RawTenantSpec {
    cpu: RawCpu,
    memory: RawLimit,
    storage: RawLimit,
    requests: RawRequests,
}

/// Most requests of one tenant that a host is ready to hold.
const REQUESTS_MAX: u32 = 100_000;

fn millicores(
    errors: &mut SpecErrors,
    path: &str,
    quantity: Option<Millicores>,
    bare: Option<u64>,
) -> Option<Millicores> {
    match (quantity, bare) {
        (Some(_), Some(_)) => {
            errors.push(path, "given twice, as a quantity and in millicores");
            None
        }
        (Some(quantity), None) => Some(quantity),
        (None, Some(bare)) => Millicores::new(bare)
            .map_err(|error| errors.push(path, error))
            .ok(),
        (None, None) => None,
    }
}

impl RawCpu {
    pub(crate) fn check(self, errors: &mut SpecErrors) -> CpuEnvelope {
        let reservation = millicores(
            errors,
            "cpu.reservation",
            self.reservation,
            self.reservation_millicores,
        );
        let limit = millicores(errors, "cpu.limit", self.limit, self.limit_millicores);
        if let (Some(reservation), Some(limit)) = (reservation, limit)
            && reservation > limit
        {
            let (reservation, limit) = (reservation.get(), limit.get());
            errors.push(
                "cpu.reservation",
                format_args!("{reservation}m is more than the limit of {limit}m"),
            );
        }
        CpuEnvelope {
            shares: self.shares.unwrap_or(Shares::NORMAL),
            reservation,
            limit,
        }
    }
}

impl TryFrom<RawTenantSpec> for TenantSpec {
    type Error = SpecErrors;

    fn try_from(raw: RawTenantSpec) -> Result<Self, SpecErrors> {
        let mut errors = SpecErrors::default();
        let cpu = raw.cpu.check(&mut errors);
        let defaults = RequestBounds::default();
        let requests = RequestBounds {
            in_flight: raw.requests.in_flight.unwrap_or(defaults.in_flight),
            queued: raw.requests.queued.unwrap_or(defaults.queued),
            per_second: raw.requests.per_second,
        };
        if !(1..=REQUESTS_MAX).contains(&requests.in_flight) {
            errors.push(
                "requests.in_flight",
                format_args!("goes from 1 to {REQUESTS_MAX}"),
            );
        }
        if requests.queued > REQUESTS_MAX {
            errors.push(
                "requests.queued",
                format_args!("goes from 0 to {REQUESTS_MAX}"),
            );
        }
        if requests.per_second == Some(0) {
            errors.push(
                "requests.per_second",
                "is at least 1, or absent for no bound",
            );
        }
        errors.into_result(Self {
            cpu,
            memory_limit: raw.memory.limit,
            storage_limit: raw.storage.limit,
            requests,
        })
    }
}

/// The limits on one request of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct RequestLimits {
    /// All linear memories and tables of one instance together.
    #[serde(rename = "memory_bytes")]
    pub memory: Bytes,
    /// Fuel of one request.
    pub fuel: Fuel,
    /// Wall-clock time of one request, from instantiation to the end of the guest.
    #[serde(rename = "timeout_ms")]
    pub timeout: Millis,
    /// Largest request body.
    #[serde(rename = "request_body_bytes")]
    pub request_body: Bytes,
}

impl Default for RequestLimits {
    fn default() -> Self {
        Self {
            memory: Bytes::mib(64),
            fuel: Fuel::constant(1_000_000_000),
            timeout: Millis::constant(30_000),
            request_body: Bytes::mib(10),
        }
    }
}

impl RequestLimits {
    /// The tighter of two sets of limits, field by field.
    #[must_use]
    pub fn min(self, other: Self) -> Self {
        Self {
            memory: self.memory.min(other.memory),
            fuel: self.fuel.min(other.fuel),
            timeout: self.timeout.min(other.timeout),
            request_body: self.request_body.min(other.request_body),
        }
    }
}

/// A route beside the service's own name: a host and a path prefix.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Route {
    host: String,
    /// Begins with `/`; without the final `*`.
    prefix: String,
    /// Whether the prefix must be the whole path.
    exact: bool,
}

/// Why a route was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RouteError {
    /// The part before the first `/` is not a host name.
    #[error("{0:?} is not a host name; a route is written \"api.example.com/v2/*\"")]
    Host(String),
    /// The part from the first `/` on is not a path.
    #[error("{0:?} is not a path; a `*` may only stand at its end, after a '/'")]
    Path(String),
}

impl Route {
    /// The host, lower case.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The prefix, from its first `/`.
    #[must_use]
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Whether a request path belongs to this route.
    #[must_use]
    pub fn matches(&self, path: &str) -> bool {
        if self.exact {
            path == self.prefix
        } else {
            // "/v2/*" takes "/v2" as well as everything below it.
            path.starts_with(&self.prefix) || path == self.prefix.trim_end_matches('/')
        }
    }
}

/// A host name in the form that routing compares: lower-case labels, no port, no final dot.
#[must_use]
pub fn is_host_name(host: &str) -> bool {
    let label = |label: &str| {
        let bytes = label.as_bytes();
        !bytes.is_empty()
            && bytes.len() <= crate::name::NAME_MAX_BYTES
            && bytes
                .iter()
                .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || *c == b'-' || *c == b'_')
            && bytes[0] != b'-'
            && bytes[bytes.len() - 1] != b'-'
    };
    // RFC 1035, 2.3.4: 255 octets on the wire are 253 characters of text.
    host.len() <= 253 && host.split('.').all(label)
}

impl TryFrom<String> for Route {
    type Error = RouteError;

    fn try_from(text: String) -> Result<Self, RouteError> {
        let (host, path) = text.split_at(text.find('/').unwrap_or(text.len()));
        if !is_host_name(host) {
            return Err(RouteError::Host(host.chars().take(80).collect()));
        }
        let path = if path.is_empty() { "/*" } else { path };
        let (prefix, exact) = match path.strip_suffix('*') {
            Some(prefix) => (prefix, false),
            None => (path, true),
        };
        let printable = prefix.bytes().all(|c| (0x21..0x7f).contains(&c));
        let open = !exact && !prefix.ends_with('/');
        if open || prefix.contains('*') || prefix.contains('?') || !printable || path.len() > 1024 {
            return Err(RouteError::Path(path.chars().take(80).collect()));
        }
        Ok(Self {
            host: host.to_owned(),
            prefix: prefix.to_owned(),
            exact,
        })
    }
}

impl From<Route> for String {
    fn from(route: Route) -> Self {
        let star = if route.exact { "" } else { "*" };
        format!("{}{}{star}", route.host, route.prefix)
    }
}

/// How often one instance may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reuse {
    /// Requests that one instance serves at most, one after the other.
    pub requests: NonZeroU32,
}

/// What a tenant sets for a service.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "RawServiceSpec")]
pub struct ServiceSpec {
    /// Limits on one request.
    pub limits: RequestLimits,
    /// Environment of the guest.
    pub env: BTreeMap<String, String>,
    /// Hosts and paths beside `<service>.<tenant>.<domain>`.
    pub routes: Vec<Route>,
    /// What its guests keep, and where they find it.
    pub volumes: Vec<Mount>,
    /// Stores of keys and values that its guests may open.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub stores: Vec<StoreGrant>,
    /// Where its guests may send HTTP requests to.
    pub outbound: Vec<OutboundRule>,
    /// Whether answers carry `insula-usage`.
    pub usage_header: bool,
    /// The header that decides which version a client gets while traffic is split; absent: each
    /// request is decided by itself.
    pub sticky_header: Option<StickyHeader>,
    /// When a new version is taken back.
    pub auto_rollback: AutoRollback,
    /// Whether instances serve more than one request; absent: each request gets a fresh one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reuse: Option<Reuse>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RawLimits {
    #[serde(alias = "memory_bytes")]
    memory: Option<Bytes>,
    fuel: Option<Fuel>,
    timeout: Option<Millis>,
    timeout_ms: Option<u64>,
    #[serde(alias = "request_body_bytes")]
    request_body: Option<Bytes>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct RawServiceSpec {
    limits: RawLimits,
    env: BTreeMap<String, String>,
    routes: Vec<Route>,
    volumes: Vec<Mount>,
    stores: Vec<StoreGrant>,
    outbound: Vec<String>,
    usage_header: bool,
    sticky_header: Option<StickyHeader>,
    auto_rollback: Option<AutoRollback>,
    reuse: Option<Reuse>,
}

/// Most bytes of a service's environment, names and values together.
pub const ENV_MAX_BYTES: usize = 64 << 10;
/// Most variables of a service's environment.
pub const ENV_MAX_VARIABLES: usize = 256;
/// Most routes of one service.
pub const ROUTES_MAX: usize = 64;
/// The least memory that a Wasm instance can be given: one page.
const MEMORY_MIN: Bytes = Bytes::constant(64 << 10);

impl ServiceSpec {
    /// All volumes that it uses, with what it takes each for: those that it mounts, then its stores.
    pub fn used_volumes(&self) -> impl Iterator<Item = (&VolumeName, VolumeKind, MountMode)> {
        let mounts = self.volumes.iter();
        let mounts = mounts.map(|mount| (&mount.name, VolumeKind::Files, mount.mode));
        let stores = self.stores.iter();
        mounts.chain(stores.map(|store| (&store.name, VolumeKind::Store, store.mode)))
    }
}

impl TryFrom<RawServiceSpec> for ServiceSpec {
    type Error = SpecErrors;

    fn try_from(raw: RawServiceSpec) -> Result<Self, SpecErrors> {
        let mut errors = SpecErrors::default();
        let defaults = RequestLimits::default();
        let timeout = match (raw.limits.timeout, raw.limits.timeout_ms) {
            (Some(_), Some(_)) => {
                errors.push(
                    "limits.timeout",
                    "given twice, as a quantity and in milliseconds",
                );
                None
            }
            (Some(timeout), None) => Some(timeout),
            (None, Some(ms)) => Millis::new(ms)
                .map_err(|error| errors.push("limits.timeout_ms", error))
                .ok(),
            (None, None) => None,
        };
        let limits = RequestLimits {
            memory: raw.limits.memory.unwrap_or(defaults.memory),
            fuel: raw.limits.fuel.unwrap_or(defaults.fuel),
            timeout: timeout.unwrap_or(defaults.timeout),
            request_body: raw.limits.request_body.unwrap_or(defaults.request_body),
        };
        if limits.memory < MEMORY_MIN {
            errors.push(
                "limits.memory",
                "an instance needs at least one page, 64KiB",
            );
        }
        check_env(&mut errors, &raw.env);
        if raw.routes.len() > ROUTES_MAX {
            errors.push(
                "routes",
                format_args!("at most {ROUTES_MAX}, {} given", raw.routes.len()),
            );
        }
        volume::check(&mut errors, &raw.volumes);
        volume::check_stores(&mut errors, &raw.stores);
        let outbound = check_outbound(&mut errors, &raw.outbound);
        errors.into_result(Self {
            limits,
            env: raw.env,
            routes: raw.routes,
            volumes: raw.volumes,
            stores: raw.stores,
            outbound,
            usage_header: raw.usage_header,
            sticky_header: raw.sticky_header,
            auto_rollback: raw.auto_rollback.unwrap_or_default(),
            reuse: raw.reuse,
        })
    }
}

fn check_outbound(errors: &mut SpecErrors, given: &[String]) -> Vec<OutboundRule> {
    if given.len() > OUTBOUND_MAX {
        let count = given.len();
        errors.push(
            "outbound",
            format_args!("at most {OUTBOUND_MAX}, {count} given"),
        );
    }
    let rules = given.iter().take(OUTBOUND_MAX);
    let rules = rules.filter_map(|text| {
        let rule = text.parse::<OutboundRule>();
        rule.map_err(|error| errors.push("outbound", error)).ok()
    });
    rules.collect()
}

fn check_env(errors: &mut SpecErrors, env: &BTreeMap<String, String>) {
    if env.len() > ENV_MAX_VARIABLES {
        errors.push(
            "env",
            format_args!("at most {ENV_MAX_VARIABLES} variables, {} given", env.len()),
        );
    }
    let bytes: usize = env
        .iter()
        .map(|(name, value)| name.len() + value.len())
        .sum();
    if bytes > ENV_MAX_BYTES {
        errors.push(
            "env",
            format_args!("at most {ENV_MAX_BYTES} bytes, {bytes} given"),
        );
    }
    for (name, value) in env {
        if name.is_empty() || name.contains(['=', '\0']) {
            let shown: String = name.chars().take(80).collect();
            errors.push("env", format_args!("{shown:?} is not a variable's name"));
        }
        if value.contains('\0') {
            errors.push("env", format_args!("the value of {name:?} contains a NUL"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_contracts_tenant() {
        let json = r#"{"cpu":{"shares":1000,"reservation":"250m","limit":"1500m"},
            "memory":{"limit":"512MiB"},"storage":{"limit":"1GiB"},
            "requests":{"in_flight":256,"queued":1024,"per_second":null}}"#;
        let spec: TenantSpec = serde_json::from_str(json).unwrap();
        assert_eq!(spec.cpu.limit.map(Millicores::get), Some(1500));
        let printed = serde_json::to_value(&spec).unwrap();
        assert_eq!(printed["cpu"]["reservation_millicores"], 250);
        assert_eq!(printed["memory"]["limit_bytes"], 512 << 20);
        let again: TenantSpec = serde_json::from_value(printed).unwrap();
        assert_eq!(again, spec, "what was read can be written back");
    }

    #[test]
    fn the_contracts_service() {
        let json = r#"{"limits":{"memory":"64MiB","fuel":1000000000,"timeout":"30s",
            "request_body":"10MiB"},"env":{"K":"V"},"routes":["api.example.com/v2/*"],
            "volumes":[{"name":"data","path":"/data"}],"outbound":["https://API.example.com:443"],"usage_header":false}"#;
        let spec: ServiceSpec = serde_json::from_str(json).unwrap();
        assert_eq!(spec.limits, RequestLimits::default());
        let printed = serde_json::to_value(&spec).unwrap();
        assert_eq!(printed["limits"]["timeout_ms"], 30_000);
        assert_eq!(printed["routes"][0], "api.example.com/v2/*");
        assert_eq!(printed["outbound"][0], "https://api.example.com");
        assert_eq!(printed["volumes"][0]["mode"], "rw");
        let again: ServiceSpec = serde_json::from_value(printed).unwrap();
        assert_eq!(again, spec, "what was read can be written back");
    }

    #[test]
    fn empty_means_defaults_and_unknown_fields_are_refused() {
        assert_eq!(
            serde_json::from_str::<TenantSpec>("{}").unwrap(),
            TenantSpec::default()
        );
        assert_eq!(
            serde_json::from_str::<ServiceSpec>("{}").unwrap(),
            ServiceSpec::default()
        );
        let error = serde_json::from_str::<TenantSpec>(r#"{"cpus":{}}"#).unwrap_err();
        assert!(error.to_string().contains("cpus"), "{error}");
    }

    #[test]
    fn all_mistakes_at_once() {
        let json =
            r#"{"cpu":{"reservation":"2","limit":"1"},"requests":{"in_flight":0,"per_second":0}}"#;
        let error = serde_json::from_str::<TenantSpec>(json)
            .unwrap_err()
            .to_string();
        for path in [
            "cpu.reservation",
            "requests.in_flight",
            "requests.per_second",
        ] {
            assert!(error.contains(path), "{path} is missing in {error}");
        }
        let json = r#"{"env":{"A=B":"x"},"stores":[{"name":"s"},{"name":"s"}],"volumes":[{"name":"a","path":"/a"},{"name":"a","path":"/b"}],"outbound":["https://x/"],"limits":{"memory":1}}"#;
        let error = serde_json::from_str::<ServiceSpec>(json)
            .unwrap_err()
            .to_string();
        for path in ["env", "volumes", "stores", "outbound", "limits.memory"] {
            assert!(error.contains(path), "{path} is missing in {error}");
        }
    }

    #[test]
    fn routes() {
        let route = |text: &str| Route::try_from(text.to_owned());
        let below = route("api.example.com/v2/*").unwrap();
        assert!(below.matches("/v2/x") && below.matches("/v2") && !below.matches("/v20"));
        let exact = route("api.example.com/v2").unwrap();
        assert!(exact.matches("/v2") && !exact.matches("/v2/"));
        assert!(route("api.example.com").unwrap().matches("/anything"));
        for bad in [
            "",
            "/x",
            "API.example.com/",
            "a..b/",
            "a.b:80/",
            "a.b/x*",
            "a.b/*/c",
            "a.b/?q",
            "a.b/ä",
        ] {
            assert!(route(bad).is_err(), "{bad:?}");
        }
    }
}
