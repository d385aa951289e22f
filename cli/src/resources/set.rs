//! `set`: changes to a tenant's or a service's spec, on top of what is there.

use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result};
use clap::Args;
use insula_types::outbound::OutboundRule;
use insula_types::spec::Route;
use insula_types::volume::{Mount, MountMode, MountPath, StoreGrant};
use insula_types::{Bytes, Fuel, Millicores, Millis, Shares};
use serde_json::{Map, Value, json};

use crate::UsageError;

/// Takes a limit away.
pub(crate) const NONE: &str = "none";

/// Changes to a tenant. What is not given stays as it is.
#[derive(Debug, Args)]
pub(crate) struct TenantPatch {
    /// Start from this spec, in JSON or TOML, instead of the one that is there
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Weight against other tenants when CPU is short: 1 to 1000000, low, normal or high
    #[arg(long, value_parser = shares)]
    cpu_shares: Option<String>,
    /// CPU that is guaranteed when wanted, such as 250m; or none
    #[arg(long, value_parser = cpu)]
    cpu_reservation: Option<String>,
    /// CPU that is never exceeded, such as 1.5; or none
    #[arg(long, value_parser = cpu)]
    cpu_limit: Option<String>,
    /// Memory of all its guests together, such as 512MiB; or none
    #[arg(long, value_parser = bytes)]
    memory: Option<String>,
    /// Bytes of all its volumes together, such as 1GiB; or none
    #[arg(long, value_parser = bytes)]
    storage: Option<String>,
    /// Requests that have an instance at once
    #[arg(long)]
    in_flight: Option<u32>,
    /// Requests that wait for one
    #[arg(long)]
    queued: Option<u32>,
    /// Requests admitted per second, or none
    #[arg(long, value_parser = count)]
    per_second: Option<String>,
}

fn count(text: &str) -> Result<String, String> {
    if text != NONE && text.parse::<u32>().is_err() {
        return Err("a number, or none".to_owned());
    }
    Ok(text.to_owned())
}

impl TenantPatch {
    /// The spec to write, made from the one that is there.
    pub(crate) fn apply(&self, spec: Value) -> Result<Value> {
        let mut spec = start(self.file.as_deref(), spec)?;
        let shares = self.cpu_shares.as_deref().map(text);
        change(&mut spec, "cpu", "shares", "shares", shares);
        let reservation = self.cpu_reservation.as_deref().map(text);
        change(
            &mut spec,
            "cpu",
            "reservation",
            "reservation_millicores",
            reservation,
        );
        let limit = self.cpu_limit.as_deref().map(text);
        change(&mut spec, "cpu", "limit", "limit_millicores", limit);
        for (part, value) in [("memory", &self.memory), ("storage", &self.storage)] {
            change(
                &mut spec,
                part,
                "limit",
                "limit_bytes",
                value.as_deref().map(text),
            );
        }
        let per_second = self.per_second.as_deref();
        for (key, value) in [
            ("in_flight", self.in_flight.map(|number| json!(number))),
            ("queued", self.queued.map(|number| json!(number))),
            (
                "per_second",
                per_second.map(|text| json!(text.parse::<u32>().ok())),
            ),
        ] {
            change(&mut spec, "requests", key, key, value);
        }
        Ok(spec)
    }
}

/// Changes to a service. What is not given stays as it is.
#[derive(Debug, Args)]
pub(crate) struct ServicePatch {
    /// Start from this spec, in JSON or TOML, instead of the one that is there
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Memory of one instance, such as 64MiB
    #[arg(long, value_parser = bytes)]
    memory: Option<String>,
    /// Fuel of one request, such as 1G
    #[arg(long, value_parser = fuel)]
    fuel: Option<String>,
    /// Wall-clock time of one request, such as 30s
    #[arg(long, value_parser = duration)]
    timeout: Option<String>,
    /// Largest request body, such as 10MiB
    #[arg(long, value_parser = bytes)]
    request_body: Option<String>,
    /// Set a variable of the guest's environment; can be given more than once
    #[arg(short, long, value_name = "NAME=VALUE", value_parser = variable)]
    env: Vec<(String, String)>,
    /// Take a variable away; can be given more than once
    #[arg(long, value_name = "NAME")]
    unset_env: Vec<String>,
    /// A host and path to answer on, such as "api.example.com/v2/*"; all that are given replace
    /// all that are there
    #[arg(long, value_parser = route)]
    route: Vec<String>,
    /// Answer on no routes but the service's own name
    #[arg(long, conflicts_with = "route")]
    no_routes: bool,
    /// A volume and where guests find it, such as data:/data, or data:/data:ro; all that are given
    /// replace all that are there
    #[arg(long, value_name = "NAME:PATH[:ro]", value_parser = volume)]
    volume: Vec<Mount>,
    /// Mount no volumes
    #[arg(long, conflicts_with = "volume")]
    no_volumes: bool,
    /// A store that guests may open, such as counters, or counters:ro; all that are given replace all
    /// that are there
    #[arg(long, value_name = "NAME[:ro]", value_parser = store)]
    store: Vec<StoreGrant>,
    /// Let guests open no stores
    #[arg(long, conflicts_with = "store")]
    no_stores: bool,
    /// Where guests may send requests to, such as `https://api.example.com`; all that are given replace
    /// all that are there
    #[arg(long, value_name = "ORIGIN", value_parser = outbound)]
    outbound: Vec<String>,
    /// Let guests send no requests
    #[arg(long, conflicts_with = "outbound")]
    no_outbound: bool,
    /// Whether answers carry `insula-usage`
    #[arg(long)]
    usage_header: Option<bool>,
    /// Let one instance serve so many requests, one after the other, instead of a fresh one for
    /// each; `none` takes that back
    #[arg(long, value_name = "REQUESTS", value_parser = quantity::<NonZeroU32>)]
    reuse: Option<String>,
    /// While traffic is split: requests with the same value of this header get the same version;
    /// `none` decides each request by itself
    #[arg(long, value_name = "HEADER")]
    sticky_header: Option<String>,
}

