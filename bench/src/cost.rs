//! `cost`: server CPU per request of `hello`, a fresh instance for each, everything on.
//!
//! For each layout, for each round, every server in turn (the order moves on by one each round) is
//! started, warmed, measured and ended. Ratios are taken within a round and the median of them is
//! published, so that what disturbs a round disturbs both sides of its ratio.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::common::{HELLO, count};
use crate::cores::{Layout, Places};
use crate::load::{self, Plan};
use crate::peers::{self, Missing};
use crate::process::{busy, tree_cpu};
use crate::servers::{Bed, Contestant};
use crate::{report, say};

const CONNECTIONS: usize = 32;
const WARM_UP: Duration = Duration::from_secs(1);

/// Options of `cost`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// How often every server is measured
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=100))]
    rounds: u16,
    /// For how long, each time
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=600))]
    seconds: u16,
    /// Only this way of dividing the cores; both when not given
    #[arg(long, value_enum)]
    layout: Option<Layout>,
    /// Where `benchmarks.md` and the plots go; nothing is written when it is `-`
    #[arg(long, default_value_os_t = peers::repository().join("docs"))]
    out: PathBuf,
    /// The component to serve: `hello`
    #[arg(long)]
    component: Option<PathBuf>,
    /// The `insula` to measure
    #[arg(long)]
    insula: Option<PathBuf>,
    /// Build the peers that are missing
    #[arg(long)]
    install_peers: bool,
    /// Only these servers, for a look in between: nothing is written
    #[arg(long, value_enum, hide = true)]
    only: Vec<Contestant>,
}

impl Options {
    const fn missing(&self) -> Missing {
        if self.install_peers {
            Missing::Installed
        } else {
            Missing::Refused
        }
    }
}

/// One server, measured once.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sample {
    pub(crate) contestant: Contestant,
    pub(crate) round: u16,
    pub(crate) user_us: f64,
    pub(crate) system_us: f64,
    pub(crate) per_second: f64,
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) errors: u64,
    /// The client's CPU per request.
    pub(crate) client_us: f64,
    /// What part of the cores went to neither server nor client.
    pub(crate) elsewhere: f64,
}

impl Sample {
    /// Server CPU per request; not a number when nothing was answered.
    pub(crate) fn cpu_us(&self) -> f64 {
        self.user_us + self.system_us
    }
}

/// All samples of one layout.
#[derive(Debug)]
pub(crate) struct Series {
    pub(crate) layout: Layout,
    pub(crate) samples: Vec<Sample>,
    /// Whether the client had the priority that the layout asks for.
    pub(crate) real_time: bool,
}

/// Runs all, prints the table, writes it down.
pub(crate) fn run(options: &Options) -> Result<()> {
    let scratch = tempfile::tempdir().context("a directory for the servers")?;
    let mut contestants = if options.only.is_empty() {
        Contestant::ALL.to_vec()
    } else {
        options.only.clone()
    };
    // Each takes long to build, and the page says where one is missing.
    let built = |contestant: &Contestant| match contestant {
        Contestant::WasmtimeOptimised => peers::wasmtime_optimised(options.missing()).map(drop),
        Contestant::WasmtimeProfiled => peers::wasmtime_profiled().map(drop),
        _ => Ok(()),
    };
    contestants.retain(|contestant| {
        let built = built(contestant);
        if let Err(error) = &built {
            say(&format!("without {}: {error:#}", contestant.name()));
        }
        built.is_ok()
    });
    let layouts: Vec<Layout> = match options.layout {
        Some(layout) => vec![layout],
        None => Layout::ALL.to_vec(),
    };
    let mut all = Vec::new();
    for layout in layouts {
        let bed = |contestant: &Contestant| {
            let bed = bed(options, layout, scratch.path(), *contestant)?;
            Ok((*contestant, bed))
        };
        let beds = contestants.iter().map(bed).collect::<Result<Vec<_>>>()?;
        all.push(series(options, layout, &beds)?);
    }
    let page = report::Cost {
        series: &all,
        rounds: options.rounds,
        seconds: options.seconds,
        connections: CONNECTIONS,
    };
    say(&page.section()?);
    if options.only.is_empty() && options.out.as_os_str() != "-" {
        page.write(&options.out)?;
    }
    Ok(())
}

