//! What `cost` found out, as its section of the page.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Result;

use crate::cost::{Sample, Series};
use crate::page::{self, DISTURBED, thousands, time};
use crate::plot;
use crate::plot::{Bar, Group};
use crate::servers::{Contestant, pooled_flags, tuned_flags};
use crate::stats::Spread;

const COST_PLOT: &str = "cost.svg";
/// The outcome of `cost`.
#[derive(Debug)]
pub(crate) struct Cost<'a> {
    pub(crate) series: &'a [Series],
    pub(crate) rounds: u16,
    pub(crate) seconds: u16,
    pub(crate) connections: usize,
}

impl Cost<'_> {
    /// The section, in Markdown.
    pub(crate) fn section(&self) -> Result<String> {
        let mut text = String::new();
        let out = &mut text;
        writeln!(out, "## What a request costs\n")?;
        writeln!(out, "![Server CPU per request]({COST_PLOT})\n")?;
        writeln!(
            out,
            "Server CPU time (user and kernel, of the server's process tree) per request of the \
             `hello` sample. All but raw hyper run it in a fresh WebAssembly instance per request; \
             in the row `instances reused` one instance serves 128 requests, which a service can \
             ask for. insula runs as `insula serve` does for everybody, deployed through the admin API: \
             fuel metering, measured CPU time, memory limits, deadlines, admission and the \
             scheduler are all on. `wasmtime serve` serves one component, and neither meters nor \
             schedules. Raw hyper answers the same bytes without WebAssembly: it is the floor.\n"
        )?;
        for series in self.series {
            writeln!(out, "### {}\n", series.layout.title())?;
            table(out, series)?;
        }
        self.conditions(out)?;
        Ok(text)
    }

    fn conditions(&self, out: &mut String) -> Result<()> {
        let (rounds, seconds, connections) = (self.rounds, self.seconds, self.connections);
        writeln!(
            out,
            "- Run: `cargo xtask bench cost --rounds {rounds} --seconds {seconds}`; {connections} \
             keep-alive connections, each with one request under way; {rounds} rounds of {seconds} s \
             after 1 s of warm-up, every server started afresh for each, their order moving on by \
             one every round; ratios are medians of the ratios within each round."
        )?;
        writeln!(out, "{}", page::provenance())?;
        writeln!(
            out,
            "- insula is built by `cargo xtask dist`: link-time optimisation and a profile of a \
             training load, as it is to be installed; in the row `plain release` as the README's \
             first command builds it. `wasmtime` 48.0.8 is built by `cargo install`, as its \
             project builds what it releases, without either; with LTO by \
             `CARGO_PROFILE_RELEASE_LTO=fat`; with LTO and profile by `cargo xtask dist wasmtime`, \
             the steps that build insula, with a profile of its own of the same load. Built alike \
             are insula and `with LTO and profile`; and `plain release` and `tuned`.{} \
             `wasmtime serve` runs with `-Scli`; as shipped with no other flag; pooled with `{}`; \
             tuned with `{}`.",
            self.missing(),
            pooled_flags(),
            tuned_flags()
        )?;
        for series in self.series {
            let elsewhere = series.samples.iter().map(|sample| sample.elsewhere * 100.0);
            let client = series.samples.iter().map(|sample| sample.client_us);
            if let (Some(elsewhere), Some(client)) = (Spread::of(elsewhere), Spread::of(client)) {
                writeln!(
                    out,
                    "- {}: the client took {:.1} µs per request; other processes took {:.0} % of \
                     the two cores (at most {:.0} %){}{}.",
                    series.layout.title(),
                    client.median,
                    elsewhere.median,
                    elsewhere.most,
                    if series.real_time {
                        ""
                    } else {
                        "; the client was refused its real-time priority"
                    },
                    if elsewhere.median > DISTURBED * 100.0 {
                        "; **this run was disturbed: take it again on a quiet machine**"
                    } else {
                        ""
                    },
                )?;
            }
        }
        Ok(())
    }

    /// Who was left out.
    fn missing(&self) -> String {
        let measured = |contestant| {
            let mut samples = self.series.iter().flat_map(|series| &series.samples);
            samples.any(|sample| sample.contestant == contestant)
        };
        let missing: Vec<_> = Contestant::ALL
            .into_iter()
            .filter(|contestant| !measured(*contestant))
            .map(|contestant| format!("`{}`", contestant.name()))
            .collect();
        if missing.is_empty() {
            return String::new();
        }
        format!(
            " **Not built for this run, and not measured: {}.** Where the peer by profile is missing, \
             what of insula's ratio is the profile's cannot be told from this table.",
            missing.join(", ")
        )
    }

    /// Writes the page and the plot.
    pub(crate) fn write(&self, folder: &Path) -> Result<()> {
        let groups: Vec<Group> = self.series.iter().map(group).collect();
        let picture = plot::bars("Server CPU per request, in microseconds", "µs", &groups);
        page::write_section(folder, "cost", &self.section()?)?;
        page::write_plot(folder, COST_PLOT, &picture)
    }
}

