//! Token buckets for bytes and operations.
//!
//! A device asks before it serves a request; what is refused stays in the queue until the time that
//! comes with the refusal. There is no clock in here: `now` is a [`Duration`] since an origin of the
//! caller's choosing, the same for all calls on one limiter. A `now` that goes backwards is taken as
//! the latest one seen.
//!
//! *Bound:* over any time `t`, a bucket grants at most `rate · t + burst`, as long as no single
//! request is larger than the burst. One that is larger would wait for ever; it is granted when the
//! bucket is full, and leaves a debt that later requests wait for, so that the bound is then
//! `rate · t + largest request`.
//!
//! The level is kept in billionths of a token. A nanosecond at `rate` tokens per second is exactly
//! `rate` of them, so nothing is ever rounded, however often the bucket is asked.

use std::num::NonZeroU64;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Parts of a token: what one nanosecond brings at one token per second.
const PARTS_PER_TOKEN: i128 = 1_000_000_000;

/// A rate and a burst. Zero of either would be a device that never moves, and cannot be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rate {
    /// Tokens per second in the long run.
    pub per_second: NonZeroU64,
    /// Tokens that an idle bucket saves up.
    pub burst: NonZeroU64,
}

/// What a device may move: bytes and operations, each or neither limited.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimits {
    /// Payload bytes.
    #[serde(default)]
    pub bytes: Option<Rate>,
    /// Requests or packets.
    #[serde(default)]
    pub operations: Option<Rate>,
}

/// The answer to a request for tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Admission {
    /// Taken from the bucket; go ahead.
    Granted,
    /// Nothing was taken; the same request is granted after this time, if nobody else takes.
    RetryIn(Duration),
}

/// One bucket.
#[derive(Debug, Clone)]
pub struct TokenBucket {
    rate: Rate,
    /// Parts in the bucket; negative is debt. At most `burst · PARTS_PER_TOKEN`, below 2^94.
    level: i128,
    /// The time up to which `level` is filled.
    filled: Duration,
}

impl TokenBucket {
    /// A bucket that is full at `now`.
    #[must_use]
    pub fn new(rate: Rate, now: Duration) -> Self {
        Self {
            rate,
            level: parts(rate.burst.get()),
            filled: now,
        }
    }

    /// Takes `tokens`, or says when to ask again.
    pub fn take(&mut self, tokens: u64, now: Duration) -> Admission {
        self.fill(now);
        match self.wait(tokens) {
            None => {
                self.level -= parts(tokens);
                Admission::Granted
            }
            Some(wait) => Admission::RetryIn(wait),
        }
    }

    fn fill(&mut self, now: Duration) {
        let Some(passed) = now.checked_sub(self.filled) else {
            return;
        };
        self.filled = now;
        // A full bucket needs no product, and what does not fit a u64 of nanoseconds (584 years)
        // fills any bucket.
        let full = parts(self.rate.burst.get());
        self.level = match u64::try_from(passed.as_nanos()) {
            Ok(nanos) => {
                // The product of two u64 may not fit an i128; what is cut off is above any burst.
                let earned = i128::from(nanos).saturating_mul(self.rate.per_second.get().into());
                self.level.saturating_add(earned).min(full)
            }
            Err(_) => full,
        };
    }

    /// How long until `tokens` can be taken; nothing when they can be now.
    fn wait(&self, tokens: u64) -> Option<Duration> {
        let needed = parts(tokens.min(self.rate.burst.get()));
        let missing = needed.checked_sub(self.level).filter(|parts| *parts > 0)?;
        let nanos = missing
            .unsigned_abs()
            .div_ceil(u128::from(self.rate.per_second.get()));
        Some(Duration::from_nanos(
            u64::try_from(nanos).unwrap_or(u64::MAX),
        ))
    }
}

fn parts(tokens: u64) -> i128 {
    i128::from(tokens) * PARTS_PER_TOKEN
}

/// The two buckets of a device.
#[derive(Debug, Clone)]
pub struct RateLimiter {
    bytes: Option<TokenBucket>,
    operations: Option<TokenBucket>,
}

impl RateLimiter {
    /// Full buckets for `limits`, from `now` on.
    #[must_use]
    pub fn new(limits: RateLimits, now: Duration) -> Self {
        let bucket = |rate: Option<Rate>| rate.map(|rate| TokenBucket::new(rate, now));
        Self {
            bytes: bucket(limits.bytes),
            operations: bucket(limits.operations),
        }
    }

