//! `density`: ten thousand services on one host, of which hardly any is asked.
//!
//! Every service has bytes of its own, so that nothing can be shared by their digest: a custom
//! section with its number is appended to `hello`, which means nothing to anybody (WebAssembly
//! Core Specification, "Custom Section"). All are deployed through the admin API.
//!
//! ```text
//!  one service, warm ─▶ all others deployed ─▶ idle ─▶ first requests ─▶ one, all, one, all …
//! ```
//!
//! An idle service has no code in memory, so its first request loads it. Before warm services are
//! measured, every one of them is asked once.
//!
//! Warm services are asked in two ways: at a constant rate, which tells what a request costs, and
//! as fast as they answer, which tells how many there are of them.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hdrhistogram::Histogram;
use serde_json::json;

use crate::common::{Common, HELLO, Whole, count};
use crate::cores::{Layout, Priority, while_bound};
use crate::crowd::{self, Answers, Crowd, Turns};
use crate::http::Call;
use crate::insula::{self, Desk, Host};
use crate::open_loop::{self, Generator};
use crate::page;
use crate::process::{Meter, resident_kib};
use crate::promise::{self, Finding, Promise, Sample, Unit};
use crate::say;
use crate::servers::Bed;
use crate::targets::{Targets, get};

/// Services of one tenant.
const PER_TENANT: usize = 10;
/// Deploys at once; the host compiles two at a time.
const DEPLOYERS: usize = 2;
/// Services whose first request is timed.
const COLD: usize = 500;
const CONNECTIONS: usize = 32;
const WARM_UP: Duration = Duration::from_secs(1);
/// How long code stays that nobody asks: the host's default, said again because the run waits for it.
const CODE_IDLE: &str = "60s";
/// Until the last code has left that deploying brought in.
const SETTLE: Duration = Duration::from_secs(66);
/// How often it is said how far deploying has come.
const TELL_EVERY: usize = 500;

/// Options of `density`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    common: Common,
    /// How many services; nothing is written with fewer than 10,000
    #[arg(long, default_value_t = FULL)]
    services: usize,
    /// How often a second warm services are asked
    #[arg(long, default_value_t = 4_000, value_parser = clap::value_parser!(u32).range(1..=50_000))]
    rate: u32,
}

const FULL: usize = 10_000;
const SERVICES_MAX: usize = 100_000;

/// Runs all, prints the table, writes it down.
pub(crate) fn run(options: &Options) -> Result<()> {
    if !(2..=SERVICES_MAX).contains(&options.services) {
        bail!("--services: from 2 to {SERVICES_MAX}");
    }
    let scratch = tempfile::tempdir().context("a directory for the servers")?;
    let hello = options.common.guest("hello")?;
    // Deploying takes its time, and what is looked at has little to do with the client's place.
    let layout = options.common.layouts().first().copied();
    let layout = layout.unwrap_or(Layout::Split);
    let bed = options.common.bed(layout, scratch.path(), "".into())?;
    let data = tempfile::tempdir_in(&bed.scratch)?.keep();
    let host = insula::start(&bed, &data, &["--code-idle", CODE_IDLE])?;
    let town = Town {
        options,
        bed: &bed,
        host,
        layout,
        hello,
    };
    let (samples, deployed) = while_bound(&bed.places.client, || town.look())?;
    let text = section(options, layout, &samples, deployed)?;
    say(&text);
    let whole = if options.services < FULL {
        Whole::Part
    } else {
        Whole::Everything
    };
    if let Some(folder) = options.common.out(whole) {
        page::write_section(folder, "density", &text)?;
    }
    Ok(())
}

/// A host full of services.
struct Town<'a> {
    options: &'a Options,
    bed: &'a Bed,
    host: Host,
    layout: Layout,
    hello: Vec<u8>,
}

/// Where the n-th service is.
fn place(number: usize) -> (String, String) {
    let tenant = format!("t{}", number / PER_TENANT);
    (tenant, format!("s{}", number % PER_TENANT))
}

fn name(number: usize) -> String {
    let (tenant, service) = place(number);
    insula::name(&service, &tenant)
}

/// A component with a section appended that nobody reads, so that it is another one.
fn distinct(component: &[u8], number: usize) -> Vec<u8> {
    const NAME: &[u8] = b"insula-bench";
    let mut section = vec![u8::try_from(NAME.len()).unwrap_or(0)];
    section.extend_from_slice(NAME);
    section.extend_from_slice(&(number as u64).to_le_bytes());
    let mut bytes = component.to_vec();
    bytes.push(0);
    // Shorter than 128 bytes: a single byte of LEB128.
    bytes.push(u8::try_from(section.len()).unwrap_or(0));
    bytes.extend_from_slice(&section);
    bytes
}

