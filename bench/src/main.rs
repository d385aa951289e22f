//! `insula-bench`: what Insula costs, beside what others cost.
//!
//! Every figure is taken in one interleaved run with its peers, on the same cores, by the same
//! client, several times; what counts is the ratio of medians, not the microseconds of one machine.
//!
//! * [`cost`]: server CPU per request of a small service
//! * [`servers`]: who takes part, and how each is started; [`insula`] and [`floor`] in particular
//! * [`machines`]: publishes what the machines' own bench found
//! * [`load`], [`response`]: the client; [`train`]: the same for a compiler that wants to learn
//! * [`process`], [`cores`]: processes that we start, what they used, and where they may run
//! * [`report`], [`page`], [`plot`], [`stats`]: what is made of it
//!
//! It looks at all servers from outside, through their sockets and the kernel's books, and depends
//! on no crate of ours. All traffic stays on the loopback interface.
#![forbid(unsafe_code)]

mod books;
mod common;
mod cores;
mod cost;
mod crowd;
mod density;
mod floor;
mod http;
mod insula;
mod load;
mod machines;
mod metering;
mod neighbour;
mod open_loop;
mod overload;
mod page;
mod peers;
mod plot;
mod process;
mod promise;
mod report;
mod response;
mod servers;
mod shares;
mod stats;
mod targets;
mod train;
mod wire;
mod workerd;

use std::io::Write;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// What Insula costs, beside what others cost.
#[derive(Debug, Parser)]
#[command(name = "insula-bench")]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Server CPU per request of `hello`: a fresh instance for each, everything on
    Cost(cost::Options),
    /// What a service feels of those that it shares a host with
    Neighbour(neighbour::Options),
    /// Whether a tenant gets what its shares, its reservation and its limit say
    Shares(shares::Options),
    /// What becomes of others when one tenant asks for three times what there is
    Overload(overload::Options),
    /// Ten thousand services, of which hardly any is asked
    Density(density::Options),
    /// What fuel costs on seven small computations
    Metering(metering::Options),
    /// Publishes what `cargo xtask vm-bench` found, which calls it
    #[command(hide = true)]
    Machines(machines::Options),
    /// The load from which `cargo xtask dist`, which calls it, learns what is often run
    #[command(hide = true)]
    Train(train::Options),
    /// The floor: raw hyper, no Wasm. `cost` starts it for itself
    #[command(hide = true)]
    Floor(floor::Options),
}

fn main() -> ExitCode {
    let result = match Arguments::parse().verb {
        Verb::Cost(options) => cost::run(&options),
        Verb::Neighbour(options) => neighbour::run(&options),
        Verb::Shares(options) => shares::run(&options),
        Verb::Overload(options) => overload::run(&options),
        Verb::Density(options) => density::run(&options),
        Verb::Metering(options) => metering::run(&options),
        Verb::Machines(options) => machines::run(&options),
        Verb::Train(options) => train::run(&options),
        Verb::Floor(options) => floor::run(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// To whoever waits. A closed terminal is no reason to stop.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}
