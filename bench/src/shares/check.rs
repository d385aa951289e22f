//! The promises, and how each is looked at.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::watch::{Change, Reading, every};
use crate::common::{Common, count};
use crate::cores::{Layout, Priority, while_bound};
use crate::crowd::{self, Answers, Crowd, Turns};
use crate::insula::{self, Desk, Host};
use crate::process::Meter;
use crate::promise::{Finding, Promise, Unit};
use crate::servers::Bed;
use crate::targets::get;

/// Something that is looked at on a host of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Check {
    /// 500 : 1000 : 2000, endless loops
    Loops,
    /// 500 : 1000 : 2000, short requests
    Short,
    /// A hundred tenants
    Hundred,
    Limit,
    Reservation,
    LiveShares,
    LiveLimit,
    LiveReservation,
}

/// The samples that keep tenants busy.
#[derive(Debug)]
pub(crate) struct Guests {
    spin: Vec<u8>,
    kernels: Vec<u8>,
}

impl Guests {
    pub(crate) fn load(common: &Common) -> Result<Self> {
        Ok(Self {
            spin: common.guest("spin")?,
            kernels: common.guest("kernels")?,
        })
    }
}

const WINDOW: Duration = Duration::from_millis(100);
/// Until everybody has arrived and everything is compiled.
const SETTLE: Duration = Duration::from_secs(1);
/// Some hundred microseconds.
const SHORT_REQUEST: &str = "/fib?n=30";
const SHARES: [u32; 3] = [500, 1_000, 2_000];
const HOGS: usize = 50;
const HUNDRED: u32 = 100;
/// After a change, the time in which it should have come into effect long ago.
const CHANGE_WINDOW: Duration = Duration::from_millis(500);
/// The pace before a change, and after it, is that of so long.
const PACE: Duration = Duration::from_secs(1);
const LIVE_BOUND: f64 = 0.050;

/// One tenant of a check.
struct Tenant {
    name: String,
    spec: Value,
}

impl Tenant {
    fn new(name: impl Into<String>, cpu: Value) -> Self {
        let spec = json!({ "cpu": cpu });
        Self {
            name: name.into(),
            spec,
        }
    }

    fn hogs(count: usize) -> impl Iterator<Item = Self> {
        (0..count).map(|index| Self::new(format!("hog{index}"), json!({})))
    }
}

/// Tenants at work.
struct Busy {
    host: Host,
    _crowd: Crowd,
    meter: Meter,
}

impl Busy {
    fn desk(&self) -> &Desk {
        &self.host.desk
    }

    fn elsewhere(&self) -> Result<f64> {
        Ok(self.meter.end()?.elsewhere)
    }
}

impl Check {
    pub(crate) const ALL: [Self; 8] = [
        Self::Loops,
        Self::Short,
        Self::Hundred,
        Self::Limit,
        Self::Reservation,
        Self::LiveShares,
        Self::LiveLimit,
        Self::LiveReservation,
    ];

