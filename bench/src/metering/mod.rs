//! `metering`: what fuel costs, on seven small computations.
//!
//! Three servers run the same component (`kernels`) side by side, one of them busy at a time:
//! Insula, with everything on; `wasmtime serve` of the same version without fuel; and the same with
//! fuel, which tells what of the difference is fuel and what is ours. A request computes for some
//! ten milliseconds, so that what a request costs otherwise does not matter.
//!
//! Then tenants of every kind share the host for a while, and what was charged is held against what
//! was used.

mod section;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::books::Books;
use crate::common::{Common, Whole, count};
use crate::cores::{Layout, Priority, while_bound};
use crate::crowd::{self, Answers, Crowd, Turns};
use crate::http::Call;
use crate::insula;
use crate::page;
use crate::peers;
use crate::process::{Meter, Running};
use crate::say;
use crate::servers::{Bed, PATIENCE, TUNED, wasmtime_serve};
use crate::targets::get;

const KERNELS: [&str; 7] = ["matmul", "sort", "hash", "map", "fib", "sieve", "strings"];
/// More than any request needs, less than any host refuses.
const FUEL: &str = "-Wfuel=1000000000000";
/// How long a request is made to compute, about.
const REQUEST: Duration = Duration::from_millis(50);
/// No kernel is so quick that it needs more rounds.
const ROUNDS_MAX: u64 = 1 << 24;
/// Before the books are opened.
const SETTLE: Duration = Duration::from_secs(1);

/// Options of `metering`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    common: Common,
    /// Only these kernels; nothing is written then
    #[arg(long, value_delimiter = ',', value_parser = KERNELS)]
    only: Vec<String>,
}

/// Who computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Server {
    Insula,
    Wasmtime,
    WasmtimeFuel,
}

impl Server {
    const ALL: [Self; 3] = [Self::Insula, Self::Wasmtime, Self::WasmtimeFuel];

    const fn name(self) -> &'static str {
        match self {
            Self::Insula => "insula",
            Self::Wasmtime => "wasmtime",
            Self::WasmtimeFuel => "wasmtime with fuel",
        }
    }
}

/// A server that answers.
struct Served {
    running: Running,
    address: SocketAddr,
    host: String,
}

/// One kernel on one server, once.
#[derive(Debug, Clone, Copy)]
struct Sample {
    kernel: &'static str,
    server: Server,
    round: u16,
    /// Server CPU of a request, in milliseconds.
    cpu_ms: f64,
    /// Units of fuel, where the server says so.
    fuel: Option<f64>,
    elsewhere: f64,
}

/// Runs all, prints the table, writes it down.
pub(crate) fn run(options: &Options) -> Result<()> {
    let scratch = tempfile::tempdir().context("a directory for the servers")?;
    let wasmtime = peers::wasmtime(options.common.missing())?;
    let bed = options
        .common
        .bed(Layout::Split, scratch.path(), wasmtime)?;
    let kernels: Vec<&'static str> = KERNELS
        .into_iter()
        .filter(|kernel| options.only.is_empty() || options.only.iter().any(|one| one == kernel))
        .collect();
    let (samples, books) = while_bound(&bed.places.client, || {
        let samples = measure(options, &bed, &kernels)?;
        Ok((samples, mixed(options, &bed)?))
    })?;
    let text = section::write(options, &kernels, &samples, books)?;
    say(&text);
    if let Some(folder) = options.common.out(Whole::unless_only(&options.only)) {
        page::write_section(folder, "metering", &text)?;
    }
    Ok(())
}

fn start(options: &Options, bed: &Bed, server: Server) -> Result<Served> {
    let component = options.common.guest_path("kernels");
    let with_fuel: Vec<&str> = TUNED.into_iter().chain([FUEL]).collect();
    let flags: &[&str] = match server {
        Server::Insula => {
            let data = tempfile::tempdir_in(&bed.scratch)?.keep();
            let host = insula::start(bed, &data, &[])?;
            host.desk.tenant("bench", &json!({}))?;
            let spec = json!({
                "limits": {"fuel": "1T", "timeout": "300s"},
                "usage_header": true
            });
            let component = options.common.guest("kernels")?;
            host.desk.deploy("bench", "kernels", &spec, &component)?;
            return Ok(Served {
                running: host.running,
                address: host.ingress,
                host: insula::name("kernels", "bench"),
            });
        }
        Server::Wasmtime => &TUNED,
        Server::WasmtimeFuel => &with_fuel,
    };
    let (mut running, address) = wasmtime_serve(bed, &component, flags)?;
    let host = address.to_string();
    running.wait_until(server.name(), PATIENCE, || {
        ask(address, &host, "/").map(|_| ())
    })?;
    Ok(Served {
        running,
        address,
        host,
    })
}

