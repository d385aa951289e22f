//! Insula, started as an operator starts it and set up through its admin API. Nothing is turned
//! off: metering, limits and the scheduler are as they are for everybody.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::http::Call;
use crate::process::Running;
use crate::servers::{Bed, PATIENCE, Served, free_address};

const TENANT: &str = "bench";
const SERVICE: &str = "hello";

/// Starts a host in a data directory of its own and deploys the component.
pub(crate) fn serve(bed: &Bed, data: &Path) -> Result<Served> {
    let (ingress, admin) = (free_address()?, free_address()?);
    let mut command = Command::new(&bed.insula);
    command
        .args(["serve", "--data"])
        .arg(data)
        .args(["--listen", &ingress.to_string()])
        .args(["--admin", &admin.to_string()])
        .args(["--workers", &bed.places.server.count().to_string()]);
    let mut running = Running::start(command, &bed.places.server, &bed.log("insula"))?;
    let token = data.join("admin.token");
    let token = running.wait_until("insula serve", PATIENCE, || {
        let token = fs::read_to_string(&token).with_context(|| token.display().to_string())?;
        let desk = Desk { admin, token };
        desk.call("GET", "/v1/host", "", b"").map(|_| desk)
    })?;
    token.deploy(&fs::read(&bed.component)?)?;
    Ok(Served {
        running,
        address: ingress,
        host: format!("{SERVICE}.{TENANT}.localhost"),
    })
}

/// Where the admin API is, and what opens it.
struct Desk {
    admin: SocketAddr,
    token: String,
}

impl Desk {
    fn deploy(&self, component: &[u8]) -> Result<()> {
        let json = "Content-Type: application/json\r\n";
        let tenant = format!("/v1/tenants/{TENANT}");
        self.call("PUT", &tenant, json, b"{}")?;
        let service = format!("{tenant}/services/{SERVICE}");
        self.call("PUT", &service, json, b"{}")?;
        let wasm = "Content-Type: application/wasm\r\n";
        self.call("POST", &format!("{service}/versions"), wasm, component)?;
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