    pub(crate) fn run(
        self,
        bed: &Bed,
        layout: Layout,
        guests: &Guests,
        span: Duration,
    ) -> Result<Vec<Finding>> {
        let (component, path, each) = match self {
            // So many that some wait while the client is busy with others: a tenant whose line
            // is empty has got what it wanted, and not what its shares say.
            Self::Short => (&guests.kernels, SHORT_REQUEST, 64),
            Self::Hundred | Self::Reservation | Self::LiveReservation => (&guests.spin, "/", 2),
            _ => (&guests.spin, "/", 4),
        };
        // Reading must not be done on the server's core.
        while_bound(&bed.places.client, || {
            let busy = start(bed, layout, (component, path), &self.tenants(), each)?;
            let found = match self {
                Self::Loops => weights(&busy, span, LOOPS),
                Self::Short => weights(&busy, span, SHORT),
                Self::Hundred => hundred(&busy, span),
                Self::Limit => {
                    let promise =
                        Promise::at_most("limit of 250m on an idle host, off by", Unit::Part, 0.02);
                    let got = pace(&busy, span, |from, to| from.cores(to, "one"))?;
                    Ok(vec![(promise, (got / 0.25 - 1.0).abs())])
                }
                Self::Reservation => {
                    let what = "reservation of 500m with few shares beside 50 hogs, short by";
                    let got = pace(&busy, span, |from, to| from.cores(to, "one"))?;
                    let promise = Promise::at_most(what, Unit::Part, 0.02);
                    Ok(vec![(promise, (1.0 - got / 0.5).max(0.0))])
                }
                Self::LiveShares => live(
                    &busy,
                    "shares from 1000 to 3000 beside another's 1000, effective after",
                    &json!({"cpu": {"shares": 3_000}}),
                    |from, to| from.part(to, "one"),
                ),
                Self::LiveLimit => live(
                    &busy,
                    "limit from 250m to 500m, effective after",
                    &json!({"cpu": {"limit": "500m"}}),
                    |from, to| from.cores(to, "one"),
                ),
                Self::LiveReservation => live(
                    &busy,
                    "reservation from none to 500m beside 50 hogs, effective after",
                    &json!({"cpu": {"shares": 100, "reservation": "500m"}}),
                    |from, to| from.part(to, "one"),
                ),
            }?;
            let elsewhere = busy.elsewhere()?;
            Ok(found
                .into_iter()
                .map(|(promise, figure)| Finding {
                    promise,
                    figure,
                    elsewhere,
                })
                .collect())
        })
    }

    fn tenants(self) -> Vec<Tenant> {
        let one = |cpu| Tenant::new("one", cpu);
        match self {
            Self::Loops | Self::Short => SHARES
                .iter()
                .map(|shares| Tenant::new(format!("t{shares}"), json!({"shares": shares})))
                .collect(),
            Self::Hundred => (0..HUNDRED)
                .map(|index| Tenant::new(format!("t{index}"), json!({"shares": hundredth(index)})))
                .collect(),
            Self::Limit | Self::LiveLimit => vec![one(json!({"limit": "250m"}))],
            Self::Reservation => [one(json!({"shares": 100, "reservation": "500m"}))]
                .into_iter()
                .chain(Tenant::hogs(HOGS))
                .collect(),
            Self::LiveReservation => [one(json!({"shares": 100}))]
                .into_iter()
                .chain(Tenant::hogs(HOGS))
                .collect(),
            Self::LiveShares => [one(json!({}))]
                .into_iter()
                .chain(Tenant::hogs(1))
                .collect(),
        }
    }
}

/// Shares of the n-th of a hundred: four classes.
const fn hundredth(index: u32) -> u32 {
    250 << (index % 4)
}

fn start(
    bed: &Bed,
    layout: Layout,
    (component, path): (&[u8], &str),
    tenants: &[Tenant],
    each: usize,
) -> Result<Busy> {
    let data = tempfile::tempdir_in(&bed.scratch)?.keep();
    let host = insula::start(bed, &data, &[])?;
    let service = json!({"limits": {"fuel": "1T", "timeout": "300s"}});
    let mut requests = Vec::new();
    for tenant in tenants {
        host.desk
            .tenant(&tenant.name, &tenant.spec)
            .and_then(|()| host.desk.deploy(&tenant.name, "busy", &service, component))
            .with_context(|| format!("tenant {}", tenant.name))?;
        requests.push(get(path, &insula::name("busy", &tenant.name)));
    }
    let crowd = Crowd::start(crowd::Plan {
        address: host.ingress,
        connections: requests.len() * each,
        requests,
        turns: Turns::Own,
        answers: Answers::Counted,
        cores: bed.places.client.clone(),
        priority: match layout {
            Layout::Split => Priority::Ordinary,
            Layout::Shared => Priority::PRESS,
        },
    })?;
    sleep(SETTLE);
    let meter = Meter::begin(host.running.id(), &bed.places.all)?;
    Ok(Busy {
        host,
        _crowd: crowd,
        meter,
    })
}

