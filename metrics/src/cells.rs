//! Counters, histograms and integrals that many threads add to and a scrape reads.
//!
//! Everything is `Relaxed`: each cell is a number of its own, and a scrape that catches two of
//! them a moment apart is no worse than one that came a moment later.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Nanoseconds in one second.
const NANOS_PER_SECOND: u64 = 1_000_000_000;

/// A count, which only grows.
#[derive(Debug, Default)]
pub(crate) struct Count(AtomicU64);

impl Count {
    pub(crate) fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Relaxed);
    }

    /// Lifts the count to `total`; a count that is already higher stays.
    pub(crate) fn raise_to(&self, total: u64) {
        self.0.fetch_max(total, Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// Nanoseconds as the seconds that Prometheus wants.
///
/// The sum is kept as an integer and divided only here, so that a year of additions of a
/// microsecond each loses nothing; the quotient is the nearest `f64` while the sum is below 2^53
/// (104 days of CPU), and off by at most 2^-53 of itself after that.
#[expect(clippy::cast_precision_loss, reason = "documented above")]
pub(crate) fn seconds(nanos: u64) -> f64 {
    nanos as f64 / NANOS_PER_SECOND as f64
}

/// A duration in nanoseconds; beyond 584 years, 584 years.
pub(crate) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// A distribution of durations over fixed bucket bounds.
#[derive(Debug)]
pub(crate) struct Histogram<const N: usize> {
    /// Upper bounds in nanoseconds, inclusive, ascending.
    bounds: &'static [u64; N],
    /// How many fell into each bucket (not cumulative: an observation is one addition).
    buckets: [AtomicU64; N],
    /// How many were above the last bound.
    above: AtomicU64,
    sum_nanos: AtomicU64,
}

/// What a [`Histogram`] holds at one moment, as Prometheus wants it.
#[derive(Debug)]
pub(crate) struct Distribution {
    /// (upper bound in seconds, observations at or below it).
    pub(crate) cumulative: Vec<(f64, u64)>,
    pub(crate) count: u64,
    pub(crate) sum_seconds: f64,
}

impl<const N: usize> Histogram<N> {
    pub(crate) fn new(bounds: &'static [u64; N]) -> Self {
        debug_assert!(bounds.is_sorted(), "bucket bounds ascend");
        Self {
            bounds,
            buckets: [const { AtomicU64::new(0) }; N],
            above: AtomicU64::new(0),
            sum_nanos: AtomicU64::new(0),
        }
    }

    pub(crate) fn observe(&self, duration: Duration) {
        let nanos = nanos(duration);
        let bucket = self.bounds.partition_point(|bound| *bound < nanos);
        self.buckets
            .get(bucket)
            .unwrap_or(&self.above)
            .fetch_add(1, Relaxed);
        self.sum_nanos.fetch_add(nanos, Relaxed);
    }

    /// The distribution, or nothing while nothing was observed.
    ///
    /// The count is the sum of the buckets that were read, so that `+Inf` equals `_count` even
    /// while others observe.
    pub(crate) fn read(&self) -> Option<Distribution> {
        let mut count = 0;
        let cumulative = self
            .bounds
            .iter()
            .zip(&self.buckets)
            .map(|(bound, bucket)| {
                count += bucket.load(Relaxed);
                (seconds(*bound), count)
            })
            .collect();
        count += self.above.load(Relaxed);
        (count > 0).then(|| Distribution {
            cumulative,
            count,
            sum_seconds: seconds(self.sum_nanos.load(Relaxed)),
        })
    }
}

/// The integral of a size over time, exposed in whole byte-seconds.
///
/// One word cannot hold it: 64 GiB over a day is 6·10^24 byte-nanoseconds. So the additions go to
/// `rest`, and every addition that carries it over a multiple of a byte-second takes that multiple
/// out and adds it to `whole`. Each such addition takes out exactly what it carried over, so at
/// any moment `rest / BYTE_SECOND` is the number of carries not yet taken out: `rest` never goes
/// below zero and never grows past (threads + 1) byte-seconds, whatever the interleaving. Only
/// `whole` is exposed, because the sum of both could be seen to fall between the two steps of a
/// carry, and Prometheus would take that for a restart.
#[derive(Debug, Default)]
pub(crate) struct Integral {
    /// Byte-seconds.
    whole: AtomicU64,
    /// Byte-nanoseconds.
    rest: AtomicU64,
}

impl Integral {
    /// Adds `bytes` held for `duration`.
    pub(crate) fn add(&self, bytes: u64, duration: Duration) {
        let product = u128::from(bytes) * u128::from(nanos(duration));
        let unit = u128::from(NANOS_PER_SECOND);
        let whole = u64::try_from(product / unit).unwrap_or(u64::MAX);
        let rest = u64::try_from(product % unit).unwrap_or(0);
        let before = self.rest.fetch_add(rest, Relaxed);
        // `rest` is below one unit, so at most one multiple is crossed.
        let carry = (before + rest) / NANOS_PER_SECOND - before / NANOS_PER_SECOND;
        if carry > 0 {
            self.rest.fetch_sub(NANOS_PER_SECOND, Relaxed);
        }
        if whole + carry > 0 {
            self.whole.fetch_add(whole + carry, Relaxed);
        }
    }

    /// Whole byte-seconds so far.
    pub(crate) fn byte_seconds(&self) -> u64 {
        self.whole.load(Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nanoseconds_do_not_drift() {
        let count = Count::default();
        for _ in 0..1_000_000 {
            count.add(1);
        }
        assert_eq!(seconds(count.get()).to_string(), "0.001");
        // A float sum of tenths would be 99999.99999…
        assert_eq!(seconds(100_000 * NANOS_PER_SECOND).to_string(), "100000");
        assert_eq!(seconds(5_000).to_string(), "0.000005");
    }

    #[test]
    fn raising_never_lowers() {
        let count = Count::default();
        count.raise_to(7);
        count.raise_to(5);
        assert_eq!(count.get(), 7);
    }

    #[test]
    fn an_observation_on_a_bound_is_below_it() {
        static BOUNDS: [u64; 2] = [1_000, 2_000];
        let histogram = Histogram::new(&BOUNDS);
        assert!(histogram.read().is_none());
        for nanos in [0, 1_000, 1_001, 2_000, 2_001] {
            histogram.observe(Duration::from_nanos(nanos));
        }
        let read = histogram.read().unwrap();
        assert_eq!(read.cumulative, [(0.000_001, 2), (0.000_002, 4)]);
        assert_eq!(read.count, 5);
        assert_eq!(read.sum_seconds.to_string(), "0.000006002");
    }

    #[test]
    fn the_integral_is_exact_from_many_threads() {
        let integral = Integral::default();
        // 3 bytes for 0.7 s: 2.1 byte-seconds each, so nearly every addition carries.
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..25_000 {
                        integral.add(3, Duration::from_millis(700));
                    }
                });
            }
        });
        assert_eq!(integral.byte_seconds(), 210_000);
        assert_eq!(integral.rest.load(Relaxed), 0);
    }

    #[test]
    fn the_integral_holds_years_of_many_gibibytes() {
        let integral = Integral::default();
        let year = Duration::from_secs(365 * 24 * 3600);
        integral.add(64 << 30, year);
        assert_eq!(integral.byte_seconds(), (64 << 30) * year.as_secs());
    }
}