fn of(series: &Series, contestant: Contestant) -> impl Iterator<Item = &Sample> {
    series
        .samples
        .iter()
        .filter(move |sample| sample.contestant == contestant)
}

/// The ratio of two servers within each round.
fn ratio(series: &Series, contestant: Contestant, base: Contestant) -> Option<Spread> {
    Spread::of(of(series, contestant).filter_map(|sample| {
        let other = of(series, base).find(|other| other.round == sample.round)?;
        Some(sample.cpu_us() / other.cpu_us())
    }))
}

fn table(out: &mut String, series: &Series) -> Result<()> {
    writeln!(
        out,
        "| server | CPU-µs/request | of it kernel | × tuned wasmtime | × with LTO \
         | × with LTO and profile | × raw hyper | requests/s | p50 | p99 | errors |\n\
         |---|---|---|---|---|---|---|---|---|---|---|"
    )?;
    for contestant in Contestant::ALL {
        let spread = |figure: fn(&Sample) -> f64| Spread::of(of(series, contestant).map(figure));
        let Some(cpu) = spread(Sample::cpu_us) else {
            continue;
        };
        let bold = if contestant == Contestant::Insula {
            "**"
        } else {
            ""
        };
        let median = |figure: fn(&Sample) -> f64| spread(figure).map_or(f64::NAN, |s| s.median);
        let times = |base| {
            ratio(series, contestant, base).map_or("–".to_owned(), |s| format!("{:.2}", s.median))
        };
        writeln!(
            out,
            "| {bold}{}{bold} | {bold}{:.1}{bold} ({:.1}–{:.1}) | {:.1} | {} | {} | {} | {} | {} | {} | {} | {} |",
            contestant.name(),
            cpu.median,
            cpu.least,
            cpu.most,
            median(|sample| sample.system_us),
            times(Contestant::WasmtimeTuned),
            times(Contestant::WasmtimeOptimised),
            times(Contestant::WasmtimeProfiled),
            times(Contestant::RawHyper),
            thousands(median(|sample| sample.per_second)),
            time(median(|sample| sample.p50_us)),
            time(median(|sample| sample.p99_us)),
            of(series, contestant)
                .map(|sample| sample.errors)
                .sum::<u64>(),
        )?;
    }
    writeln!(out)?;
    Ok(())
}

fn group(series: &Series) -> Group {
    let bars = Contestant::ALL.into_iter().filter_map(|contestant| {
        Some(Bar {
            name: contestant.name().to_owned(),
            figure: Spread::of(of(series, contestant).map(Sample::cpu_us))?,
            words: None,
            ours: contestant == Contestant::Insula,
        })
    });
    Group {
        title: series.layout.title().to_owned(),
        bars: bars.collect(),
    }
}