type Found = Vec<(Promise, f64)>;

/// What the two figures of a mix are called.
type Names = [&'static str; 2];
const LOOPS: Names = [
    "500 : 1000 : 2000, endless loops, the whole time, off by",
    "500 : 1000 : 2000, endless loops, the worst 100 ms, off by",
];
const SHORT: Names = [
    "500 : 1000 : 2000, short requests, the whole time, off by",
    "500 : 1000 : 2000, short requests, the worst 100 ms, off by",
];

fn weights(busy: &Busy, span: Duration, names: Names) -> Result<Found> {
    let readings = every(busy.desk(), WINDOW, span)?;
    let sum: u32 = SHARES.iter().sum();
    let off = |from: &Reading, to: &Reading| {
        SHARES
            .iter()
            .map(|shares| {
                let wanted = f64::from(*shares) / f64::from(sum);
                (from.part(to, &format!("t{shares}")) / wanted - 1.0).abs()
            })
            .fold(0.0, f64::max)
    };
    let whole = match (readings.first(), readings.last()) {
        (Some(first), Some(last)) => off(first, last),
        _ => f64::NAN,
    };
    let worst = readings
        .windows(2)
        .map(|pair| off(&pair[0], &pair[1]))
        .fold(0.0, f64::max);
    Ok(vec![
        (Promise::at_most(names[0], Unit::Part, 0.02), whole),
        (Promise::at_most(names[1], Unit::Part, 0.10), worst),
    ])
}

fn hundred(busy: &Busy, span: Duration) -> Result<Found> {
    let from = Reading::take(busy.desk())?;
    sleep(span);
    let to = Reading::take(busy.desk())?;
    let per_share: Vec<f64> = (0..HUNDRED)
        .map(|index| from.cores(&to, &format!("t{index}")) / f64::from(hundredth(index)))
        .collect();
    let promise = Promise {
        what: "100 tenants of four weights: Jain's index of CPU by shares",
        unit: Unit::Index,
        bound: 0.99,
        at_least: true,
    };
    Ok(vec![(promise, jain(&per_share))])
}

/// How alike figures are (Jain, Chiu, Hawe 1984).
fn jain(figures: &[f64]) -> f64 {
    let sum: f64 = figures.iter().sum();
    let squares: f64 = figures.iter().map(|figure| figure * figure).sum();
    sum * sum / (count(figures.len() as u64) * squares)
}

fn pace(busy: &Busy, span: Duration, of: impl Fn(&Reading, &Reading) -> f64) -> Result<f64> {
    let from = Reading::take(busy.desk())?;
    sleep(span);
    Ok(of(&from, &Reading::take(busy.desk())?))
}

/// When a change of the tenant `one` comes into effect.
fn live(
    busy: &Busy,
    what: &'static str,
    change: &Value,
    of: impl Fn(&Reading, &Reading) -> f64,
) -> Result<Found> {
    let desk = busy.desk();
    let begin = Reading::take(desk)?;
    sleep(PACE);
    let sent = Reading::take(desk)?;
    desk.tenant("one", change)?;
    let until = sent.at + CHANGE_WINDOW;
    sleep(until.saturating_duration_since(Instant::now()));
    let window = Reading::take(desk)?;
    sleep(PACE);
    let end = Reading::take(desk)?;
    let change = Change {
        before: of(&begin, &sent),
        after: of(&window, &end),
        meanwhile: of(&sent, &window),
        window: window.at - sent.at,
    };
    let promise = Promise::at_most(what, Unit::Seconds, LIVE_BOUND);
    Ok(vec![(promise, change.delay_seconds())])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jains_index_is_one_for_equals_and_a_part_for_one_who_has_all() {
        assert!((jain(&[2.0; 10]) - 1.0).abs() < 1e-12);
        assert!((jain(&[1.0, 0.0, 0.0, 0.0]) - 0.25).abs() < 1e-12);
    }
}