fn variable(text: &str) -> Result<(String, String), String> {
    let (name, value) = text
        .split_once('=')
        .filter(|(name, _)| !name.is_empty())
        .ok_or_else(|| "write it as NAME=VALUE".to_owned())?;
    Ok((name.to_owned(), value.to_owned()))
}

fn route(text: &str) -> Result<String, String> {
    Route::try_from(text.to_owned())
        .map(String::from)
        .map_err(|error| error.to_string())
}

fn volume(text: &str) -> Result<Mount, String> {
    let mut parts = text.split(':');
    let (name, path) = (parts.next().unwrap_or_default(), parts.next());
    let path = path.ok_or("write it as NAME:PATH or NAME:PATH:ro")?;
    let mode = match (parts.next(), parts.next()) {
        (None, _) | (Some("rw"), None) => MountMode::Rw,
        (Some("ro"), None) => MountMode::Ro,
        _ => return Err("the last part is rw or ro".to_owned()),
    };
    Ok(Mount {
        name: name.parse().map_err(|error| format!("{error}"))?,
        path: MountPath::try_from(path.to_owned()).map_err(|error| error.to_string())?,
        mode,
    })
}

fn store(text: &str) -> Result<StoreGrant, String> {
    let (name, mode) = match text.split_once(':') {
        None => (text, MountMode::Rw),
        Some((name, "rw")) => (name, MountMode::Rw),
        Some((name, "ro")) => (name, MountMode::Ro),
        Some(_) => return Err("the last part is rw or ro".to_owned()),
    };
    let name = name.parse().map_err(|error| format!("{error}"))?;
    Ok(StoreGrant { name, mode })
}

fn outbound(text: &str) -> Result<String, String> {
    let rule = text.parse::<OutboundRule>();
    rule.map(String::from).map_err(|error| error.to_string())
}

impl ServicePatch {
    /// The spec to write, made from the one that is there.
    pub(crate) fn apply(&self, spec: Value) -> Result<Value> {
        let mut spec = start(self.file.as_deref(), spec)?;
        for (key, twin, value) in [
            ("memory", "memory_bytes", &self.memory),
            ("fuel", "fuel", &self.fuel),
            ("timeout", "timeout_ms", &self.timeout),
            ("request_body", "request_body_bytes", &self.request_body),
        ] {
            change(&mut spec, "limits", key, twin, value.as_deref().map(text));
        }
        for (name, value) in &self.env {
            change(&mut spec, "env", name, name, Some(json!(value)));
        }
        if let Some(env) = spec.get_mut("env").and_then(Value::as_object_mut) {
            for name in &self.unset_env {
                env.remove(name);
            }
        }
        if self.no_routes || !self.route.is_empty() {
            spec["routes"] = json!(self.route);
        }
        if self.no_volumes || !self.volume.is_empty() {
            spec["volumes"] = json!(self.volume);
        }
        if self.no_stores || !self.store.is_empty() {
            spec["stores"] = json!(self.store);
        }
        if self.no_outbound || !self.outbound.is_empty() {
            spec["outbound"] = json!(self.outbound);
        }
        if let Some(usage_header) = self.usage_header {
            spec["usage_header"] = json!(usage_header);
        }
        if let Some(reuse) = &self.reuse {
            spec["reuse"] = match reuse.parse::<NonZeroU32>() {
                Ok(requests) => json!({"requests": requests}),
                Err(_) => Value::Null,
            };
        }
        if let Some(header) = &self.sticky_header {
            spec["sticky_header"] = text(header);
        }
        Ok(spec)
    }
}

fn text(given: &str) -> Value {
    if given == NONE {
        Value::Null
    } else {
        json!(given)
    }
}

/// Keeps a quantity as it was typed, once it is known to be one; `none` takes a limit away.
fn quantity<T>(text: &str) -> Result<String, String>
where
    T: FromStr,
    T::Err: std::fmt::Display,
{
    if text != NONE {
        text.parse::<T>().map_err(|error| error.to_string())?;
    }
    Ok(text.to_owned())
}