    /// One operation of `bytes`: both buckets grant it, or neither loses a token.
    pub fn operation(&mut self, bytes: u64, now: Duration) -> Admission {
        let mut wait = None;
        for (bucket, tokens) in [(&mut self.bytes, bytes), (&mut self.operations, 1)] {
            if let Some(bucket) = bucket {
                bucket.fill(now);
                wait = wait.max(bucket.wait(tokens));
            }
        }
        if let Some(wait) = wait {
            return Admission::RetryIn(wait);
        }
        for (bucket, tokens) in [(&mut self.bytes, bytes), (&mut self.operations, 1)] {
            if let Some(bucket) = bucket {
                bucket.level -= parts(tokens);
            }
        }
        Admission::Granted
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rate(per_second: u64, burst: u64) -> Rate {
        Rate {
            per_second: NonZeroU64::new(per_second).expect("test rates are not zero"),
            burst: NonZeroU64::new(burst).expect("test bursts are not zero"),
        }
    }

    const fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_burst_then_the_rate() {
        let mut bucket = TokenBucket::new(rate(10, 5), seconds(0));
        assert_eq!(bucket.take(5, seconds(0)), Admission::Granted);
        let tenth = Duration::from_millis(100);
        assert_eq!(bucket.take(1, seconds(0)), Admission::RetryIn(tenth));
        assert_eq!(bucket.take(1, tenth), Admission::Granted);
        // A long rest saves up no more than the burst.
        assert_eq!(bucket.take(5, seconds(3600)), Admission::Granted);
        assert_eq!(bucket.take(1, seconds(3600)), Admission::RetryIn(tenth));
    }

    #[test]
    fn what_is_larger_than_the_burst_leaves_a_debt() {
        let mut bucket = TokenBucket::new(rate(10, 5), seconds(0));
        assert_eq!(bucket.take(25, seconds(0)), Admission::Granted);
        // 20 of debt and 1 more, at 10 per second.
        assert_eq!(
            bucket.take(1, seconds(0)),
            Admission::RetryIn(Duration::from_millis(2_100))
        );
        assert_eq!(
            bucket.take(1, Duration::from_millis(2_100)),
            Admission::Granted
        );
    }

    #[test]
    fn both_buckets_grant_or_neither_pays() {
        let limits = RateLimits {
            bytes: Some(rate(1000, 1000)),
            operations: Some(rate(1, 2)),
        };
        let mut limiter = RateLimiter::new(limits, seconds(0));
        assert_eq!(limiter.operation(500, seconds(0)), Admission::Granted);
        // Bytes refuse (500 left); the operation must not be gone afterwards.
        assert_eq!(
            limiter.operation(600, seconds(0)),
            Admission::RetryIn(Duration::from_millis(100))
        );
        assert_eq!(limiter.operation(500, seconds(0)), Admission::Granted);
        // Now operations refuse for a second; the bytes of that second must be there.
        assert_eq!(
            limiter.operation(0, seconds(0)),
            Admission::RetryIn(seconds(1))
        );
        assert_eq!(limiter.operation(1000, seconds(1)), Admission::Granted);
    }

    #[test]
    fn time_that_goes_backwards_brings_nothing() {
        let mut bucket = TokenBucket::new(rate(10, 10), seconds(100));
        assert_eq!(bucket.take(10, seconds(100)), Admission::Granted);
        for now in [0, 99, 100] {
            assert!(matches!(
                bucket.take(1, seconds(now)),
                Admission::RetryIn(_)
            ));
        }
    }

    fn any_rate() -> impl Strategy<Value = Rate> {
        let number = prop_oneof![1..100u64, 1..=u64::MAX, Just(u64::MAX)];
        (number.clone(), number).prop_map(|(per_second, burst)| rate(per_second, burst))
    }

    fn any_number() -> impl Strategy<Value = u64> {
        prop_oneof![0..1_000u64, any::<u64>(), Just(u64::MAX)]
    }

    proptest! {
        /// Whatever is asked whenever: no overflow, and never above the bound.
        #[test]
        fn never_more_than_rate_times_time_plus_burst(
            rate in any_rate(),
            asks in prop::collection::vec((any_number(), any_number(), any::<bool>()), 1..60),
        ) {
            let mut bucket = TokenBucket::new(rate, Duration::ZERO);
            let (mut now, mut granted, mut largest) = (0u64, 0u128, rate.burst.get());
            for (step, tokens, within) in asks {
                now = now.saturating_add(step);
                let tokens = if within { tokens.min(rate.burst.get()) } else { tokens };
                if bucket.take(tokens, Duration::from_nanos(now)) == Admission::Granted {
                    granted += u128::from(tokens);
                    largest = largest.max(tokens);
                }
                // In whole tokens: what the rate brought may be rounded up, never the grants.
                let earned = (u128::from(now) * u128::from(rate.per_second.get()))
                    .div_ceil(1_000_000_000);
                prop_assert!(granted <= earned + u128::from(largest));
            }
        }

        /// The promised time is enough, and a nanosecond less is not.
        #[test]
        fn the_wait_is_exact(rate in any_rate(), first in any_number(), second in 1..=u64::MAX) {
            let mut bucket = TokenBucket::new(rate, Duration::ZERO);
            prop_assert_eq!(bucket.take(first, Duration::ZERO), Admission::Granted);
            if let Admission::RetryIn(wait) = bucket.clone().take(second, Duration::ZERO) {
                let early = wait.saturating_sub(Duration::from_nanos(1));
                prop_assert!(matches!(bucket.clone().take(second, early), Admission::RetryIn(_)));
                // A wait of 584 years is cut off there.
                if wait < Duration::from_nanos(u64::MAX) {
                    prop_assert_eq!(bucket.take(second, wait), Admission::Granted);
                }
            }
        }

        /// Asking often neither gains nor loses against asking once.
        #[test]
        fn small_steps_add_up(
            rate in any_rate(),
            steps in prop::collection::vec(0..1_000_000_000u64, 1..50),
        ) {
            let mut often = TokenBucket::new(rate, Duration::ZERO);
            prop_assert_eq!(often.take(rate.burst.get(), Duration::ZERO), Admission::Granted);
            let mut once = often.clone();
            let mut now = Duration::ZERO;
            for step in steps {
                now += Duration::from_nanos(step);
                let _ = often.take(u64::MAX, now).eq(&Admission::Granted).then(|| {
                    // A full bucket grants what is larger; so must the other one, now.
                    once.take(u64::MAX, now)
                });
            }
            often.fill(now);
            once.fill(now);
            prop_assert_eq!(often.level, once.level);
        }
    }
}
