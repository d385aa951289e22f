//! The matrix as its section of the page, a plot, and a sentence for the front page.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::attacks::Attack;
use super::cell::{Latency, Place, Sample};
use super::streets::Server;
use super::{Matrix, Options};
use crate::common::count;
use crate::cores::Layout;
use crate::page::{self, time};
use crate::plot::{self, Bar, Group};
use crate::stats::Spread;
use crate::workerd;

const PLOT: &str = "neighbour.svg";
/// Beside so many endless loops servers are compared in the plot.
const PLOTTED: usize = 10;
/// What is promised: not more than this many times as long, and this much more.
const RATIO_MAX: f64 = 1.5;
const ADDED_MAX_US: f64 = 300.0;

/// The section, and what goes with it.
#[derive(Debug)]
pub(crate) struct Section {
    pub(crate) text: String,
    plot: String,
    front: String,
}

impl Section {
    /// Writes the page, the plot, and their place on the front page.
    pub(crate) fn publish(&self, folder: &Path) -> Result<()> {
        page::write_section(folder, "neighbour", &self.text)?;
        page::write_plot(folder, PLOT, &self.plot)?;
        // The front page is that of the folder above; elsewhere there is none.
        let front = folder.join("../README.md");
        let Ok(before) = fs::read_to_string(&front) else {
            return Ok(());
        };
        let after = page::replace_section(&before, "neighbour", &self.front);
        fs::write(&front, after).with_context(|| front.display().to_string())
    }
}

pub(crate) fn write(options: &Options, matrix: &Matrix) -> Result<Section> {
    let mut text = String::new();
    let out = &mut text;
    writeln!(out, "## What neighbours cost\n")?;
    writeln!(out, "![Beside endless loops]({PLOT})\n")?;
    writeln!(
        out,
        "The victim is `hello`, asked at a constant rate at which it takes 30 % of one core when \
         it is alone; {}. Latency is counted from when a request was due, not from when a client \
         got round to sending it, and what was never answered counts with the time that it waited. \
         The ratio is that of the 99th percentiles beside the neighbours and alone, of one server \
         some seconds apart; promised is {RATIO_MAX} and {} more.\n",
        if options.reservation == "none" {
            "it has as many shares as each neighbour, and nothing reserved".to_owned()
        } else {
            format!("{} of CPU are reserved for it", options.reservation)
        },
        time(ADDED_MAX_US)
    )?;
    for layout in options.common.layouts() {
        writeln!(
            out,
            "### {}: neighbours of every kind, on insula\n",
            layout.title()
        )?;
        table(out, options, matrix, layout, Rows::Attacks)?;
        writeln!(
            out,
            "### {}: endless loops, on others too\n",
            layout.title()
        )?;
        table(out, options, matrix, layout, Rows::Servers)?;
    }
    conditions(out, options, matrix)?;
    Ok(Section {
        plot: picture(options, matrix),
        front: front(options, matrix),
        text,
    })
}

/// What a table has a row for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rows {
    Attacks,
    Servers,
}

fn table(
    out: &mut String,
    options: &Options,
    matrix: &Matrix,
    layout: Layout,
    rows: Rows,
) -> Result<()> {
    let books = if rows == Rows::Attacks {
        " books |"
    } else {
        ""
    };
    writeln!(
        out,
        "| {} | how many | p50 | p99 | p99 alone | ratio | p99.9 | errors |{books} held | others |",
        if rows == Rows::Attacks {
            "neighbours"
        } else {
            "server"
        }
    )?;
    let columns = if rows == Rows::Attacks { 11 } else { 10 };
    writeln!(out, "|{}", "---|".repeat(columns))?;
    for place in options.places(layout) {
        let (shown, name) = match rows {
            Rows::Attacks => (place.server == Server::Insula, place.attack.name()),
            Rows::Servers => (place.attack == Attack::EndlessLoop, place.server.name()),
        };
        let samples: Vec<&Sample> = of(matrix, place);
        if shown && !samples.is_empty() {
            row(out, name, place, &samples, rows)?;
        }
    }
    writeln!(out)?;
    Ok(())
}

fn of(matrix: &Matrix, place: Place) -> Vec<&Sample> {
    let samples = matrix.samples.iter();
    samples.filter(|sample| sample.place == place).collect()
}

fn spread(samples: &[&Sample], figure: impl Fn(&Sample) -> f64) -> Option<Spread> {
    Spread::of(samples.iter().map(|sample| figure(sample)))
}

