//! What was charged, over time.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::insula::{Charged, Desk};

/// What had been charged at one moment.
#[derive(Debug, Clone)]
pub(crate) struct Reading {
    pub(crate) at: Instant,
    pub(crate) charged: Charged,
}

impl Reading {
    /// Reads it. The moment is the middle of the asking.
    pub(crate) fn take(desk: &Desk) -> Result<Self> {
        let before = Instant::now();
        let charged = desk.charged()?;
        let at = before + before.elapsed() / 2;
        Ok(Self { at, charged })
    }

    /// Cores that a tenant got between two readings.
    pub(crate) fn cores(&self, later: &Self, tenant: &str) -> f64 {
        let seconds = later.at.saturating_duration_since(self.at).as_secs_f64();
        (later.charged.of(tenant) - self.charged.of(tenant)) / seconds
    }

    /// What part a tenant got of all that was charged to tenants between two readings.
    pub(crate) fn part(&self, later: &Self, tenant: &str) -> f64 {
        let all = later.charged.tenants() - self.charged.tenants();
        (later.charged.of(tenant) - self.charged.of(tenant)) / all
    }
}

/// Readings every so often for so long, the first at once and the last at the end.
pub(crate) fn every(desk: &Desk, step: Duration, span: Duration) -> Result<Vec<Reading>> {
    let begin = Instant::now();
    let mut readings = vec![Reading::take(desk)?];
    let mut next = begin + step;
    while next <= begin + span {
        sleep(next.saturating_duration_since(Instant::now()));
        readings.push(Reading::take(desk)?);
        // One that came late is not made up for: its window would be a short one.
        next = (next + step).max(Instant::now() + step / 2);
    }
    Ok(readings)
}

/// The pace of a tenant before and after a change that was sent at some moment, and when it took
/// effect if it did so at once: as much after the moment as makes up for what is missing.
///
/// ```text
///  pace   before ────────┐            ┌─────────── after
///                        sent ─delay─▶┘
///                        └──── window ─────┘   got = before · delay + after · (window − delay)
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Change {
    pub(crate) before: f64,
    pub(crate) after: f64,
    /// The mean pace from when the change was sent until the end of `window`.
    pub(crate) meanwhile: f64,
    pub(crate) window: Duration,
}

impl Change {
    /// In seconds; not a number where nothing changed.
    pub(crate) fn delay_seconds(&self) -> f64 {
        let step = self.after - self.before;
        if step.abs() < f64::EPSILON {
            return f64::NAN;
        }
        let part = (self.after - self.meanwhile) / step;
        (part * self.window.as_secs_f64()).max(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_delay_is_what_is_missing() {
        let change = Change {
            before: 0.25,
            after: 0.5,
            // A tenth of the window at the pace of before.
            meanwhile: 0.475,
            window: Duration::from_millis(500),
        };
        assert!((change.delay_seconds() - 0.05).abs() < 1e-9);
        let none = Change {
            after: 0.25,
            ..change
        };
        assert!(none.delay_seconds().is_nan());
        let early = Change {
            meanwhile: 0.51,
            ..change
        };
        assert_eq!(early.delay_seconds(), 0.0);
    }
}
