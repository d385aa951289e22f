//! `shares`: whether a tenant gets what its shares, its reservation and its limit say.
//!
//! Tenants that always have work (endless loops, or short requests without pause) share a host; what
//! was charged to each is read from the host's own page of metrics, which `neighbour` and `metering`
//! hold against the kernel's books. Every figure is how far off the promise a tenant was.
//!
//! * [`check`]: the promises, and how each is looked at
//! * [`watch`]: reading what was charged, over time

mod check;
mod watch;

use std::fmt::Write as _;

use anyhow::{Context, Result};

use self::check::Check;
use crate::common::{Common, Whole};
use crate::page;
use crate::promise::{self, Sample};
use crate::say;

/// Options of `shares`.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    common: Common,
    /// Only these; nothing is written then
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Check>,
}

/// Runs all, prints the table, writes it down.
pub(crate) fn run(options: &Options) -> Result<()> {
    let scratch = tempfile::tempdir().context("a directory for the servers")?;
    let checks = if options.only.is_empty() {
        Check::ALL.to_vec()
    } else {
        options.only.clone()
    };
    let guests = check::Guests::load(&options.common)?;
    let mut samples = Vec::new();
    for round in 0..options.common.rounds {
        for layout in options.common.layouts() {
            let bed = options.common.bed(layout, scratch.path(), "".into())?;
            for check in &checks {
                let found = check
                    .run(&bed, layout, &guests, options.common.measured())
                    .with_context(|| format!("{} {check:?}", layout.word()))?;
                for finding in found {
                    let sample = Sample { layout, finding };
                    sample.tell(round);
                    samples.push(sample);
                }
            }
        }
    }
    let text = section(options, &samples)?;
    say(&text);
    if let Some(folder) = options.common.out(Whole::unless_only(&options.only)) {
        page::write_section(folder, "shares", &text)?;
    }
    Ok(())
}

fn section(options: &Options, samples: &[Sample]) -> Result<String> {
    let mut text = String::new();
    let out = &mut text;
    writeln!(out, "## What shares are worth\n")?;
    writeln!(
        out,
        "Tenants that always have work, on one host. The CPU that each got is what was charged to \
         it. Off is how far from the promise, as a part of it, the tenant was that was farthest; \
         live changes are timed from when they were sent.\n"
    )?;
    for layout in options.common.layouts() {
        writeln!(out, "### Shares: {}\n", layout.title())?;
        promise::table(out, samples, layout)?;
    }
    let common = &options.common;
    writeln!(
        out,
        "- Run: `{}`; every check on a host started afresh, {} s each; {} rounds.",
        common.command("shares"),
        common.seconds,
        common.rounds
    )?;
    writeln!(out, "{}", page::provenance())?;
    Ok(text)
}