/// The answer's fields and body.
fn ask(address: SocketAddr, host: &str, path: &str) -> Result<(Vec<u8>, Option<f64>)> {
    let call = Call {
        method: "GET",
        path,
        host,
        fields: "",
        body: b"",
    };
    let answer = call.send_whole(address)?;
    if answer.status != 200 {
        bail!("{path}: {}", answer.status);
    }
    let fuel = answer.field("insula-usage").and_then(|usage| {
        let fuel = usage.split(';').find_map(|part| part.strip_prefix("fuel="));
        fuel?.parse().ok()
    });
    Ok((answer.body, fuel))
}

fn measure(options: &Options, bed: &Bed, kernels: &[&'static str]) -> Result<Vec<Sample>> {
    let mut servers = HashMap::new();
    for server in Server::ALL {
        servers.insert(server, start(options, bed, server)?);
    }
    let mut samples = Vec::new();
    for round in 0..options.common.rounds {
        for &kernel in kernels {
            let path = calibrate(&servers[&Server::Wasmtime], kernel)?;
            let mut order = Server::ALL;
            order.rotate_left(usize::from(round) % Server::ALL.len());
            let mut answers = Vec::new();
            for server in order {
                let served = &servers[&server];
                let busy = busy(options, bed, served, &path)
                    .with_context(|| format!("{path} on {}", server.name()))?;
                say(&format!(
                    "round {}  {path} on {}: {:.2} ms  elsewhere {:.0} %",
                    round + 1,
                    server.name(),
                    busy.cpu_ms,
                    busy.elsewhere * 100.0
                ));
                answers.push(busy.answer);
                samples.push(Sample {
                    kernel,
                    server,
                    round,
                    cpu_ms: busy.cpu_ms,
                    fuel: busy.fuel,
                    elsewhere: busy.elsewhere,
                });
            }
            answers.dedup();
            if answers.len() > 1 {
                bail!("{path}: not all servers computed the same");
            }
        }
    }
    Ok(samples)
}

/// As many rounds of a kernel as take some ten milliseconds.
fn calibrate(served: &Served, kernel: &str) -> Result<String> {
    let mut rounds = 1;
    loop {
        let path = format!("/{kernel}?n={rounds}");
        let began = Instant::now();
        ask(served.address, &served.host, &path)?;
        if began.elapsed() >= REQUEST || rounds >= ROUNDS_MAX {
            return Ok(path);
        }
        rounds *= 2;
    }
}

/// A server that computed for a while.
struct Busy {
    answer: Vec<u8>,
    /// Of a request.
    cpu_ms: f64,
    fuel: Option<f64>,
    elsewhere: f64,
}

/// CPU and fuel of a request, asked one after the other for a while.
fn busy(options: &Options, bed: &Bed, served: &Served, path: &str) -> Result<Busy> {
    let (answer, fuel) = ask(served.address, &served.host, path)?;
    let meter = Meter::begin(served.running.id(), &bed.places.all)?;
    let until = Instant::now() + options.common.measured();
    let mut requests = 0;
    while Instant::now() < until {
        let (again, _) = ask(served.address, &served.host, path)?;
        if again != answer {
            bail!("another answer than before");
        }
        requests += 1;
    }
    let metered = meter.end()?;
    let cpu_ms = metered.server.total().as_secs_f64() * 1e3 / count(requests);
    Ok(Busy {
        answer,
        cpu_ms,
        fuel,
        elsewhere: metered.elsewhere,
    })
}

/// Who shares the host while its books are looked at: a sample, a path, connections.
const MIX: [(&str, &str, usize); 6] = [
    ("hello", "/", 4),
    ("spin", "/", 2),
    ("trap", "/", 2),
    ("fault-storm", "/?mib=16", 1),
    ("host-calls", "/", 1),
    ("log-flood", "/", 1),
];

/// What was charged to tenants and host while they shared it, as a part of what was used.
fn mixed(options: &Options, bed: &Bed) -> Result<f64> {
    let data = tempfile::tempdir_in(&bed.scratch)?.keep();
    let host = insula::start(bed, &data, &[])?;
    let service = json!({"limits": {"fuel": "1T", "timeout": "300s"}});
    let mut crowds = Vec::new();
    for (sample, path, connections) in MIX {
        host.desk.tenant(sample, &json!({}))?;
        let component = options.common.guest(sample)?;
        host.desk.deploy(sample, "mix", &service, &component)?;
        crowds.push(Crowd::start(crowd::Plan {
            address: host.ingress,
            requests: vec![get(path, &insula::name("mix", sample))],
            turns: Turns::Own,
            connections,
            answers: Answers::Counted,
            cores: bed.places.client.clone(),
            priority: Priority::Ordinary,
        })?);
    }
    sleep(SETTLE);
    let open = || Books::open(Some(&host.desk), host.running.id());
    let before = open()?;
    sleep(options.common.measured());
    let ratio = match (before, open()?) {
        (Some(before), Some(after)) => before.ratio(&after),
        _ => f64::NAN,
    };
    for crowd in crowds {
        crowd.end()?;
    }
    Ok(ratio)
}
