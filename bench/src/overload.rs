//! `overload`: one tenant asks for three times what the host can do.
//!
//! ```text
//!  alone          the others' service by itself
//!  peak           beside a tenant that always has some requests under way: what it can get
//!  calm           beside that tenant at half its peak, asked in an open loop
//!  flood          … at three times its peak
//!  after          … at half its peak again, at once
//! ```
//!
//! Others are `hello` at a constant rate; the tenant asks for a computation of about a millisecond.
//! Its bounds are those that a tenant has by default.

use std::fmt::Write as _;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::common::{Common, HELLO, Whole, count};
use crate::cores::{Layout, Priority, while_bound};
use crate::crowd::{self, Answers, Crowd, Turns};
use crate::insula;
use crate::open_loop::{self, Ending, Generator, Outcome, Record};
use crate::page;
use crate::process::{Meter, Running};
use crate::promise::{self, Finding, Promise, Sample, Unit};
use crate::say;
use crate::servers::Bed;
use crate::targets::{Targets, get};

const PATH: &str = "/fib?n=100";
const FLOOD: f64 = 3.0;
const CALM: f64 = 0.5;
/// More than a tenant may have under way and waiting by default: a flood is not held back by its
/// own clients.
const FLOOD_CONNECTIONS: usize = 2_048;
const OTHERS_CONNECTIONS: usize = 32;
const PEAK_CONNECTIONS: usize = 32;
const WARM_UP: Duration = Duration::from_secs(1);
/// Recovery is looked at in steps of this.
const STEP: Duration = Duration::from_millis(100);
/// A step is as before when its 99th percentile is at most so many times that of the calm, and
/// this much more.
const AS_BEFORE: f64 = 1.5;
const AS_BEFORE_US: f64 = 5_000.0;
/// It is over when so many steps in a row are as before: what comes later has other reasons.
const AGAIN: u128 = 5;

/// Options of `overload`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    common: Common,
    /// How often a second the others are asked
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=50_000))]
    rate: u32,
}

/// Runs all, prints the table, writes it down.
pub(crate) fn run(options: &Options) -> Result<()> {
    let scratch = tempfile::tempdir().context("a directory for the servers")?;
    let hello = options.common.guest("hello")?;
    let kernels = options.common.guest("kernels")?;
    let mut samples = Vec::new();
    for round in 0..options.common.rounds {
        for layout in options.common.layouts() {
            let bed = options.common.bed(layout, scratch.path(), "".into())?;
            let data = tempfile::tempdir_in(&bed.scratch)?.keep();
            let host = insula::start(&bed, &data, &[])?;
            host.desk.tenant("others", &json!({}))?;
            host.desk.deploy("others", "hello", &json!({}), &hello)?;
            host.desk.tenant("flooder", &json!({}))?;
            host.desk.deploy("flooder", "work", &json!({}), &kernels)?;
            let scene = Scene {
                bed: &bed,
                layout,
                ingress: host.ingress,
                running: &host.running,
                rate: f64::from(options.rate),
                measured: options.common.measured(),
            };
            let found = while_bound(&bed.places.client, || scene.play())
                .with_context(|| format!("{} round {}", layout.word(), round + 1))?;
            for finding in found {
                let sample = Sample { layout, finding };
                sample.tell(round);
                samples.push(sample);
            }
        }
    }
    let text = section(options, &samples)?;
    say(&text);
    if let Some(folder) = options.common.out(Whole::Everything) {
        page::write_section(folder, "overload", &text)?;
    }
    Ok(())
}

/// A host with both tenants.
struct Scene<'a> {
    bed: &'a Bed,
    layout: Layout,
    ingress: std::net::SocketAddr,
    running: &'a Running,
    rate: f64,
    measured: Duration,
}

