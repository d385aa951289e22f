//! `docs/benchmarks.md`: a section per subcommand, each replaced by the run that made it and left
//! alone by all others.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::cost::{Sample, Series};
use crate::plot::{Bar, Group};
use crate::servers::{Contestant, pooled_flags, tuned_flags};
use crate::stats::Spread;
use crate::{peers, plot, say};

const PAGE: &str = "benchmarks.md";
const COST_PLOT: &str = "cost.svg";
/// Above this, throughput and latency are those of a machine that did other things as well.
const DISTURBED_PERCENT: f64 = 5.0;

/// What stands above all sections of a new page.
const PREAMBLE: &str = "\
# Benchmarks

Every section is written by the command that it names, from one run in which all servers take \
turns on the same cores with the same client. Figures are medians of the rounds, with the least \
and the largest in brackets. Times differ between machines, and between a quiet and a busy hour of \
one; the ratios are what to look at.
";

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
             `hello` sample. All but raw hyper run it in a fresh WebAssembly instance per request. \
             insula runs as `insula serve` does for everybody, deployed through the admin API: \
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
            "- Run: `cargo run --release -p insula-bench -- cost --rounds {rounds} --seconds \
             {seconds}`; {connections} keep-alive connections, each with one request under way; \
             {rounds} rounds of {seconds} s after 1 s of warm-up, every server started afresh for \
             each, their order moving on by one every round; ratios are medians of the ratios \
             within each round."
        )?;
        writeln!(out, "- Machine: {}.", machine())?;
        writeln!(
            out,
            "- Commit: {}. Date: {}.",
            commit(),
            said("date", &["-u", "+%F"])
        )?;
        writeln!(
            out,
            "- `wasmtime serve` is 48.0.8 as `cargo install` builds it, run with `-Scli`; as \
             shipped with no other flag; pooled with `{}`; tuned with `{}`.",
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
                    if elsewhere.median > DISTURBED_PERCENT {
                        "; **this run was disturbed: take it again on a quiet machine**"
                    } else {
                        ""
                    },
                )?;
            }
        }
        Ok(())
    }

    /// Writes the page and the plot.
    pub(crate) fn write(&self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
        let page = folder.join(PAGE);
        let before = fs::read_to_string(&page).unwrap_or_else(|_| PREAMBLE.to_owned());
        fs::write(&page, replace_section(&before, "cost", &self.section()?))
            .with_context(|| page.display().to_string())?;
        let groups: Vec<Group> = self.series.iter().map(group).collect();
        let picture = plot::bars("Server CPU per request, in microseconds", "µs", &groups);
        let file = folder.join(COST_PLOT);
        fs::write(&file, picture).with_context(|| file.display().to_string())?;
        say(&format!(
            "written: {} and {}",
            page.display(),
            file.display()
        ));
        Ok(())
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
        "| server | CPU-µs/request | of it kernel | × tuned wasmtime | × raw hyper | requests/s \
         | p50 | p99 | errors |\n|---|---|---|---|---|---|---|---|---|"
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
            "| {bold}{}{bold} | {bold}{:.1}{bold} ({:.1}–{:.1}) | {:.1} | {} | {} | {} | {} | {} | {} |",
            contestant.name(),
            cpu.median,
            cpu.least,
            cpu.most,
            median(|sample| sample.system_us),
            times(Contestant::WasmtimeTuned),
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
            ours: contestant == Contestant::Insula,
        })
    });
    Group {
        title: series.layout.title().to_owned(),
        bars: bars.collect(),
    }
}

/// 41,200
fn thousands(figure: f64) -> String {
    let digits = format!("{:.0}", figure / 100.0) + "00";
    let head = digits.len() % 3;
    let mut text = digits[..head].to_owned();
    for (index, three) in digits.as_bytes()[head..].chunks(3).enumerate() {
        if head > 0 || index > 0 {
            text.push(',');
        }
        text.push_str(&String::from_utf8_lossy(three));
    }
    text
}

fn time(us: f64) -> String {
    if us < 1000.0 {
        format!("{us:.0} µs")
    } else {
        format!("{:.1} ms", us / 1e3)
    }
}

/// Puts a section in its place, or at the end of a page that has none.
fn replace_section(page: &str, name: &str, section: &str) -> String {
    let (begin, end) = (
        format!("<!-- {name}: begin -->"),
        format!("<!-- {name}: end -->"),
    );
    let section = format!("{begin}\n{}\n{end}", section.trim_end());
    if let Some((before, rest)) = page.split_once(&begin)
        && let Some((_, after)) = rest.split_once(&end)
    {
        return format!("{before}{section}{after}");
    }
    format!("{}\n\n{section}\n", page.trim_end())
}

/// What a program says, on one line.
fn said(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .current_dir(peers::repository())
        .output();
    output.map_or("unknown".to_owned(), |output| {
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    })
}

fn commit() -> String {
    let commit = said("git", &["rev-parse", "--short=12", "HEAD"]);
    if said("git", &["status", "--porcelain", "--untracked-files=no"]).is_empty() {
        format!("`{commit}`")
    } else {
        format!("`{commit}` with changes")
    }
}

fn machine() -> String {
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(name));
        let value = line.and_then(|line| line.split_once(':'));
        value.map_or("unknown".to_owned(), |(_, value)| value.trim().to_owned())
    };
    let cores = cpus
        .lines()
        .filter(|line| line.starts_with("processor"))
        .count();
    let memory = field(
        &fs::read_to_string("/proc/meminfo").unwrap_or_default(),
        "MemTotal",
    );
    let kib: u64 = memory
        .split_whitespace()
        .next()
        .and_then(|kib| kib.parse().ok())
        .unwrap_or(0);
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let flags = field(&cpus, "flags");
    let virtual_machine = if flags.split(' ').any(|flag| flag == "hypervisor") {
        ", a virtual machine"
    } else {
        ""
    };
    format!(
        "{} ({cores} cores), {} GiB{virtual_machine}; Linux {}",
        field(&cpus, "model name"),
        (kib + (1 << 19)) >> 20,
        kernel.trim(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_is_replaced_and_the_others_stay() {
        let page = replace_section("# Page\n", "a", "one\n");
        let page = replace_section(&page, "b", "two\n");
        let page = replace_section(&page, "a", "three\n");
        let expected = "# Page\n\n<!-- a: begin -->\nthree\n<!-- a: end -->\n\n\
                        <!-- b: begin -->\ntwo\n<!-- b: end -->\n";
        assert_eq!(page, expected);
    }

    #[test]
    fn figures_are_readable() {
        assert_eq!(thousands(41_234.0), "41,200");
        assert_eq!(thousands(141_234.0), "141,200");
        assert_eq!(thousands(949.0), "900");
        assert_eq!(thousands(1_250_000.0), "1,250,000");
        assert_eq!(
            (time(12.3), time(1250.0)),
            ("12 µs".into(), "1.2 ms".into())
        );
    }
}