const IDLE: Promise = Promise::at_most("the idle host's CPU, of one core", Unit::Part, 0.01);
const RESIDENT: Promise = Promise::at_most(
    "resident memory of one more idle service",
    Unit::Kibibytes,
    100.0,
);
const FIRST: Promise = Promise::at_most(
    "first request to a cold service, 99th percentile",
    Unit::Seconds,
    0.010,
);
const WARM: Promise = Promise::at_most(
    "CPU of a request under a Zipf load, by that to one service",
    Unit::Times,
    1.2,
);

const ROTATION: Promise = Promise {
    what: "requests per second with all tenants in rotation, by those to one",
    unit: Unit::Times,
    bound: 0.9,
    at_least: true,
};

impl Town<'_> {
    fn look(&self) -> Result<(Vec<Sample>, Duration)> {
        let mut samples = Vec::new();
        let mut add = |promise, (figure, elsewhere): (f64, f64), round| {
            let sample = Sample {
                layout: self.layout,
                finding: Finding {
                    promise,
                    figure,
                    elsewhere,
                },
            };
            sample.tell(round);
            samples.push(sample);
        };
        self.deploy(0..1)?;
        self.warm(&Targets::one("/", &name(0)))?;
        let before = resident_kib(self.host.running.id())?;
        let began = Instant::now();
        self.deploy(1..self.options.services)?;
        let deployed = began.elapsed();
        sleep(SETTLE);
        let after = resident_kib(self.host.running.id())?;
        let idle = self.idle()?;
        let more = count(after.saturating_sub(before));
        let each = more / count(self.options.services as u64 - 1);
        add(RESIDENT, (each, idle.1), 0);
        add(IDLE, idle, 0);
        add(FIRST, self.first()?, 0);
        let hosts: Vec<String> = (0..self.options.services).map(name).collect();
        let (one, all) = (Targets::one("/", &hosts[0]), Targets::zipf("/", &hosts));
        let rotation: Vec<Vec<u8>> = (0..self.options.services)
            .step_by(PER_TENANT)
            .map(|number| get("/", &name(number)))
            .collect();
        self.throughput(&rotation)?;
        for round in 0..self.options.common.rounds {
            let (alone, first) = self.warm(&one)?;
            self.wake(&hosts)?;
            let (among, second) = self.warm(&all)?;
            add(WARM, (among / alone, first.max(second)), round);
            let (alone, first) = self.throughput(&rotation[..1])?;
            let (among, second) = self.throughput(&rotation)?;
            add(ROTATION, (among / alone, first.max(second)), round);
        }
        Ok((samples, deployed))
    }

    fn deploy(&self, numbers: std::ops::Range<usize>) -> Result<()> {
        let next = AtomicUsize::new(numbers.start);
        let worker = |desk: &Desk| -> Result<()> {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= numbers.end {
                    return Ok(());
                }
                let (tenant, service) = place(number);
                desk.tenant(&tenant, &json!({}))?;
                let bytes = distinct(&self.hello, number);
                desk.deploy(&tenant, &service, &json!({}), &bytes)
                    .with_context(|| format!("service {number}"))?;
                if number > 0 && number.is_multiple_of(TELL_EVERY) {
                    say(&format!("  {number} services deployed"));
                }
            }
        };
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..DEPLOYERS)
                .map(|_| scope.spawn(|| worker(&self.host.desk)))
                .collect();
            workers.into_iter().try_for_each(|worker| {
                worker
                    .join()
                    .unwrap_or_else(|_| bail!("a deployer panicked"))
            })
        })
    }

    fn idle(&self) -> Result<(f64, f64)> {
        let meter = Meter::begin(self.host.running.id(), &self.bed.places.all)?;
        sleep(self.options.common.measured());
        let metered = meter.end()?;
        Ok((metered.server_cores(), metered.elsewhere))
    }

    /// The 99th percentile of first requests to services that are spread over all, in seconds.
    fn first(&self) -> Result<(f64, f64)> {
        let meter = Meter::begin(self.host.running.id(), &self.bed.places.all)?;
        let mut latency: Histogram<u64> = Histogram::new(3)?;
        let cold = self.options.services - 1;
        let asked = cold.min(COLD);
        for index in 0..asked {
            let took = self.ask(&name(1 + index * cold / asked))?;
            latency.saturating_record(u64::try_from(took.as_micros())?);
        }
        let p99 = count(latency.value_at_quantile(0.99)) / 1e6;
        Ok((p99, meter.end()?.elsewhere))
    }

    /// One request on a connection of its own; how long it took.
    fn ask(&self, host: &str) -> Result<Duration> {
        let call = Call {
            method: "GET",
            path: "/",
            host,
            fields: "",
            body: b"",
        };
        let began = Instant::now();
        let (status, body) = call.send(self.host.ingress)?;
        let took = began.elapsed();
        if status != 200 || body != HELLO {
            bail!("{host}: {status}");
        }
        Ok(took)
    }

    /// Asks every service once, so that its code is in memory.
    fn wake(&self, hosts: &[String]) -> Result<()> {
        hosts.iter().try_for_each(|host| self.ask(host).map(drop))
    }

    /// Answers per second, as fast as they come.
    fn throughput(&self, requests: &[Vec<u8>]) -> Result<(f64, f64)> {
        let crowd = Crowd::start(crowd::Plan {
            address: self.host.ingress,
            requests: requests.to_vec(),
            turns: Turns::Rotating,
            connections: CONNECTIONS,
            answers: Answers::Counted,
            cores: self.bed.places.client.clone(),
            priority: Priority::PACE,
        })?;
        sleep(WARM_UP);
        let meter = Meter::begin(self.host.running.id(), &self.bed.places.all)?;
        let (before, began) = (crowd.seen(), Instant::now());
        sleep(self.options.common.measured());
        let (after, elapsed) = (crowd.seen(), began.elapsed());
        let elsewhere = meter.end()?.elsewhere;
        let seen = crowd.end()?;
        if seen.refusals + seen.failures > 0 {
            bail!("not all requests were answered: {seen:?}");
        }
        let answers = count(after.answers - before.answers);
        Ok((answers / elapsed.as_secs_f64(), elsewhere))
    }

    /// CPU of a request in seconds, at the rate that was asked for.
    fn warm(&self, targets: &Targets) -> Result<(f64, f64)> {
        let measured = self.options.common.measured();
        let generator = Generator::start(open_loop::Plan {
            address: self.host.ingress,
            targets: targets.clone(),
            expected: Some(HELLO.to_vec()),
            rate_per_second: f64::from(self.options.rate),
            connections: CONNECTIONS,
            head_start: open_loop::HEAD_START,
            warm_up: WARM_UP,
            measured,
            cores: self.bed.places.client.clone(),
            priority: Priority::PACE,
        })?;
        sleep(
            generator
                .measured_from
                .saturating_duration_since(Instant::now()),
        );
        let meter = Meter::begin(self.host.running.id(), &self.bed.places.all)?;
        sleep(measured);
        let metered = meter.end()?;
        let outcome = generator.join()?;
        let (errors, all) = (outcome.errors(), outcome.records.len() as u64);
        if errors > 0 {
            bail!("{errors} of {all} requests failed");
        }
        let requests = f64::from(self.options.rate) * metered.elapsed.as_secs_f64();
        let each = metered.server.total().as_secs_f64() / requests;
        Ok((each, metered.elsewhere))
    }
}