impl Scene<'_> {
    fn others(&self, measured: Duration) -> Result<Generator> {
        Generator::start(open_loop::Plan {
            address: self.ingress,
            targets: Targets::one("/", &insula::name("hello", "others")),
            expected: Some(HELLO.to_vec()),
            rate_per_second: self.rate,
            connections: OTHERS_CONNECTIONS,
            head_start: open_loop::HEAD_START,
            warm_up: WARM_UP,
            measured,
            cores: self.bed.places.client.clone(),
            priority: Priority::PACE,
        })
    }

    fn flooder(
        &self,
        rate: f64,
        head_start: Duration,
        warm_up: Duration,
        measured: Duration,
    ) -> Result<Generator> {
        Generator::start(open_loop::Plan {
            address: self.ingress,
            targets: Targets::one(PATH, &insula::name("work", "flooder")),
            expected: None,
            rate_per_second: rate,
            connections: FLOOD_CONNECTIONS,
            head_start,
            warm_up,
            measured,
            cores: self.bed.places.client.clone(),
            // Its own latencies matter too, but not as much as the others'.
            priority: match self.layout {
                Layout::Split => Priority::Ordinary,
                Layout::Shared => Priority::PRESS,
            },
        })
    }

    fn play(&self) -> Result<Vec<Finding>> {
        let meter = Meter::begin(self.running.id(), &self.bed.places.all)?;
        let alone = p99(&self.others(self.measured)?.join()?, |_| true)?;
        let peak = self.peak()?;
        if peak < 1.0 {
            bail!("the tenant gets {peak:.1} answers a second beside the others");
        }
        let head_start = open_loop::HEAD_START;
        let calm = self.flooder(peak * CALM, head_start, WARM_UP, self.measured)?;
        let calm = calm.join()?;
        let others = self.others(self.measured)?;
        let flood = self.flooder(peak * FLOOD, head_start, WARM_UP, self.measured)?;
        // Its first request is due when the last of the flood was. Its connections are opened before
        // anything is measured: so many at once take some ten milliseconds.
        let end = flood.measured_from + self.measured;
        let head_start = end.saturating_duration_since(Instant::now());
        let after = self.flooder(peak * CALM, head_start, Duration::ZERO, self.measured)?;
        let (others, flood, after) = (others.join()?, flood.join()?, after.join()?);
        let elsewhere = meter.end()?.elsewhere;
        let refused = |record: &Record| matches!(record.ending, Ending::Status(429));
        let beside = p99(&others, |_| true)?;
        let figures = [
            (OTHERS, beside / alone),
            (
                ERRORS,
                count(others.errors()) / count(others.records.len() as u64),
            ),
            (REFUSED, p99(&flood, refused)? / 1e6),
            (GOODPUT, goodput(&flood, self.measured) / peak),
            (RECOVERY, recovery(&calm, &after, self.measured)?),
        ];
        say(&format!(
            "  others' p99 {alone:.0} µs alone, {beside:.0} µs beside the flood; peak {peak:.0}/s; \
             flood: {} asked, {} good, {} refused, {} of the host's doing, {} \
             without answer; client late {} µs",
            flood.records.len(),
            flood.count(|record| record.ending == Ending::Good),
            flood.count(refused),
            flood.count(|record| matches!(record.ending, Ending::Status(503))),
            flood.count(|record| record.ending == Ending::Unanswered),
            flood.late.value_at_quantile(0.99),
        ));
        let findings = figures.map(|(promise, figure)| Finding {
            promise,
            figure,
            elsewhere,
        });
        Ok(findings.to_vec())
    }

    /// Good answers per second that the tenant gets when it always has some requests under way.
    fn peak(&self) -> Result<f64> {
        let others = self.others(self.measured)?;
        let crowd = Crowd::start(crowd::Plan {
            address: self.ingress,
            requests: vec![get(PATH, &insula::name("work", "flooder"))],
            turns: Turns::Own,
            connections: PEAK_CONNECTIONS,
            answers: Answers::Counted,
            cores: self.bed.places.client.clone(),
            priority: match self.layout {
                Layout::Split => Priority::Ordinary,
                Layout::Shared => Priority::PRESS,
            },
        })?;
        sleep(WARM_UP);
        let (before, began) = (crowd.seen(), Instant::now());
        sleep(self.measured.saturating_sub(WARM_UP / 2));
        let (after, elapsed) = (crowd.seen(), began.elapsed());
        crowd.end()?;
        others.join()?;
        Ok(count(after.answers - before.answers) / elapsed.as_secs_f64())
    }
}

const OTHERS: Promise = Promise::at_most(
    "others' 99th percentile during the flood, by that alone",
    Unit::Times,
    1.5,
);
const ERRORS: Promise = Promise::at_most("others' requests that failed", Unit::Part, 0.0);
const REFUSED: Promise = Promise::at_most(
    "time until a 429 of the flood, 99th percentile",
    Unit::Seconds,
    0.005,
);
const GOODPUT: Promise = Promise {
    what: "good answers to the flood, by the peak",
    unit: Unit::Times,
    bound: 0.9,
    at_least: true,
};
const RECOVERY: Promise =
    Promise::at_most("time until all is as before the flood", Unit::Seconds, 1.0);