/// What one of them is given; it looks for no program but its own.
fn bed(
    options: &Options,
    layout: Layout,
    scratch: &std::path::Path,
    contestant: Contestant,
) -> Result<Bed> {
    let missing = options.missing();
    let component = match &options.component {
        Some(path) => path.clone(),
        None => peers::built("target/guests/hello.wasm", "cargo xtask guests")?,
    };
    let (mut insula, mut wasmtime) = (PathBuf::new(), PathBuf::new());
    match contestant {
        Contestant::Insula | Contestant::InsulaReusing => {
            insula = match &options.insula {
                Some(path) => path.clone(),
                None => peers::built("target/pgo/bin/insula", "cargo xtask dist")?,
            };
        }
        Contestant::InsulaPlain => {
            insula = peers::built("target/release/insula", "cargo build --release -p insula")?;
        }
        Contestant::WasmtimeTuned | Contestant::WasmtimePooled | Contestant::WasmtimeShipped => {
            wasmtime = peers::wasmtime(missing)?;
        }
        Contestant::WasmtimeOptimised => wasmtime = peers::wasmtime_optimised(missing)?,
        Contestant::WasmtimeProfiled => wasmtime = peers::wasmtime_profiled()?,
        Contestant::RawHyper => {}
    }
    Ok(Bed {
        component,
        insula,
        wasmtime,
        places: Places::of(layout)?,
        scratch: scratch.to_owned(),
        expected: HELLO.to_vec(),
    })
}

fn series(options: &Options, layout: Layout, beds: &[(Contestant, Bed)]) -> Result<Series> {
    let mut series = Series {
        layout,
        samples: Vec::new(),
        real_time: true,
    };
    for round in 0..options.rounds {
        let mut order: Vec<_> = beds.iter().collect();
        order.rotate_left(usize::from(round) % beds.len());
        for (contestant, bed) in order {
            let contestant = *contestant;
            let (sample, real_time) = measure(options, layout, bed, contestant, round)
                .with_context(|| format!("{} round {}", layout.word(), round + 1))?;
            series.real_time &= real_time;
            say(&format!(
                "{} round {}/{}  {:<43} {:>6.1} µs ({:.1} user + {:.1} kernel)  {:>7.0}/s  \
                 p99 {:.0} µs  {} errors  client {:.1} µs  elsewhere {:.0} %",
                layout.word(),
                round + 1,
                options.rounds,
                contestant.name(),
                sample.cpu_us(),
                sample.user_us,
                sample.system_us,
                sample.per_second,
                sample.p99_us,
                sample.errors,
                sample.client_us,
                sample.elsewhere * 100.0,
            ));
            series.samples.push(sample);
        }
    }
    Ok(series)
}

fn measure(
    options: &Options,
    layout: Layout,
    bed: &Bed,
    contestant: Contestant,
    round: u16,
) -> Result<(Sample, bool)> {
    let served = contestant.serve(bed)?;
    let plan = Plan {
        address: served.address,
        host: served.host.clone(),
        expected: bed.expected.clone(),
        connections: CONNECTIONS,
        warm_up: WARM_UP,
        measured: Duration::from_secs(u64::from(options.seconds)),
        cores: bed.places.client.clone(),
        layout,
    };
    let server = served.running.id();
    let outcome = load::run(&plan, || Ok((tree_cpu(server)?, busy(&bed.places.all)?)))
        .with_context(|| contestant.name())?;
    let (cpu, busy) = (
        outcome.after.0 - outcome.before.0,
        outcome.after.1.saturating_sub(outcome.before.1),
    );
    let each = |time: Duration| time.as_secs_f64() * 1e6 / count(outcome.requests);
    let latency_us = |quantile| count(outcome.latency.value_at_quantile(quantile)) / 1e3;
    let elapsed = outcome.elapsed.as_secs_f64();
    let cores = count(bed.places.all.count() as u64);
    let other = busy.saturating_sub(cpu.total() + outcome.client_cpu);
    let sample = Sample {
        contestant,
        round,
        user_us: each(cpu.user),
        system_us: each(cpu.system),
        per_second: count(outcome.requests) / elapsed,
        p50_us: latency_us(0.5),
        p99_us: latency_us(0.99),
        errors: outcome.errors,
        client_us: each(outcome.client_cpu),
        elsewhere: other.as_secs_f64() / (elapsed * cores),
    };
    Ok((sample, outcome.real_time || layout == Layout::Split))
}
