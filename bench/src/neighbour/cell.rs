//! One cell of the matrix: a victim alone, and then beside its neighbours, on one server.
//!
//! ```text
//!  start, deploy ─▶ victim alone ─▶ crowd arrives ─▶ victim beside it ─▶ end
//! ```
//!
//! Both halves have the same rate and the same server, some seconds apart: what disturbs one is
//! likely to disturb the other.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::attacks::{Attack, Strength};
use super::streets::{self, Ground, Server, Street};
use crate::books::Books;
use crate::common::{HELLO, count};
use crate::cores::{Layout, Priority, while_bound};
use crate::crowd::{self, Crowd, Seen, Turns};
use crate::open_loop::{self, Generator, Outcome};
use crate::process::{Meter, Metered};
use crate::servers::Bed;
use crate::targets::Targets;

const VICTIM_CONNECTIONS: usize = 32;
const WARM_UP: Duration = Duration::from_secs(1);
/// A crowd may take so long to arrive; a server that accepts no more never has all of it.
const ARRIVAL: Duration = Duration::from_secs(3);
/// And presses for so long before anything is measured.
const SETTLE: Duration = Duration::from_millis(500);
/// What the victim takes of one core, alone.
const VICTIM_CORES: f64 = 0.3;
/// Where calibrating begins.
const FIRST_RATE: f64 = 1_000.0;
const CALIBRATIONS: usize = 2;
const CALIBRATING: Duration = Duration::from_secs(2);

/// What the victim saw.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Latency {
    pub(crate) p50_us: f64,
    pub(crate) p99_us: f64,
    pub(crate) p999_us: f64,
    pub(crate) errors: u64,
    pub(crate) requests: u64,
    /// How late the client was by itself, 99th percentile.
    pub(crate) late_us: f64,
}

impl Latency {
    fn of(outcome: &Outcome) -> Result<Self> {
        let latency = outcome.latency(|_| true)?;
        let at = |quantile| count(latency.value_at_quantile(quantile));
        Ok(Self {
            p50_us: at(0.5),
            p99_us: at(0.99),
            p999_us: at(0.999),
            errors: outcome.errors(),
            requests: outcome.records.len() as u64,
            late_us: count(outcome.late.value_at_quantile(0.99)),
        })
    }

    /// Whether anything was answered as it should be.
    pub(crate) const fn is_served(&self) -> bool {
        self.errors < self.requests
    }
}

/// Which cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) layout: Layout,
    pub(crate) server: Server,
    pub(crate) attack: Attack,
    pub(crate) aggressors: usize,
}

/// A cell, measured once.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sample {
    pub(crate) place: Place,
    pub(crate) round: u16,
    pub(crate) strength: Strength,
    pub(crate) alone: Latency,
    pub(crate) beside: Latency,
    /// Tenants' and host's CPU in the server's own books, by what the kernel's say.
    pub(crate) books: Option<f64>,
    /// Answers and refusals that the crowd got per second.
    pub(crate) answers: f64,
    pub(crate) refusals: f64,
    /// The larger of both halves.
    pub(crate) elsewhere: f64,
    pub(crate) prioritised: bool,
}

impl Sample {
    /// How many times as long the slowest of a hundred takes beside neighbours.
    pub(crate) fn ratio(&self) -> f64 {
        self.beside.p99_us / self.alone.p99_us
    }
}

/// At which rate the victim takes its part of one core, alone on this server.
pub(crate) fn calibrate(bed: &Bed, ground: &Ground, server: Server) -> Result<f64> {
    let street = streets::build(bed, ground, server, None)?;
    let mut rate = FIRST_RATE;
    for _ in 0..CALIBRATIONS {
        let (_, metered, _) = victim(bed, &street, rate, CALIBRATING)?;
        rate *= VICTIM_CORES / metered.server_cores().max(f64::EPSILON);
    }
    Ok(rate)
}

/// Measures a cell.
pub(crate) fn measure(
    bed: &Bed,
    ground: &Ground,
    (place, round): (Place, u16),
    (strength, component): (Strength, &[u8]),
    (rate, measured): (f64, Duration),
) -> Result<Sample> {
    let attackers = (place.attack, strength, component);
    let street = streets::build(bed, ground, place.server, Some(attackers))?;
    let (alone, first, prioritised) = victim(bed, &street, rate, measured)?;
    let crowd = Crowd::start(crowd::Plan {
        address: street.aggressors,
        requests: street.attacks.clone(),
        turns: Turns::Own,
        connections: strength.connections,
        answers: place.attack.answers(),
        cores: bed.places.client.clone(),
        priority: match place.layout {
            Layout::Split => Priority::Ordinary,
            Layout::Shared => Priority::PRESS,
        },
    })?;
    let deadline = Instant::now() + ARRIVAL;
    while crowd.open() < strength.connections as u64 && Instant::now() < deadline {
        sleep(Duration::from_millis(20));
    }
    sleep(SETTLE);
    let seen = crowd.seen();
    let began = Instant::now();
    let open = || Books::open(street.desk.as_ref(), street.running.id());
    let books = open()?;
    let (beside, second, again) = victim(bed, &street, rate, measured)?;
    let books = match (books, open()?) {
        (Some(before), Some(after)) => Some(before.ratio(&after)),
        _ => None,
    };
    let elapsed = began.elapsed().as_secs_f64();
    let seen = crowd.end().map(|after| since(seen, after))?;
    if place.server != Server::Insula {
        // It may be beyond ending by itself.
        street.running.kill();
    }
    Ok(Sample {
        place,
        round,
        strength,
        alone,
        beside,
        books,
        answers: count(seen.answers) / elapsed,
        refusals: count(seen.refusals) / elapsed,
        elsewhere: first.elsewhere.max(second.elsewhere),
        prioritised: prioritised && again,
    })
}

fn since(before: Seen, after: Seen) -> Seen {
    Seen {
        answers: after.answers - before.answers,
        refusals: after.refusals - before.refusals,
        failures: after.failures - before.failures,
    }
}

/// The victim at its rate for a while.
fn victim(
    bed: &Bed,
    street: &Street,
    rate: f64,
    measured: Duration,
) -> Result<(Latency, Metered, bool)> {
    // What reads the books must not do so on the server's core.
    while_bound(&bed.places.client, || {
        let generator = Generator::start(open_loop::Plan {
            address: street.victim,
            targets: Targets::one("/", &street.victim_host),
            expected: Some(HELLO.to_vec()),
            rate_per_second: rate,
            connections: VICTIM_CONNECTIONS,
            head_start: open_loop::HEAD_START,
            warm_up: WARM_UP,
            measured,
            cores: bed.places.client.clone(),
            priority: Priority::PACE,
        })?;
        sleep(
            generator
                .measured_from
                .saturating_duration_since(Instant::now()),
        );
        let meter = Meter::begin(street.running.id(), &bed.places.all)?;
        sleep(measured);
        let metered = meter.end()?;
        let outcome = generator.join().context("the victim's client")?;
        Ok((Latency::of(&outcome)?, metered, outcome.prioritised))
    })
}