/// In microseconds; not a number where there was none.
fn p99(outcome: &Outcome, wanted: impl Fn(&Record) -> bool) -> Result<f64> {
    let latency = outcome.latency(wanted)?;
    Ok(if latency.is_empty() {
        f64::NAN
    } else {
        count(latency.value_at_quantile(0.99))
    })
}

/// Good answers per second that came while the flood lasted.
fn goodput(flood: &Outcome, measured: Duration) -> f64 {
    let good = flood.count(|record| {
        let end = u64::from(record.due_us) + u64::from(record.took_us);
        record.ending == Ending::Good && u128::from(end) <= measured.as_micros()
    });
    count(good) / measured.as_secs_f64()
}

/// The begin of the first step after which none is worse than the calm before the flood was, in
/// seconds; all that was looked at, where there is none.
fn recovery(calm: &Outcome, after: &Outcome, measured: Duration) -> Result<f64> {
    let bound_us = p99(calm, |_| true)? * AS_BEFORE + AS_BEFORE_US;
    let steps = measured.as_micros() / STEP.as_micros();
    let mut recovered = 0;
    for step in 0..steps {
        if step - recovered >= AGAIN {
            break;
        }
        let within = |record: &Record| u128::from(record.due_us) / STEP.as_micros() == step;
        let failed = after.count(|record| within(record) && record.ending != Ending::Good);
        let slow = p99(after, within)? > bound_us;
        if failed > 0 || slow {
            recovered = step + 1;
        }
    }
    Ok(STEP.as_secs_f64() * f64::from(u32::try_from(recovered)?))
}

fn section(options: &Options, samples: &[Sample]) -> Result<String> {
    let mut text = String::new();
    let out = &mut text;
    writeln!(out, "## What overload does\n")?;
    writeln!(
        out,
        "One tenant asks for three times what it can get, in an open loop, for a computation of \
         about a millisecond each; the others are `hello`, asked {} times a second. All tenants \
         have the bounds and shares that they have by default. Peak is what the same tenant gets \
         with {PEAK_CONNECTIONS} requests always under way; before and after the flood it asks for \
         half of that.\n",
        options.rate
    )?;
    for layout in options.common.layouts() {
        writeln!(out, "### Overload: {}\n", layout.title())?;
        promise::table(out, samples, layout)?;
    }
    let common = &options.common;
    writeln!(
        out,
        "- Run: `{} --rate {}`; {FLOOD_CONNECTIONS} connections of the flood; {} s of each phase; \
         {} rounds, each on a host started afresh. All is as before with the first of {AGAIN} \
         steps of {} ms in which no request fails and the 99th percentile is at most {AS_BEFORE} \
         times that before the flood and {} more.",
        common.command("overload"),
        options.rate,
        common.seconds,
        common.rounds,
        STEP.as_millis(),
        page::time(AS_BEFORE_US),
    )?;
    writeln!(out, "{}", page::provenance())?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use hdrhistogram::Histogram;

    use super::*;

    /// One request every millisecond for a second, each as it is said.
    fn outcome(how: impl Fn(u32) -> (u32, Ending)) -> Outcome {
        let records = (0..1_000).map(|number| {
            let (took_us, ending) = how(number);
            Record {
                due_us: number * 1_000,
                took_us,
                ending,
            }
        });
        Outcome {
            records: records.collect(),
            late: Histogram::new(3).unwrap(),
            prioritised: true,
        }
    }

    #[test]
    fn recovery_is_until_some_steps_in_a_row_are_as_before() {
        let second = Duration::from_secs(1);
        let calm = outcome(|_| (1_000, Ending::Good));
        let seconds = |after: &Outcome| recovery(&calm, after, second).unwrap();
        assert_eq!(seconds(&calm), 0.0);
        let slow = outcome(|number| (if number < 150 { 9_000 } else { 1_000 }, Ending::Good));
        assert!((seconds(&slow) - 0.2).abs() < 1e-9);
        let refused = |at| {
            outcome(move |number| match number {
                number if number == at => (10, Ending::Status(429)),
                _ => (1_000, Ending::Good),
            })
        };
        assert!((seconds(&refused(420)) - 0.5).abs() < 1e-9);
        assert_eq!(seconds(&refused(520)), 0.0, "it was over before");
        assert_eq!(seconds(&outcome(|_| (10, Ending::Failed))), 1.0);
    }

    #[test]
    fn goodput_counts_what_came_in_time() {
        let second = Duration::from_secs(1);
        let late = outcome(|_| (500_500, Ending::Good));
        assert_eq!(goodput(&late, second), 500.0);
        assert_eq!(goodput(&outcome(|_| (1, Ending::Failed)), second), 0.0);
    }
}
