//! The guest's watchdog: a guest that does not say in time that it is well is started anew.
//!
//! ```text
//!            RUN := 1              AGAIN := 1, or RUN := 1
//!   off ───────────────▶ counts ◀────────────────┐
//!    ▲                    │ │ └──────────────────┘
//!    └──────── RUN := 0 ──┘ └── nothing left ──▶ the machine is over: a reboot
//! ```
//!
//! The firmware table WDAT ("Hardware Watchdog Timers Design Specification", Microsoft, 2006) tells the
//! guest which register to write for what, and so any kernel with a driver for that table (Linux:
//! `wdat_wdt`) has a `/dev/watchdog`. All registers have four bytes, and are read and written whole;
//! anything else reads as all ones and is dropped:
//!
//! | offset | name | read | written |
//! |---|---|---|---|
//! | 0 | RUN | whether it counts | bit 0: begin, or end |
//! | 4 | COUNT | from how many it begins | the same; what is not within bounds is dropped |
//! | 8 | LEFT | how many are left | – |
//! | 12 | AGAIN | 0 | bit 0: begin again |
//!
//! It stands still while the machine does, and what was left is part of a saved machine.
//!
//! *Who waits.* One thread, asleep while nothing counts. A guest that says that it is well does not wake
//! it: it wakes when the time that it knew of is over, and finds a later one.

mod timer;

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

pub(crate) use timer::WatchdogSaved;
use timer::{COUNTS, Timer};

use crate::exit::{Ending, ExitReason, RebootBy};
use crate::layout;
use crate::threads::{ThreadKind, Threads};

/// Milliseconds of one count, for the table.
pub(crate) const PERIOD_MS: u32 = timer::PERIOD_MS;
/// The fewest and the most counts from which it begins, for the table.
pub(crate) const COUNTS_MIN_MAX: (u32, u32) = (*COUNTS.start(), *COUNTS.end());

pub(crate) const RUN: u64 = 0;
pub(crate) const COUNT: u64 = 4;
pub(crate) const LEFT: u64 = 8;
pub(crate) const AGAIN: u64 = 12;
/// What the registers take of the address space.
pub(crate) const REGISTERS_BYTES: u64 = 16;

/// The device, shared by the vCPU threads and the one that waits.
#[derive(Debug)]
pub(crate) struct Watchdog {
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Debug)]
struct Inner {
    timer: Timer,
    /// The machine is being taken apart.
    over: bool,
}

impl Watchdog {
    /// It stands still until [`go`](Self::go).
    pub(crate) fn new(saved: WatchdogSaved) -> Self {
        Self {
            inner: Mutex::new(Inner {
                timer: Timer::restored(saved),
                over: false,
            }),
            changed: Condvar::new(),
        }
    }

    /// The offset of an address in the registers.
    pub(crate) fn offset_of(address: u64) -> Option<u64> {
        let offset = address.checked_sub(layout::WATCHDOG.0)?;
        (offset < REGISTERS_BYTES).then_some(offset)
    }

    /// The guest reads; `data` is as it is where nobody answers.
    pub(crate) fn read(&self, offset: u64, data: &mut [u8]) {
        let Ok(data) = <&mut [u8; 4]>::try_from(data) else {
            return;
        };
        let timer = self.lock();
        let value = match offset {
            RUN => u32::from(timer.timer.counts()),
            COUNT => timer.timer.count(),
            LEFT => timer.timer.counts_left(Instant::now()),
            AGAIN => 0,
            _ => return,
        };
        *data = value.to_le_bytes();
    }

    /// The guest writes.
    pub(crate) fn write(&self, offset: u64, data: &[u8]) {
        let Ok(data) = <[u8; 4]>::try_from(data) else {
            return;
        };
        let value = u32::from_le_bytes(data);
        let mut inner = self.lock();
        let before = inner.timer.due();
        let now = Instant::now();
        match (offset, value & 1) {
            (RUN, 1) => inner.timer.begin(now),
            (RUN, _) => inner.timer.end(),
            (COUNT, _) => inner.timer.set_count(value),
            (AGAIN, 1) => inner.timer.again(now),
            _ => {}
        }
        self.wake_if_earlier(&inner, before);
    }

    /// The machine runs.
    pub(crate) fn go(&self) {
        let mut inner = self.lock();
        let before = inner.timer.due();
        inner.timer.go(Instant::now());
        self.wake_if_earlier(&inner, before);
    }

    /// The machine stands still.
    pub(crate) fn stand(&self) {
        self.lock().timer.stand(Instant::now());
    }

    /// While the machine stands still.
    pub(crate) fn save(&self) -> WatchdogSaved {
        self.lock().timer.save(Instant::now())
    }