fn section(
    options: &Options,
    layout: Layout,
    samples: &[Sample],
    deployed: Duration,
) -> Result<String> {
    let mut text = String::new();
    let out = &mut text;
    let services = options.services;
    writeln!(out, "## What ten thousand services cost\n")?;
    writeln!(
        out,
        "{services} services of distinct bytes, {PER_TENANT} to a tenant, each a `hello` that was \
         uploaded and compiled by itself: {:.0} ms each, {DEPLOYERS} at a time. Memory is what the \
         host has more of after the last deploy than after the first, by the services between. \
         Under the Zipf load the n-th service is asked in proportion to 1/n; in rotation is one \
         service of each of {} tenants.\n",
        deployed.as_secs_f64() * 1e3 / count(services as u64 - 1),
        services.div_ceil(PER_TENANT)
    )?;
    promise::table(out, samples, layout)?;
    let common = &options.common;
    writeln!(
        out,
        "- Run: `{} --services {services} --rate {}`; {}; {} first requests, one after the \
         other, each on a new connection; warm services are asked in an open loop, {} s for one \
         and {} s for all in turn, {} times; idle is looked at for {} s.",
        common.command("density"),
        options.rate,
        layout.title().to_lowercase(),
        COLD.min(services - 1),
        common.seconds,
        common.seconds,
        common.rounds,
        common.seconds,
    )?;
    writeln!(out, "{}", page::provenance())?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_is_another_component_and_another_place() {
        let (one, two) = (distinct(b"wasm", 1), distinct(b"wasm", 2));
        assert_ne!(one, two);
        // Id 0, a size that counts what follows, a name with its length.
        assert_eq!(one[4], 0);
        assert_eq!(usize::from(one[5]), one.len() - 6);
        assert_eq!(&one[6..19], b"\x0cinsula-bench");
        assert_eq!(name(0), "s0.t0.localhost");
        assert_eq!(name(1_234), "s4.t123.localhost");
    }
}
