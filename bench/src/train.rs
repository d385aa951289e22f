//! `train`: the load from which a compiler learns what is often run. `cargo xtask dist` calls it
//! with a program that counts its own branches; nothing is measured.
//!
//! Both programs get the same lessons, each from a server that was started afresh, in both ways of
//! dividing the cores; what only Insula has comes on top for Insula:
//!
//! | lesson | asks |
//! |---|---|
//! | fresh | `hello`, a fresh instance for each request, in a closed loop as in `cost` |
//! | uploads | `echo`, 16 KiB there and back, each on a connection of its own |
//! | reuse | Insula: `hello` with its instances reused |
//! | several | Insula: three tenants at once, more than there are workers |
//! | refusals | Insula: a service that there is not, a body too long, a guest that traps |
//!
//! Most of the counts are of the first lesson. That is meant: what a request of an ordinary service
//! runs is to be fast, and what else it may run is to be known as rare, not as never run.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::common::HELLO;
use crate::cores::{Layout, Places};
use crate::http::Call;
use crate::insula;
use crate::load::{self, Plan};
use crate::peers;
use crate::say;
use crate::servers::{Bed, Contestant, Served};

const CONNECTIONS: usize = 32;
const WARM_UP: Duration = Duration::from_millis(500);
const UPLOAD: &[u8] = &[b'x'; 16 << 10];
/// Sent as the length of a body that is not: above what services take by default.
const TOO_LONG: &str = "Content-Length: 1099511627776\r\n";

/// Options of `train`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The `insula` to train
    #[arg(
        long,
        required_unless_present = "wasmtime",
        conflicts_with = "wasmtime"
    )]
    insula: Option<PathBuf>,
    /// The `wasmtime` to train
    #[arg(long)]
    wasmtime: Option<PathBuf>,
    /// For how long the longest of the lessons is given
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=600))]
    seconds: u16,
    /// Where the built samples are
    #[arg(long, default_value_os_t = peers::repository().join("target/guests"))]
    guests: PathBuf,
}

/// Gives all lessons.
pub(crate) fn run(options: &Options) -> Result<()> {
    let scratch = tempfile::tempdir().context("a directory for the servers")?;
    let long = Duration::from_secs(u64::from(options.seconds));
    for layout in Layout::ALL {
        let bed = |sample: &str, expected: &[u8]| {
            Ok::<_, anyhow::Error>(Bed {
                component: options.guests.join(sample),
                insula: options.insula.clone().unwrap_or_default(),
                wasmtime: options.wasmtime.clone().unwrap_or_default(),
                places: Places::of(layout)?,
                scratch: scratch.path().to_owned(),
                expected: expected.to_vec(),
            })
        };
        let lessons = Lessons {
            hello: bed("hello.wasm", HELLO)?,
            // What it answers to a request without a body.
            echo: bed("echo.wasm", b"")?,
            layout,
            long,
        };
        if options.insula.is_some() {
            lessons.fresh(Contestant::Insula)?;
            lessons.uploads(Contestant::Insula)?;
            lessons.fresh(Contestant::InsulaReusing)?;
            lessons.several_and_refusals(&options.guests.join("trap.wasm"))?;
        } else {
            lessons.fresh(Contestant::WasmtimeTuned)?;
            lessons.uploads(Contestant::WasmtimeTuned)?;
        }
    }
    Ok(())
}

struct Lessons {
    hello: Bed,
    echo: Bed,
    layout: Layout,
    long: Duration,
}

impl Lessons {
    fn fresh(&self, contestant: Contestant) -> Result<()> {
        let served = contestant.serve(&self.hello)?;
        let asked = self.closed_loop(&served, &served.host, self.long)?;
        self.learned(contestant.name(), asked);
        Ok(())
    }

    fn uploads(&self, contestant: Contestant) -> Result<()> {
        let served = contestant.serve(&self.echo)?;
        let upload = Call {
            method: "POST",
            path: "/",
            host: &served.host,
            fields: "",
            body: UPLOAD,
        };
        let asked = again(&served, &upload, self.long / 4, |status| status == 200)?;
        self.learned("uploads", asked);
        Ok(())
    }

    /// A host with three tenants that are all asked at once; then what is refused.
    fn several_and_refusals(&self, trap: &Path) -> Result<()> {
        let data = tempfile::tempdir_in(&self.hello.scratch)?;
        let host = insula::start(&self.hello, data.path(), &[])?;
        let hello = std::fs::read(&self.hello.component)?;
        let specs = [json!({}), json!({}), json!({"reuse": {"requests": 128}})];
        let names: Vec<String> = (1..=specs.len()).map(|n| format!("tenant{n}")).collect();
        for (tenant, spec) in names.iter().zip(&specs) {
            host.desk.tenant(tenant, &json!({}))?;
            host.desk.deploy(tenant, "hello", spec, &hello)?;
        }
        let trap = std::fs::read(trap)?;
        host.desk.deploy(&names[0], "trap", &json!({}), &trap)?;
        let served = Served {
            running: host.running,
            address: host.ingress,
            host: insula::name("hello", &names[0]),
        };
        let asked = std::thread::scope(|scope| {
            let clients: Vec<_> = names
                .iter()
                .map(|tenant| insula::name("hello", tenant))
                .map(|name| scope.spawn(|| (self.closed_loop(&served, &name, self.long / 2), name)))
                .collect();
            let mut asked = 0;
            for client in clients {
                let (result, name) = client
                    .join()
                    .map_err(|_| anyhow::anyhow!("a client panicked"))?;
                asked += result.context(name)?;
            }
            Ok::<_, anyhow::Error>(asked)
        })?;
        self.learned("several tenants", asked);
        let ask = |host, fields| Call {
            method: "GET",
            path: "/",
            host,
            fields,
            body: b"",
        };
        let refused = |status| (400..600).contains(&status);
        let (nobody, trap) = (
            insula::name("nobody", &names[0]),
            insula::name("trap", &names[0]),
        );
        let mut asked = 0;
        for call in [
            ask(&nobody, ""),
            ask(&served.host, TOO_LONG),
            ask(&trap, ""),
        ] {
            asked += again(&served, &call, self.long / 16, refused)?;
        }
        self.learned("refusals", asked);
        Ok(())
    }

    fn closed_loop(&self, served: &Served, host: &str, time: Duration) -> Result<u64> {
        let plan = Plan {
            address: served.address,
            host: host.to_owned(),
            expected: self.hello.expected.clone(),
            connections: CONNECTIONS,
            warm_up: WARM_UP,
            measured: time,
            cores: self.hello.places.client.clone(),
            layout: self.layout,
        };
        let outcome = load::run(&plan, || Ok(()))?;
        if outcome.requests == 0 {
            bail!("{host} answered nothing");
        }
        Ok(outcome.requests)
    }

    fn learned(&self, what: &str, asked: u64) {
        say(&format!(
            "{} {what:<27} {asked:>8} requests",
            self.layout.word()
        ));
    }
}

/// Asks until the time is over, on a connection for each.
fn again(
    served: &Served,
    call: &Call<'_>,
    time: Duration,
    meant: impl Fn(u16) -> bool,
) -> Result<u64> {
    let deadline = Instant::now() + time;
    let mut asked = 0;
    while Instant::now() < deadline {
        let (status, _) = call.send(served.address)?;
        if !meant(status) {
            bail!("{} {}: {status}", call.method, call.host);
        }
        asked += 1;
    }
    Ok(asked)
}