    /// Starts the thread that waits, and ends the machine when nothing is left.
    pub(crate) fn watch(
        self: &Arc<Self>,
        ending: Arc<Ending>,
        threads: &Threads,
    ) -> io::Result<JoinHandle<Option<()>>> {
        let watchdog = Arc::clone(self);
        threads.spawn(ThreadKind::Watchdog, move || {
            if watchdog.wait() {
                ending.end(ExitReason::Reboot(RebootBy::Watchdog));
            }
        })
    }

    /// Ends that thread.
    pub(crate) fn stop(&self) {
        self.lock().over = true;
        self.changed.notify_all();
    }

    /// `true` when nothing is left, `false` when the machine is being taken apart.
    fn wait(&self) -> bool {
        let mut inner = self.lock();
        loop {
            if inner.over {
                return false;
            }
            let now = Instant::now();
            inner = match inner.timer.due() {
                None => self
                    .changed
                    .wait(inner)
                    .unwrap_or_else(PoisonError::into_inner),
                Some(due) if due <= now => return true,
                Some(due) => {
                    let waited = self.changed.wait_timeout(inner, due - now);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    fn wake_if_earlier(&self, inner: &Inner, before: Option<Instant>) {
        let earlier = match (before, inner.timer.due()) {
            (None, Some(_)) => true,
            (Some(before), Some(due)) => due < before,
            (_, None) => false,
        };
        if earlier {
            self.changed.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Whoever panicked has left a timer behind that is whole: it has no state between two.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn read(watchdog: &Watchdog, offset: u64) -> u32 {
        let mut data = [0xff; 4];
        watchdog.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(watchdog: &Watchdog, offset: u64, value: u32) {
        watchdog.write(offset, &value.to_le_bytes());
    }

    #[test]
    fn registers_are_read_and_written_whole_and_the_rest_is_nobody() {
        let watchdog = Watchdog::new(WatchdogSaved::default());
        for offset in 0..2 * REGISTERS_BYTES {
            for length in 0..=8 {
                let mut data = vec![0xff; length];
                watchdog.read(offset, &mut data);
                let answered = data.iter().any(|byte| *byte != 0xff);
                let is_register = length == 4 && offset % 4 == 0 && offset < REGISTERS_BYTES;
                assert_eq!(answered, is_register, "{length} at {offset}");
                if length != 4 {
                    watchdog.write(offset, &vec![1; length]);
                }
            }
        }
        assert_eq!(watchdog.save(), WatchdogSaved::default());
        assert_eq!(Watchdog::offset_of(layout::WATCHDOG.0 - 1), None);
        assert_eq!(Watchdog::offset_of(layout::WATCHDOG.0), Some(0));
        let beyond = layout::WATCHDOG.0 + REGISTERS_BYTES;
        assert_eq!(Watchdog::offset_of(beyond), None);
    }

    #[test]
    fn it_ends_a_machine_that_runs_and_no_other() {
        let ending = Arc::new(Ending::new().expect("a descriptor"));
        let watchdog = Arc::new(Watchdog::new(WatchdogSaved::default()));
        let thread = watchdog.watch(Arc::clone(&ending), &Threads::default());
        write(&watchdog, COUNT, COUNTS_MIN_MAX.0);
        write(&watchdog, RUN, 1);
        assert_eq!(read(&watchdog, RUN), 1);
        let shortest = Duration::from_millis(u64::from(COUNTS_MIN_MAX.0 * PERIOD_MS));
        // It stands still: all is left however long one waits.
        assert_eq!(ending.wait(Some(Instant::now() + shortest / 4)), None);
        assert_eq!(read(&watchdog, LEFT), COUNTS_MIN_MAX.0);
        watchdog.go();
        let patience = Instant::now() + Duration::from_secs(60);
        let reason = ending.wait(Some(patience));
        assert_eq!(reason, Some(ExitReason::Reboot(RebootBy::Watchdog)));
        assert_eq!(read(&watchdog, LEFT), 0);
        let joined = thread.expect("a thread").join();
        assert_eq!(joined.expect("no panic"), Some(()));
    }

    #[test]
    fn its_thread_ends_with_the_machine() {
        let ending = Arc::new(Ending::new().expect("a descriptor"));
        let watchdog = Arc::new(Watchdog::new(WatchdogSaved::default()));
        let thread = watchdog.watch(Arc::clone(&ending), &Threads::default());
        watchdog.go();
        write(&watchdog, RUN, 1);
        watchdog.stop();
        let joined = thread.expect("a thread").join();
        assert_eq!(joined.expect("no panic"), Some(()));
        assert_eq!(ending.reason(), None);
    }
}
