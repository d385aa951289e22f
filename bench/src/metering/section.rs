//! What was found, as a section of the page.

use std::fmt::Write as _;

use anyhow::Result;

use super::{FUEL, MIX, Options, REQUEST, Sample, Server};
use crate::common::count;
use crate::page;
use crate::stats::Spread;

pub(super) fn write(
    options: &Options,
    kernels: &[&'static str],
    samples: &[Sample],
    books: f64,
) -> Result<String> {
    let mut text = String::new();
    let out = &mut text;
    writeln!(out, "## What metering costs\n")?;
    writeln!(
        out,
        "Server CPU of the same computation: on insula, which meters fuel; on `wasmtime serve` of \
         the same version, which does not; and on the same with `{FUEL}`. Ratios are to \
         `wasmtime serve` without fuel.\n"
    )?;
    writeln!(
        out,
        "| kernel | insula | wasmtime | wasmtime with fuel | insula, ratio | with fuel, ratio | \
         ns per fuel | others |\n|---|---|---|---|---|---|---|---|"
    )?;
    let mut means = [Vec::new(), Vec::new()];
    for &kernel in kernels {
        let of = |server: Server| {
            let all = samples.iter().filter(move |sample| sample.kernel == kernel);
            all.filter(move |sample| sample.server == server)
        };
        let cpu = |server| {
            let spread = Spread::of(of(server).map(|sample| sample.cpu_ms));
            spread.map_or("–".to_owned(), |s| format!("{:.1} ms", s.median))
        };
        let ratio = |server| {
            Spread::of(of(server).filter_map(|sample| {
                let base = of(Server::Wasmtime).find(|base| base.round == sample.round)?;
                Some(sample.cpu_ms / base.cpu_ms)
            }))
        };
        let words = |spread: Option<Spread>| {
            spread.map_or("–".to_owned(), |s| {
                format!("**{:.2}** ({:.2}–{:.2})", s.median, s.least, s.most)
            })
        };
        let each = Spread::of(
            of(Server::Insula).filter_map(|sample| Some(sample.cpu_ms * 1e6 / sample.fuel?)),
        );
        let elsewhere = samples
            .iter()
            .filter(|sample| sample.kernel == kernel)
            .map(|sample| sample.elsewhere);
        let ratios = [ratio(Server::Insula), ratio(Server::WasmtimeFuel)];
        for (mean, ratio) in means.iter_mut().zip(ratios) {
            mean.extend(ratio.map(|spread| spread.median));
        }
        writeln!(
            out,
            "| {kernel} | {} | {} | {} | {} | {} | {} | {} |",
            cpu(Server::Insula),
            cpu(Server::Wasmtime),
            cpu(Server::WasmtimeFuel),
            words(ratios[0]),
            words(ratios[1]),
            each.map_or("–".to_owned(), |s| format!("{:.2}", s.median)),
            page::elsewhere(Spread::of(elsewhere).map_or(0.0, |s| s.most)),
        )?;
    }
    writeln!(
        out,
        "| geometric mean | | | | **{:.2}** | **{:.2}** | | |\n",
        geometric_mean(&means[0]),
        geometric_mean(&means[1])
    )?;
    let common = &options.common;
    writeln!(
        out,
        "While tenants with {} shared the host for {} s, what it charged to them and to itself was \
         **{books:.4}** of the CPU that the kernel says its processes used.\n",
        MIX.map(|(sample, ..)| format!("`{sample}`")).join(", "),
        common.seconds,
    )?;
    writeln!(
        out,
        "- Run: `{}`; one core for the servers, of which one is busy at a time; requests of {} ms \
         or more, one after the other, {} s for each cell; {} rounds, the order of the servers \
         moving on by one every round.",
        common.command("metering"),
        REQUEST.as_millis(),
        common.seconds,
        common.rounds
    )?;
    writeln!(out, "{}", page::provenance())?;
    Ok(text)
}

fn geometric_mean(figures: &[f64]) -> f64 {
    let sum: f64 = figures.iter().map(|figure| figure.ln()).sum();
    (sum / count(figures.len() as u64)).exp()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_geometric_mean_of_a_ratio_and_its_inverse_is_one() {
        assert!((geometric_mean(&[2.0, 0.5]) - 1.0).abs() < 1e-12);
        assert!((geometric_mean(&[2.0, 8.0]) - 4.0).abs() < 1e-12);
        assert!(geometric_mean(&[]).is_nan());
    }
}
