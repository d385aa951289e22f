//! A server with a victim and its neighbours on it, ready to be asked.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::attacks::{Attack, Strength};
use crate::common::{Common, HELLO};
use crate::http::Call;
use crate::insula::{self, Desk};
use crate::peers;
use crate::process::Running;
use crate::servers::{Bed, PATIENCE, TUNED, wasmtime_serve};
use crate::targets::get;
use crate::workerd;

/// Who hosts them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Server {
    Insula,
    WasmtimeShipped,
    WasmtimeTuned,
    WasmtimeTimeout,
    Workerd,
}

/// What somebody adds to the tuned flags who has been bitten.
const TIMEOUT: &str = "-Wtimeout=1s";

impl Server {
    pub(crate) const ALL: [Self; 5] = [
        Self::Insula,
        Self::WasmtimeTimeout,
        Self::WasmtimeTuned,
        Self::WasmtimeShipped,
        Self::Workerd,
    ];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Insula => "insula",
            Self::WasmtimeShipped => "wasmtime serve, as shipped",
            Self::WasmtimeTuned => "wasmtime serve, tuned",
            Self::WasmtimeTimeout => "wasmtime serve, tuned, -Wtimeout=1s",
            Self::Workerd => "workerd",
        }
    }

    /// Peers have no tenants to bound and no limits to set for each attack; endless loops are what
    /// they are compared by.
    pub(crate) fn takes(self, attack: Attack) -> bool {
        self == Self::Insula || attack == Attack::EndlessLoop
    }
}

/// What streets are built from.
#[derive(Debug)]
pub(crate) struct Ground {
    hello: Vec<u8>,
    /// The victim's share of a core that is promised to it, as the admin API takes it.
    pub(crate) reservation: String,
    /// The same component for victim and aggressors, where a server has room for one only.
    kernels: PathBuf,
    workerd: PathBuf,
    pub(crate) wasmtime: PathBuf,
}

impl Ground {
    pub(crate) fn prepare(common: &Common, servers: &[Server], reservation: &str) -> Result<Self> {
        let wasmtime = [
            Server::WasmtimeShipped,
            Server::WasmtimeTuned,
            Server::WasmtimeTimeout,
        ];
        Ok(Self {
            hello: common.guest("hello")?,
            reservation: reservation.to_owned(),
            kernels: common.guest_path("kernels"),
            workerd: if servers.contains(&Server::Workerd) {
                workerd::find(common.missing())?
            } else {
                PathBuf::new()
            },
            wasmtime: if servers.iter().any(|server| wasmtime.contains(server)) {
                peers::wasmtime(common.missing())?
            } else {
                PathBuf::new()
            },
        })
    }
}

/// A server that is ready.
#[derive(Debug)]
pub(crate) struct Street {
    pub(crate) running: Running,
    pub(crate) victim: SocketAddr,
    pub(crate) victim_host: String,
    pub(crate) aggressors: SocketAddr,
    /// One for each tenant that attacks.
    pub(crate) attacks: Vec<Vec<u8>>,
    /// Whose books can be read.
    pub(crate) desk: Option<Desk>,
}

const VICTIM: &str = "victim";

/// Starts a server with a victim and, where one is given, those who will attack it.
pub(crate) fn build(
    bed: &Bed,
    ground: &Ground,
    server: Server,
    attackers: Option<(Attack, Strength, &[u8])>,
) -> Result<Street> {
    let mut street = match server {
        Server::Insula => insula_street(bed, ground, attackers)?,
        Server::WasmtimeShipped => wasmtime_street(bed, ground, &[])?,
        Server::WasmtimeTuned => wasmtime_street(bed, ground, &TUNED)?,
        Server::WasmtimeTimeout => {
            let flags: Vec<&str> = TUNED.iter().copied().chain([TIMEOUT]).collect();
            wasmtime_street(bed, ground, &flags)?
        }
        Server::Workerd => workerd_street(bed, &ground.workerd)?,
    };
    let (address, host) = (street.victim, street.victim_host.clone());
    street.running.wait_until(server.name(), PATIENCE, || {
        let call = Call {
            method: "GET",
            path: "/",
            host: &host,
            fields: "",
            body: b"",
        };
        let (status, body) = call.send(address)?;
        if status != 200 || body != HELLO {
            bail!("{status} {:?}", String::from_utf8_lossy(&body));
        }
        Ok(())
    })?;
    Ok(street)
}

fn insula_street(
    bed: &Bed,
    ground: &Ground,
    attackers: Option<(Attack, Strength, &[u8])>,
) -> Result<Street> {
    // The directory goes when `bed.scratch` does.
    let data = tempfile::tempdir_in(&bed.scratch)?.keep();
    let host = insula::start(bed, &data, &[])?;
    let desk = &host.desk;
    let victim = match ground.reservation.as_str() {
        "none" => json!({}),
        reservation => json!({"cpu": {"reservation": reservation}}),
    };
    desk.tenant(VICTIM, &victim)?;
    desk.deploy(VICTIM, "hello", &json!({}), &ground.hello)?;
    let mut attacks = Vec::new();
    if let Some((attack, strength, component)) = attackers {
        for index in 0..strength.tenants {
            let tenant = format!("a{index}");
            desk.tenant(&tenant, &strength.tenant())
                .and_then(|()| desk.deploy(&tenant, "attack", &attack.service(), component))
                .with_context(|| format!("tenant {tenant}"))?;
            attacks.push(get(attack.path(), &insula::name("attack", &tenant)));
        }
    }
    Ok(Street {
        running: host.running,
        victim: host.ingress,
        victim_host: insula::name("hello", VICTIM),
        aggressors: host.ingress,
        attacks,
        desk: Some(host.desk),
    })
}

fn wasmtime_street(bed: &Bed, ground: &Ground, flags: &[&str]) -> Result<Street> {
    let (running, address) = wasmtime_serve(bed, &ground.kernels, flags)?;
    Ok(Street {
        running,
        victim: address,
        victim_host: address.to_string(),
        aggressors: address,
        attacks: vec![get("/endless", &address.to_string())],
        desk: None,
    })
}

fn workerd_street(bed: &Bed, program: &Path) -> Result<Street> {
    let pair = workerd::start(bed, program)?;
    Ok(Street {
        running: pair.running,
        victim: pair.victim,
        victim_host: pair.victim.to_string(),
        aggressors: pair.hog,
        attacks: vec![get("/", &pair.hog.to_string())],
        desk: None,
    })
}
