//! What came of an open loop.

use anyhow::Result;
use hdrhistogram::Histogram;

/// Latencies are told apart up to ten minutes, to three digits.
pub(super) const LATENCY_MAX_US: u64 = 600_000_000;
pub(super) const LATENCY_DIGITS: u8 = 3;

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    /// A 200 with the body that was expected.
    Good,
    /// Another answer.
    Status(u16),
    /// The connection failed, or the answer made no sense.
    Failed,
    /// Never sent or never answered.
    Unanswered,
}

/// One request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Record {
    /// When it was due, counted from the begin of what is measured.
    pub(crate) due_us: u32,
    /// From then until its ending, or until the run was over.
    pub(crate) took_us: u32,
    pub(crate) ending: Ending,
}

/// What came of a plan.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// Every request that was due in the measured time, in the order of their endings.
    pub(crate) records: Vec<Record>,
    /// How late the client itself was: from when a request was due until it was taken up.
    pub(crate) late: Histogram<u64>,
    /// Whether the kernel gave the client the priority that it asked for.
    pub(crate) prioritised: bool,
}

impl Outcome {
    /// Latencies in microseconds of the requests that ended in such a way.
    pub(crate) fn latency(&self, wanted: impl Fn(&Record) -> bool) -> Result<Histogram<u64>> {
        let mut latency = Histogram::new_with_max(LATENCY_MAX_US, LATENCY_DIGITS)?;
        for record in self.records.iter().filter(|record| wanted(record)) {
            latency.saturating_record(u64::from(record.took_us));
        }
        Ok(latency)
    }

    pub(crate) fn count(&self, wanted: impl Fn(&Record) -> bool) -> u64 {
        self.records.iter().filter(|record| wanted(record)).count() as u64
    }

    /// All that was not as it should be.
    pub(crate) fn errors(&self) -> u64 {
        self.count(|record| record.ending != Ending::Good)
    }
}
