//! What was promised, what was found, and the table of both.

use std::fmt::Write as _;

use anyhow::Result;

use crate::cores::Layout;
use crate::page::{self, time};
use crate::say;
use crate::stats::Spread;

/// What a figure counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    /// A part of something else.
    Part,
    Seconds,
    /// From 1/n (one has all) to 1 (all have what they should).
    Index,
    /// So many times something else.
    Times,
    Kibibytes,
}

impl Unit {
    pub(crate) fn words(self, figure: f64) -> String {
        match self {
            Self::Part => format!("{:.2} %", figure * 100.0),
            Self::Seconds => time(figure * 1e6),
            Self::Index => format!("{figure:.4}"),
            Self::Times => format!("{figure:.2} ×"),
            Self::Kibibytes => format!("{figure:.0} KiB"),
        }
    }
}

/// What should be.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Promise {
    pub(crate) what: &'static str,
    pub(crate) unit: Unit,
    pub(crate) bound: f64,
    pub(crate) at_least: bool,
}

impl Promise {
    pub(crate) const fn at_most(what: &'static str, unit: Unit, bound: f64) -> Self {
        Self {
            what,
            unit,
            bound,
            at_least: false,
        }
    }

    pub(crate) fn is_held(&self, figure: f64) -> bool {
        if self.at_least {
            figure >= self.bound
        } else {
            figure <= self.bound
        }
    }
}

/// What is.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Finding {
    pub(crate) promise: Promise,
    pub(crate) figure: f64,
    pub(crate) elsewhere: f64,
}

/// A finding in one layout; there is one for each round.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sample {
    pub(crate) layout: Layout,
    pub(crate) finding: Finding,
}

impl Sample {
    /// To whoever waits.
    pub(crate) fn tell(&self, round: u16) {
        let (layout, finding) = (self.layout.word(), &self.finding);
        say(&format!(
            "{layout} round {}  {}: {}  elsewhere {:.0} %",
            round + 1,
            finding.promise.what,
            finding.promise.unit.words(finding.figure),
            finding.elsewhere * 100.0
        ));
    }
}

/// A row for each promise that was looked at in a layout.
pub(crate) fn table(out: &mut String, samples: &[Sample], layout: Layout) -> Result<()> {
    writeln!(out, "| what | measured | promised | held | others |")?;
    writeln!(out, "|---|---|---|---|---|")?;
    let mut told: Vec<&str> = Vec::new();
    let here = || samples.iter().filter(|sample| sample.layout == layout);
    for sample in here() {
        let promise = &sample.finding.promise;
        if told.contains(&promise.what) {
            continue;
        }
        told.push(promise.what);
        let same = || here().filter(|other| other.finding.promise.what == promise.what);
        let elsewhere = Spread::of(same().map(|sample| sample.finding.elsewhere));
        let elsewhere = elsewhere.map_or(0.0, |spread| spread.most);
        let Some(figures) = Spread::of(same().map(|sample| sample.finding.figure)) else {
            writeln!(out, "| {} | – | | no | |", promise.what)?;
            continue;
        };
        let unit = promise.unit;
        writeln!(
            out,
            "| {} | **{}** ({}–{}) | {} {} | {} | {} |",
            promise.what,
            unit.words(figures.median),
            unit.words(figures.least),
            unit.words(figures.most),
            if promise.at_least { "≥" } else { "≤" },
            unit.words(promise.bound),
            page::held(promise.is_held(figures.median), elsewhere),
            page::elsewhere(elsewhere),
        )?;
    }
    writeln!(out)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_has_the_median_and_says_whether_it_keeps_the_promise() {
        let sample = |figure, elsewhere| Sample {
            layout: Layout::Split,
            finding: Finding {
                promise: Promise::at_most("this", Unit::Times, 1.5),
                figure,
                elsewhere,
            },
        };
        let row = |samples: &[Sample]| {
            let mut text = String::new();
            table(&mut text, samples, Layout::Split).unwrap();
            text.lines().nth(2).unwrap_or_default().to_owned()
        };
        let held = row(&[sample(1.0, 0.01), sample(1.4, 0.5), sample(2.0, 0.02)]);
        let expected = "| this | **1.40 ×** (1.00 ×–2.00 ×) | ≤ 1.50 × | ? | **50 %, disturbed** |";
        assert_eq!(held, expected);
        assert!(row(&[sample(1.4, 0.01)]).contains("| yes | 1 % |"));
        assert!(row(&[sample(1.6, 0.0)]).contains("| no | 0 % |"));
        assert_eq!(row(&[sample(f64::NAN, 0.0)]), "| this | – | | no | |");
    }
}
