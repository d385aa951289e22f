//! Insula, started as an operator starts it and set up through its admin API. Nothing is turned
//! off: metering, limits and the scheduler are as they are for everybody.

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::http::Call;
use crate::process::Running;
use crate::servers::{Bed, PATIENCE, Served, free_address};

const TENANT: &str = "bench";
const SERVICE: &str = "hello";

/// A host that runs.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) running: Running,
    pub(crate) ingress: SocketAddr,
    pub(crate) desk: Desk,
}

/// Starts a host in a data directory of its own.
pub(crate) fn start(bed: &Bed, data: &Path, flags: &[&str]) -> Result<Host> {
    let (ingress, admin) = (free_address()?, free_address()?);
    let mut command = Command::new(&bed.insula);
    command
        .args(["serve", "--data"])
        .arg(data)
        .args(["--listen", &ingress.to_string()])
        .args(["--admin", &admin.to_string()])
        .args(["--workers", &bed.places.server.count().to_string()])
        .args(flags);
    let mut running = Running::start(command, &bed.places.server, &bed.log("insula"))?;
    let token = data.join("admin.token");
    let desk = running.wait_until("insula serve", PATIENCE, || {
        let token = fs::read_to_string(&token).with_context(|| token.display().to_string())?;
        let desk = Desk { admin, token };
        desk.call("GET", "/v1/host", "", b"").map(|_| desk)
    })?;
    Ok(Host {
        running,
        ingress,
        desk,
    })
}

/// Starts a host and deploys the component.
pub(crate) fn serve(bed: &Bed, data: &Path, spec: &Value) -> Result<Served> {
    let host = start(bed, data, &[])?;
    host.desk.tenant(TENANT, &json!({}))?;
    host.desk
        .deploy(TENANT, SERVICE, spec, &fs::read(&bed.component)?)?;
    Ok(Served {
        running: host.running,
        address: host.ingress,
        host: name(SERVICE, TENANT),
    })
}

/// What a client asks for in `Host`.
pub(crate) fn name(service: &str, tenant: &str) -> String {
    format!("{service}.{tenant}.localhost")
}

/// Where the admin API is, and what opens it.
#[derive(Debug, Clone)]
pub(crate) struct Desk {
    admin: SocketAddr,
    token: String,
}

impl Desk {
    /// Creates or changes a tenant.
    pub(crate) fn tenant(&self, tenant: &str, spec: &Value) -> Result<()> {
        self.put(&format!("/v1/tenants/{tenant}"), spec)
    }

    /// Creates a service and deploys a version of it.
    pub(crate) fn deploy(
        &self,
        tenant: &str,
        service: &str,
        spec: &Value,
        component: &[u8],
    ) -> Result<()> {
        let service = format!("/v1/tenants/{tenant}/services/{service}");
        self.put(&service, spec)?;
        let wasm = "Content-Type: application/wasm\r\n";
        self.call("POST", &format!("{service}/versions"), wasm, component)?;
        Ok(())
    }

    /// The CPU that was charged so far, in seconds.
    pub(crate) fn charged(&self) -> Result<Charged> {
        let call = Call {
            method: "GET",
            path: "/metrics",
            host: &self.admin.to_string(),
            fields: "",
            body: b"",
        };
        let (status, page) = call.send(self.admin)?;
        if status != 200 {
            bail!("/metrics: {status}");
        }
        Charged::parse(&String::from_utf8_lossy(&page))
    }

    fn put(&self, path: &str, spec: &Value) -> Result<()> {
        let json = "Content-Type: application/json\r\n";
        self.call("PUT", path, json, spec.to_string().as_bytes())?;
        Ok(())
    }

    fn call(&self, method: &str, path: &str, fields: &str, body: &[u8]) -> Result<Value> {
        let fields = format!("Authorization: Bearer {}\r\n{fields}", self.token.trim());
        let call = Call {
            method,
            path,
            host: &self.admin.to_string(),
            fields: &fields,
            body,
        };
        let (status, answer) = call.send(self.admin)?;
        if !(200..300).contains(&status) {
            bail!(
                "{method} {path}: {status} {}",
                String::from_utf8_lossy(&answer)
            );
        }
        Ok(serde_json::from_slice(&answer).unwrap_or(Value::Null))
    }
}

/// CPU seconds by whom they were charged to.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Charged {
    tenants: BTreeMap<String, f64>,
    host: f64,
}

impl Charged {
    fn parse(page: &str) -> Result<Self> {
        let mut charged = Self::default();
        for line in page.lines() {
            if let Some(rest) = line.strip_prefix("insula_cpu_seconds_total{") {
                let (labels, figure) = rest.rsplit_once("} ").context("a metric without value")?;
                let tenant = labels.split(',').find_map(|label| {
                    let value = label.strip_prefix("tenant=\"")?;
                    value.strip_suffix('"')
                });
                let tenant = tenant.context("CPU time of no tenant")?;
                *charged.tenants.entry(tenant.to_owned()).or_default() += figure.parse::<f64>()?;
            } else if let Some(figure) = line.strip_prefix("insula_host_cpu_seconds_total ") {
                charged.host = figure.parse()?;
            }
        }
        Ok(charged)
    }

    pub(crate) fn of(&self, tenant: &str) -> f64 {
        self.tenants.get(tenant).copied().unwrap_or(0.0)
    }

    pub(crate) fn tenants(&self) -> f64 {
        self.tenants.values().sum()
    }

    /// Everything: tenants and the host itself.
    pub(crate) fn all(&self) -> f64 {
        self.tenants() + self.host
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn charged_time_is_found_in_the_page() {
        let page = "# TYPE insula_cpu_seconds_total counter\n\
                    insula_cpu_seconds_total{tenant=\"a\",kind=\"wasm\"} 1.5\n\
                    insula_cpu_seconds_total{tenant=\"a\",kind=\"vm\"} 0.5\n\
                    insula_cpu_seconds_total{tenant=\"b\",kind=\"wasm\"} 0.25\n\
                    insula_host_cpu_seconds_total 3\n";
        let charged = Charged::parse(page).unwrap();
        assert_eq!((charged.of("a"), charged.of("b")), (2.0, 0.25));
        assert_eq!(charged.of("c"), 0.0);
        assert_eq!((charged.tenants(), charged.all()), (2.25, 5.25));
    }
}
