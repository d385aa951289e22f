//! The three tags of mClock (Gulati, Merchant, Varman, OSDI 2010): the share
//! tag lives in virtual time, the reservation and limit tags in real time.
//! Integers throughout, so that a run replays bit for bit on any machine.

use crate::units::{Millicores, Nanos, Shares};

/// Virtual time: nanoseconds of service per share, times 2^48.
///
/// Range: 2^127 / 2^48 = 2^79 ns of service by a tenant of one share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct VirtualTime(i128);

/// Virtual time per nanosecond of service: 2^48 / shares, rounded down.
/// The rounding is below 4e-9 of a share at 1,000,000 shares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Slope(i64);

const SHARE_SCALE: i64 = 1 << 48;

impl Slope {
    pub(crate) fn of(shares: Shares) -> Self {
        Self(SHARE_SCALE / i64::from(shares.get()))
    }

    fn span(self, service: Nanos) -> i128 {
        i128::from(service.as_nanos()) * i128::from(self.0)
    }
}

impl VirtualTime {
    /// The tag after `service` more nanoseconds.
    pub(crate) fn after(self, service: Nanos, slope: Slope) -> Self {
        Self(self.0 + slope.span(service))
    }

    /// The tag `service` nanoseconds earlier.
    pub(crate) fn before(self, service: Nanos, slope: Slope) -> Self {
        Self(self.0 - slope.span(service))
    }

    /// The tag under another weight such that its distance from `now`, counted
    /// in service, stays: (S − v)·w is the same before and after. (Lag under a
    /// change of weight: Stoica et al., "A Proportional Share Resource
    /// Allocation Algorithm", RTSS 1996.)
    pub(crate) fn rescaled(self, now: Self, old: Slope, new: Slope) -> Self {
        let distance = self.0 - now.0;
        let (old, new) = (i128::from(old.0), i128::from(new.0));
        // Split so that no product exceeds 2^127.
        let whole = (distance / old) * new;
        let rest = (distance % old) * new / old;
        Self(now.0 + whole + rest)
    }
}

/// Real time with 32 bits of fraction, so that dividing by a rate does not
/// drift: the error is 2^-32 ns per charge.
type Fine = u128;

const FINE_BITS: u32 = 32;

/// The caller's time zero, far enough from ours that any burst (at most 2^64 ns
/// of service at 2^42 a nanosecond) fits before it.
const ORIGIN: Fine = 1 << 110;

/// A point in time.
fn fine(time: Nanos) -> Fine {
    ORIGIN + fine_length(time)
}

/// A length of time.
fn fine_length(time: Nanos) -> Fine {
    Fine::from(time.as_nanos()) << FINE_BITS
}

/// Which way a rate's reciprocal is rounded: always against the tenant's
/// breaking its promise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Promise {
    /// Service is at least the rate (reservation).
    AtLeast,
    /// Service is at most the rate (limit).
    AtMost,
}

/// A tag in real time that moves by service/rate: mClock's R and L tags, and
/// also the theoretical arrival time of the generic cell rate algorithm
/// (ITU-T I.371), which is a token bucket kept as one number.
///
/// The tag may lag behind the clock by `slack`, no more: that is the burst.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RateTag {
    at: Fine,
    slack: Fine,
    per_nano: u64,
}

impl RateTag {
    /// A limit whose whole burst, `burst` of CPU time, is there at `now`.
    pub(crate) fn limit(rate: Millicores, burst: Nanos, now: Nanos) -> Self {
        let per_nano = per_nano(rate, Promise::AtMost);
        let slack = Fine::from(burst.as_nanos()) * Fine::from(per_nano);
        Self {
            at: fine(now).saturating_sub(slack),
            slack,
            per_nano,
        }
    }

    /// A reservation that is due from `now` on and may be caught up over
    /// `window` of elapsed time.
    pub(crate) fn reservation(rate: Millicores, window: Nanos, now: Nanos) -> Self {
        Self {
            at: fine(now),
            slack: fine_length(window),
            per_nano: per_nano(rate, Promise::AtLeast),
        }
    }

    /// Charges `service` at `now`.
    pub(crate) fn spend(&mut self, service: Nanos, now: Nanos) {
        let floor = fine(now).saturating_sub(self.slack);
        self.at = self.at.max(floor).saturating_add(self.span(service));
    }

    /// Replaces an earlier charge of `provisional` by `measured`.
    pub(crate) fn correct(&mut self, provisional: Nanos, measured: Nanos) {
        let without = self.at.saturating_sub(self.span(provisional));
        self.at = without.saturating_add(self.span(measured));
    }

    /// Drops what was left unused while there was nothing to serve.
    pub(crate) fn forget_before(&mut self, now: Nanos) {
        self.at = self.at.max(fine(now));
    }

    /// The first whole nanosecond at which the tag is not in the future.
    pub(crate) fn due(&self) -> Nanos {
        let whole = self.at.saturating_sub(ORIGIN).div_ceil(1 << FINE_BITS);
        Nanos::from_nanos(u64::try_from(whole).unwrap_or(u64::MAX))
    }

    /// `self` (the old rate) carried over into `fresh` (the new one): what was
    /// owed or saved, counted in service, stays, up to the new slack.
    pub(crate) fn carried_into(&self, mut fresh: Self, now: Nanos) -> Self {
        let now = fine(now);
        let (old, new) = (Fine::from(self.per_nano), Fine::from(fresh.per_nano));
        // Bounded before the product: tags are within 2^107, slopes within 2^42.
        let scaled = |distance: Fine| (distance / old).saturating_mul(new);
        fresh.at = if self.at >= now {
            now.saturating_add(scaled(self.at - now))
        } else {
            now.saturating_sub(scaled(now - self.at).min(fresh.slack))
        };
        fresh
    }

    fn span(&self, service: Nanos) -> Fine {
        Fine::from(service.as_nanos()) * Fine::from(self.per_nano)
    }
}

/// Fine time per nanosecond of service: 1000 × 2^32 / millicores, at most 2^42.
fn per_nano(rate: Millicores, promise: Promise) -> u64 {
    let numerator = 1_000_u64 << FINE_BITS;
    let rate = u64::from(rate.get());
    match promise {
        Promise::AtLeast => numerator / rate,
        Promise::AtMost => numerator.div_ceil(rate),
    }
}
