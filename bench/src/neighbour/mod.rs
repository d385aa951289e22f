//! `neighbour`: what a well-behaved service feels of those that it shares a host with.
//!
//! The victim is `hello` at the rate at which it takes 30 % of one core, asked in an open loop. For
//! each layout, each round, each cell (a server, what the neighbours do, how many of them) it is
//! measured alone and then beside them. What counts is the ratio of both.
//!
//! * [`attacks`]: what neighbours do
//! * [`streets`]: servers with victim and neighbours on them
//! * [`cell`]: one measurement
//! * [`section`]: what is made of all

mod attacks;
mod cell;
mod section;
mod streets;

use std::collections::HashMap;

use anyhow::{Context, Result, bail};

use self::attacks::{Attack, Strength};
use self::cell::{Place, Sample};
use self::streets::{Ground, Server};
use crate::common::{Common, Whole};
use crate::cores::Layout;
use crate::crowd;
use crate::say;

/// Options of `neighbour`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    common: Common,
    /// Only these attacks; nothing is written then
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Attack>,
    /// Only these servers; nothing is written then
    #[arg(long, value_enum, value_delimiter = ',')]
    servers: Vec<Server>,
    /// How many aggressors
    #[arg(long, value_delimiter = ',', default_values_t = [1, 10, 1_000])]
    aggressors: Vec<usize>,
    /// The CPU that is reserved for the victim; `none` leaves it to its shares, of which it has as
    /// many as each aggressor
    #[arg(long, default_value = "500m")]
    reservation: String,
    /// What the aggressors' instances may take of the machine's memory, in MiB
    #[arg(long, default_value_t = 4_096)]
    memory_mib: u64,
}

impl Options {
    fn attacks(&self) -> Vec<Attack> {
        if self.only.is_empty() {
            Attack::ALL.to_vec()
        } else {
            self.only.clone()
        }
    }

    fn servers(&self) -> Vec<Server> {
        if self.servers.is_empty() {
            Server::ALL.to_vec()
        } else {
            self.servers.clone()
        }
    }

    fn whole(&self) -> Whole {
        match Whole::unless_only(&self.only) {
            Whole::Everything => Whole::unless_only(&self.servers),
            Whole::Part => Whole::Part,
        }
    }

    /// All cells of one layout, in the order of the first round.
    fn places(&self, layout: Layout) -> Vec<Place> {
        let mut places = Vec::new();
        for attack in self.attacks() {
            for &aggressors in &self.aggressors {
                let servers = self.servers().into_iter();
                places.extend(
                    servers
                        .filter(|server| server.takes(attack))
                        .map(|server| Place {
                            layout,
                            server,
                            attack,
                            aggressors,
                        }),
                );
            }
        }
        places
    }
}

/// Everything that was measured.
#[derive(Debug)]
pub(crate) struct Matrix {
    pub(crate) samples: Vec<Sample>,
    /// Requests per second of the victim.
    pub(crate) rates: Vec<(Layout, Server, f64)>,
}

/// Runs all, prints the table, writes it down.
pub(crate) fn run(options: &Options) -> Result<()> {
    let most = crowd::CONNECTIONS_MAX;
    if options
        .aggressors
        .iter()
        .any(|count| !(1..=most).contains(count))
    {
        bail!("--aggressors: from 1 to {most} each");
    }
    let ground = Ground::prepare(&options.common, &options.servers(), &options.reservation)?;
    let scratch = tempfile::tempdir().context("a directory for the servers")?;
    let mut guests = HashMap::new();
    for attack in options.attacks() {
        guests.insert(attack.guest(), options.common.guest(attack.guest())?);
    }
    let mut matrix = Matrix {
        samples: Vec::new(),
        rates: Vec::new(),
    };
    for layout in options.common.layouts() {
        let wasmtime = ground.wasmtime.clone();
        let bed = options.common.bed(layout, scratch.path(), wasmtime)?;
        let mut rates = HashMap::new();
        for server in options.servers() {
            let rate = cell::calibrate(&bed, &ground, server)
                .with_context(|| format!("calibrating the victim on {}", server.name()))?;
            say(&format!(
                "{} {}: the victim is asked {rate:.0} times a second",
                layout.word(),
                server.name()
            ));
            rates.insert(server.name(), rate);
            matrix.rates.push((layout, server, rate));
        }
        let mut places = options.places(layout);
        for round in 0..options.common.rounds {
            for place in &places {
                let guest = &guests[place.attack.guest()];
                let memory = options.memory_mib << 20;
                let strength = Strength::of(place.attack, place.aggressors, memory);
                let pace = (rates[place.server.name()], options.common.measured());
                let sample = cell::measure(&bed, &ground, (*place, round), (strength, guest), pace)
                    .with_context(|| words(place))?;
                tell(&sample);
                matrix.samples.push(sample);
            }
            // Each round begins elsewhere.
            let by = places.len() / usize::from(options.common.rounds) + 1;
            let by = by % places.len();
            places.rotate_left(by);
        }
    }
    let section = section::write(options, &matrix)?;
    say(&section.text);
    if let Some(folder) = options.common.out(options.whole()) {
        section.publish(folder)?;
    }
    Ok(())
}

fn words(place: &Place) -> String {
    format!(
        "{} {} × {} on {}",
        place.layout.word(),
        place.aggressors,
        place.attack.name(),
        place.server.name()
    )
}

fn tell(sample: &Sample) {
    let (alone, beside) = (&sample.alone, &sample.beside);
    say(&format!(
        "{} round {}  p99 {:.0} → {:.0} µs ({:.2}×)  p99.9 {:.0} → {:.0} µs  {} of {} failed  crowd \
         {:.0}/s answers {:.0}/s refusals  books {:.3}  client late {:.0} µs  elsewhere {:.0} %",
        words(&sample.place),
        sample.round + 1,
        alone.p99_us,
        beside.p99_us,
        sample.ratio(),
        alone.p999_us,
        beside.p999_us,
        beside.errors,
        beside.requests,
        sample.answers,
        sample.refusals,
        sample.books.unwrap_or(f64::NAN),
        beside.late_us,
        sample.elsewhere * 100.0,
    ));
}
