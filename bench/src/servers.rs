//! Who takes part, and how each is started.

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::cores::Places;
use crate::http::Call;
use crate::insula;
use crate::process::Running;

/// How long a server may take until it answers; it compiles first.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// What somebody gives `wasmtime serve` who has read all of its options. The pool is sized and kept
/// resident as Insula's is (`docs/decisions/0003-instances.md`), backtraces are off; each request
/// still has an instance of its own.
pub(crate) const TUNED: [&str; 4] = [
    "-Opooling-allocator=y,memory-init-cow=y,pooling-pagemap-scan=auto,\
     pooling-memory-keep-resident=1572864,pooling-table-keep-resident=65536,\
     pooling-max-unused-warm-slots=1000,pooling-total-component-instances=2000,\
     pooling-total-core-instances=8000,pooling-total-memories=2000,\
     pooling-total-tables=8000,pooling-total-stacks=2000,pooling-max-memory-size=134217728",
    "-Ccache=n",
    "-Dmax-backtrace=0",
    "--max-instance-reuse-count=1",
];

/// What somebody gives it who has read that pooling is faster: the pool and its resident pages, as
/// above, and the rest left as it ships.
pub(crate) const POOLED: [&str; 1] = [
    "-Opooling-allocator=y,pooling-memory-keep-resident=1572864,\
     pooling-table-keep-resident=65536,pooling-max-unused-warm-slots=1000",
];

/// A server that is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Contestant {
    Insula,
    InsulaReusing,
    /// As the first command of the README builds it.
    InsulaPlain,
    WasmtimeTuned,
    /// The same, built with link-time optimisation.
    WasmtimeOptimised,
    /// The same, built as we build ours to be installed: by the same steps, with a profile of the
    /// same load.
    WasmtimeProfiled,
    WasmtimePooled,
    WasmtimeShipped,
    RawHyper,
}

impl Contestant {
    pub(crate) const ALL: [Self; 9] = [
        Self::RawHyper,
        Self::InsulaReusing,
        Self::Insula,
        Self::InsulaPlain,
        Self::WasmtimeProfiled,
        Self::WasmtimeOptimised,
        Self::WasmtimeTuned,
        Self::WasmtimePooled,
        Self::WasmtimeShipped,
    ];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Insula => "insula",
            Self::InsulaReusing => "insula, instances reused",
            Self::InsulaPlain => "insula, plain release",
            Self::WasmtimeTuned => "wasmtime serve, tuned",
            Self::WasmtimeOptimised => "wasmtime serve, tuned, with LTO",
            Self::WasmtimeProfiled => "wasmtime serve, tuned, with LTO and profile",
            Self::WasmtimePooled => "wasmtime serve, pooled",
            Self::WasmtimeShipped => "wasmtime serve, as shipped",
            Self::RawHyper => "raw hyper, no Wasm",
        }
    }

    /// Starts it, and waits until it answers.
    pub(crate) fn serve(self, bed: &Bed) -> Result<Served> {
        let mut served = match self {
            Self::Insula | Self::InsulaPlain => insula(bed, &json!({}))?,
            Self::InsulaReusing => insula(bed, &json!({"reuse": {"requests": 128}}))?,
            Self::WasmtimeTuned | Self::WasmtimeOptimised | Self::WasmtimeProfiled => {
                wasmtime(bed, &TUNED)?
            }
            Self::WasmtimePooled => wasmtime(bed, &POOLED)?,
            Self::WasmtimeShipped => wasmtime(bed, &[])?,
            Self::RawHyper => floor(bed)?,
        };
        let (address, host) = (served.address, served.host.clone());
        served.running.wait_until(self.name(), PATIENCE, || {
            let (status, body) = get(address, &host)?;
            if status != 200 || body != bed.expected {
                bail!("{status} {:?}", String::from_utf8_lossy(&body));
            }
            Ok(())
        })?;
        Ok(served)
    }
}

/// What all of them are given.
#[derive(Debug)]
pub(crate) struct Bed {
    pub(crate) component: PathBuf,
    pub(crate) insula: PathBuf,
    pub(crate) wasmtime: PathBuf,
    pub(crate) places: Places,
    /// For data directories, caches and logs.
    pub(crate) scratch: PathBuf,
    /// What the component answers.
    pub(crate) expected: Vec<u8>,
}

impl Bed {
    pub(crate) fn log(&self, name: &str) -> PathBuf {
        self.scratch.join(format!("{name}.log"))
    }
}

/// A server that answers.
#[derive(Debug)]
pub(crate) struct Served {
    pub(crate) running: Running,
    pub(crate) address: SocketAddr,
    pub(crate) host: String,
}

/// An address on the loopback interface that nobody listens on.
pub(crate) fn free_address() -> Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    Ok(listener.local_addr()?)
}

fn get(address: SocketAddr, host: &str) -> Result<(u16, Vec<u8>)> {
    let call = Call {
        method: "GET",
        path: "/",
        host,
        fields: "",
        body: b"",
    };
    call.send(address)
}

/// Starts `wasmtime serve` with a component; it may take a while until it answers.
pub(crate) fn wasmtime_serve(
    bed: &Bed,
    component: &Path,
    flags: &[&str],
) -> Result<(Running, SocketAddr)> {
    let address = free_address()?;
    let mut command = Command::new(&bed.wasmtime);
    command
        .args(["serve", "-Scli", &format!("--addr={address}")])
        .args(flags)
        .arg(component)
        .env("XDG_CACHE_HOME", bed.scratch.join("cache"));
    let running = Running::start(command, &bed.places.server, &bed.log("wasmtime"))?;
    Ok((running, address))
}

fn insula(bed: &Bed, spec: &Value) -> Result<Served> {
    let data = tempfile::tempdir_in(&bed.scratch)?;
    // The directory goes when `bed.scratch` does.
    insula::serve(bed, &data.keep(), spec)
}

fn wasmtime(bed: &Bed, flags: &[&str]) -> Result<Served> {
    let (running, address) = wasmtime_serve(bed, &bed.component, flags)?;
    Ok(Served {
        running,
        address,
        host: address.to_string(),
    })
}

fn floor(bed: &Bed) -> Result<Served> {
    let address = free_address()?;
    let this = std::env::current_exe().context("finding this program")?;
    let mut command = Command::new(this);
    let workers = bed.places.server.count().to_string();
    command.args(["floor", "--listen", &address.to_string()]);
    command.args(["--workers", &workers]);
    let running = Running::start(command, &bed.places.server, &bed.log("floor"))?;
    Ok(Served {
        running,
        address,
        host: address.to_string(),
    })
}

/// See [`POOLED`].
pub(crate) fn pooled_flags() -> String {
    POOLED.join(" ")
}

/// The command lines, for those who want to repeat them by hand.
pub(crate) fn tuned_flags() -> String {
    TUNED.join(" ")
}