fn shares(text: &str) -> Result<String, String> {
    text.parse::<Shares>().map_err(|error| error.to_string())?;
    Ok(text.to_owned())
}

fn cpu(text: &str) -> Result<String, String> {
    quantity::<Millicores>(text)
}

fn bytes(text: &str) -> Result<String, String> {
    quantity::<Bytes>(text)
}

fn fuel(text: &str) -> Result<String, String> {
    quantity::<Fuel>(text)
}

fn duration(text: &str) -> Result<String, String> {
    quantity::<Millis>(text)
}

/// The spec to start from: a file's, or the one that is there.
fn start(file: Option<&Path>, spec: Value) -> Result<Value> {
    let spec = match file {
        None => spec,
        Some(path) => {
            let shown = || path.display().to_string();
            let text = std::fs::read_to_string(path).with_context(shown)?;
            let toml = path
                .extension()
                .is_some_and(|extension| extension == "toml");
            let read = if toml {
                toml::from_str(&text).map_err(anyhow::Error::from)
            } else {
                serde_json::from_str(&text).map_err(anyhow::Error::from)
            };
            read.with_context(shown)?
        }
    };
    match spec {
        Value::Object(_) => Ok(spec),
        Value::Null => Ok(json!({})),
        _ => Err(UsageError("a spec is an object".to_owned()).into()),
    }
}

/// Sets `part.key`, and takes its canonical `twin` away: a host refuses to be told twice.
fn change(spec: &mut Value, part: &str, key: &str, twin: &str, value: Option<Value>) {
    let Some(value) = value else { return };
    let part = &mut spec[part];
    if !part.is_object() {
        *part = Value::Object(Map::new());
    }
    if let Some(part) = part.as_object_mut() {
        part.remove(twin);
        part.insert(key.to_owned(), value);
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use insula_types::{ServiceSpec, TenantSpec};

    use super::*;

    #[derive(Debug, Parser)]
    struct Tenant {
        #[command(flatten)]
        patch: TenantPatch,
    }

    #[derive(Debug, Parser)]
    struct Service {
        #[command(flatten)]
        patch: ServicePatch,
    }

    /// What a host gives, changed, is a spec that the host takes.
    fn tenant(flags: &[&str], spec: &TenantSpec) -> TenantSpec {
        let flags = ["set"].iter().chain(flags);
        let patch = Tenant::parse_from(flags).patch;
        let changed = patch.apply(serde_json::to_value(spec).unwrap()).unwrap();
        serde_json::from_value(changed).unwrap()
    }

    fn service(flags: &[&str], spec: &ServiceSpec) -> ServiceSpec {
        let flags = ["set"].iter().chain(flags);
        let patch = Service::parse_from(flags).patch;
        let changed = patch.apply(serde_json::to_value(spec).unwrap()).unwrap();
        serde_json::from_value(changed).unwrap()
    }

    #[test]
    fn a_tenant_is_changed_where_told() {
        let first = tenant(
            &[
                "--cpu-limit",
                "1500m",
                "--cpu-reservation",
                "250m",
                "--memory",
                "512MiB",
            ],
            &TenantSpec::default(),
        );
        let second = tenant(&["--cpu-limit", "2", "--cpu-reservation", "none"], &first);
        assert_eq!(second.cpu.limit.unwrap().get(), 2000);
        assert_eq!(second.cpu.reservation, None);
        assert_eq!(second.memory_limit, first.memory_limit);
        let third = tenant(&["--cpu-shares", "high", "--per-second", "5"], &second);
        assert_eq!(
            (third.cpu.shares.get(), third.requests.per_second),
            (2000, Some(5))
        );
        assert_eq!(
            tenant(&["--per-second", "none"], &third)
                .requests
                .per_second,
            None
        );
        assert_eq!(tenant(&[], &third), third);
    }

    #[test]
    fn a_service_is_changed_where_told() {
        let first = service(
            &[
                "--memory",
                "16MiB",
                "-e",
                "A=1",
                "-e",
                "B=x=y",
                "--route",
                "a.example/*",
            ],
            &ServiceSpec::default(),
        );
        assert_eq!(first.env["B"], "x=y");
        let second = service(
            &[
                "--timeout",
                "2s",
                "--unset-env",
                "A",
                "--usage-header",
                "true",
            ],
            &first,
        );
        assert_eq!(second.limits.memory, first.limits.memory);
        assert_eq!(second.limits.timeout.get(), 2000);
        assert!(second.usage_header && !second.env.contains_key("A"));
        assert_eq!(second.routes, first.routes);
        assert!(service(&["--no-routes"], &second).routes.is_empty());
    }

    #[test]
    fn bad_quantities_are_refused_before_anything_is_sent() {
        for bad in [
            ["set", "--cpu-limit", "lots"],
            ["set", "--memory", "64 XiB"],
            ["set", "--per-second", "many"],
        ] {
            assert!(Tenant::try_parse_from(bad).is_err(), "{bad:?}");
        }
        assert!(Service::try_parse_from(["set", "--env", "=x"]).is_err());
    }
}
