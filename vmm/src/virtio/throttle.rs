//! A device's token buckets, with the clock and the timer that they need on the device's thread.
//!
//! A request that is not let through stays in its queue. The timer then calls the device back when
//! there are tokens enough for it; until then the device does not look at that queue.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use super::device::{DeviceError, Interest, Readiness};
use crate::rate_limiter::{Admission, RateLimiter, RateLimits};

/// Later calls would be cut short by the limits of the type; a bucket is asked again then.
const LONGEST: Duration = Duration::from_secs(3600);

/// What one direction of a device may move, and whether it waits.
#[derive(Debug)]
pub(super) struct Throttle {
    limiter: RateLimiter,
    origin: Instant,
    timer: OwnedFd,
    waits: bool,
}

impl Throttle {
    /// Full buckets, from now on; nothing where nothing is limited.
    pub(super) fn of(limits: RateLimits) -> io::Result<Option<Self>> {
        if limits == RateLimits::default() {
            return Ok(None);
        }
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Some(Self {
            limiter: RateLimiter::new(limits, Duration::ZERO),
            origin: Instant::now(),
            timer: timerfd_create(TimerfdClockId::Monotonic, flags)?,
            waits: false,
        }))
    }

    /// Whether a request of that many bytes goes on now. If not, the device is called back.
    pub(super) fn admit(&mut self, bytes: u64) -> Result<bool, DeviceError> {
        match self.limiter.operation(bytes, self.origin.elapsed()) {
            Admission::Granted => {
                self.waits = false;
                Ok(true)
            }
            Admission::RetryIn(wait) => {
                self.arm(wait).map_err(|source| DeviceError::Host {
                    what: "setting a rate limit's timer",
                    source,
                })?;
                self.waits = true;
                Ok(false)
            }
        }
    }

    /// Whether a request waits for tokens.
    pub(super) fn waits(&self) -> bool {
        self.waits
    }

    /// Nothing waits any more: the timer came, or the device was reset.
    pub(super) fn go_on(&mut self) {
        self.waits = false;
    }

    /// What to wait for while a request waits.
    pub(super) fn interest(&self, token: u64) -> Option<Interest<'_>> {
        self.waits.then(|| Interest {
            descriptor: self.timer.as_fd(),
            readiness: Readiness::Readable,
            token,
        })
    }

    /// Setting it anew also forgets that it had run out before.
    fn arm(&self, wait: Duration) -> io::Result<()> {
        // Zero would turn it off.
        let wait = wait.clamp(Duration::from_nanos(1), LONGEST);
        let time = |time: Duration| Timespec {
            tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(time.subsec_nanos()),
        };
        let once = Itimerspec {
            it_interval: time(Duration::ZERO),
            it_value: time(wait),
        };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once)?;
        Ok(())
    }
}