fn row(out: &mut String, name: &str, place: Place, samples: &[&Sample], rows: Rows) -> Result<()> {
    let median = |figure: &dyn Fn(&Sample) -> f64| spread(samples, figure).map(|s| s.median);
    let us = |figure: fn(&Latency) -> f64, of: fn(&Sample) -> &Latency| {
        median(&|sample| figure(of(sample))).map_or("–".to_owned(), time)
    };
    let beside: fn(&Sample) -> &Latency = |sample| &sample.beside;
    let alone: fn(&Sample) -> &Latency = |sample| &sample.alone;
    let errors: u64 = samples.iter().map(|sample| sample.beside.errors).sum();
    let requests: u64 = samples.iter().map(|sample| sample.beside.requests).sum();
    let served = samples.iter().any(|sample| sample.beside.is_served());
    let ratio = spread(samples, Sample::ratio);
    let held = holds(samples);
    let tenants = samples.first().map_or(0, |sample| sample.strength.tenants);
    let how_many = if place.server == Server::Insula && tenants < place.aggressors {
        format!("{} of {tenants} tenants", place.aggressors)
    } else {
        place.aggressors.to_string()
    };
    write!(
        out,
        "| {name} | {how_many} | {} | {} | {} | {} | {} | {} |",
        us(|seen| seen.p50_us, beside),
        us(|seen| seen.p99_us, beside),
        us(|seen| seen.p99_us, alone),
        match ratio {
            Some(_) if !served => "**no answer**".to_owned(),
            Some(s) => format!("**{:.2}** ({:.2}–{:.2})", s.median, s.least, s.most),
            None => "–".to_owned(),
        },
        us(|seen| seen.p999_us, beside),
        if errors == 0 {
            "0".to_owned()
        } else {
            format!("{:.1} %", count(errors) * 100.0 / count(requests))
        },
    )?;
    if rows == Rows::Attacks {
        let books = spread(samples, |sample| sample.books.unwrap_or(f64::NAN));
        write!(
            out,
            " {} |",
            books.map_or("–".to_owned(), |s| format!("{:.3}", s.median))
        )?;
    }
    let elsewhere = spread(samples, |sample| sample.elsewhere).map_or(0.0, |s| s.most);
    writeln!(
        out,
        " {} | {} |",
        page::held(held, elsewhere),
        page::elsewhere(elsewhere)
    )?;
    Ok(())
}

/// Whether the median of the rounds keeps what is promised, and no request failed.
fn holds(samples: &[&Sample]) -> bool {
    let over = spread(samples, |sample| {
        sample.beside.p99_us - sample.alone.p99_us * RATIO_MAX
    });
    let errors: u64 = samples.iter().map(|sample| sample.beside.errors).sum();
    errors == 0 && over.is_some_and(|over| over.median <= ADDED_MAX_US)
}

fn conditions(out: &mut String, options: &Options, matrix: &Matrix) -> Result<()> {
    let common = &options.common;
    writeln!(
        out,
        "- Run: `{} --reservation {} --memory-mib {}`; every cell on a server started afresh: {} s \
         alone, then {} s beside the neighbours, each after 1 s that is not counted; {} rounds. \
         Errors are of all rounds together, other figures medians.",
        common.command("neighbour"),
        options.reservation,
        options.memory_mib,
        common.seconds,
        common.seconds,
        common.rounds,
    )?;
    for attack in options.attacks() {
        writeln!(out, "- {}: {}.", attack.name(), attack.description())?;
    }
    writeln!(
        out,
        "- So many neighbours are so many connections, each of a tenant of its own, but where their \
         instances would take more than {} MiB together. `books` is what the server charged to \
         tenants and to itself, by what the kernel says that its processes used. `others` is what \
         processes that are no part of this took of the two cores, at most.",
        options.memory_mib
    )?;
    writeln!(
        out,
        "- Peers serve victim and loops from one component on two paths (`wasmtime serve`) or from \
         two workers of one process (workerd {}).",
        workerd::VERSION
    )?;
    for (layout, server, rate) in &matrix.rates {
        writeln!(
            out,
            "- {}, {}: the victim was asked {rate:.0} times a second.",
            layout.title(),
            server.name()
        )?;
    }
    let late = Spread::of(matrix.samples.iter().map(|sample| sample.beside.late_us));
    if let Some(late) = late {
        writeln!(
            out,
            "- The client itself was late by {} at its 99th percentile (at most {}){}.",
            time(late.median),
            time(late.most),
            if matrix.samples.iter().all(|sample| sample.prioritised) {
                ""
            } else {
                "; **it was refused its real-time priority**"
            }
        )?;
    }
    writeln!(out, "{}", page::provenance())?;
    Ok(())
}

fn plotted(options: &Options, matrix: &Matrix, layout: Layout) -> Vec<(Server, Spread, bool)> {
    let servers = options.servers().into_iter();
    let found = servers.filter_map(|server| {
        let place = Place {
            layout,
            server,
            attack: Attack::EndlessLoop,
            aggressors: PLOTTED,
        };
        let samples = of(matrix, place);
        let served = samples.iter().any(|sample| sample.beside.is_served());
        let figure = spread(&samples, |sample| sample.beside.p99_us / 1e3)?;
        Some((server, figure, served))
    });
    found.collect()
}

fn picture(options: &Options, matrix: &Matrix) -> String {
    let groups = options.common.layouts().into_iter().map(|layout| Group {
        title: layout.title().to_owned(),
        bars: plotted(options, matrix, layout)
            .into_iter()
            .map(|(server, figure, served)| Bar {
                name: server.name().to_owned(),
                words: (!served).then(|| "no answer".to_owned()),
                figure,
                ours: server == Server::Insula,
            })
            .collect(),
    });
    let groups: Vec<Group> = groups.collect();
    let title = format!("99th percentile of `hello` beside {PLOTTED} endless loops");
    plot::bars(&title, "ms", &groups)
}

fn front(options: &Options, matrix: &Matrix) -> String {
    let mut text = String::from("![Beside endless loops](docs/neighbour.svg)\n");
    let layouts = options.common.layouts();
    let ours = layouts.first().and_then(|layout| {
        plotted(options, matrix, *layout)
            .into_iter()
            .find(|(server, ..)| *server == Server::Insula)
    });
    if let Some((_, figure, _)) = ours {
        let _ = write!(
            text,
            "\nA small service beside {PLOTTED} endless loops of other tenants: 99 of 100 requests \
             take at most {}. [How this was measured, and all else](docs/benchmarks.md#\
             what-neighbours-cost).",
            time(figure.median * 1e3)
        );
    }
    text
}
