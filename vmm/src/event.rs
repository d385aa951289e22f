//! A counter that one side raises and another waits for: an eventfd, which KVM can raise or wait
//! for as well.
#![allow(
    unsafe_code,
    reason = "the eventfd that KVM's crate takes does not lend its descriptor safely"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Never blocks, neither side.
#[derive(Debug)]
pub struct Event(EventFd);

impl Event {
    /// Not raised.
    ///
    /// # Errors
    /// No descriptor is to be had.
    pub fn new() -> io::Result<Self> {
        EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map(Self)
    }

    /// Another handle on the same event.
    ///
    /// # Errors
    /// No descriptor is to be had.
    pub fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// Wakes whoever waits, now or later.
    pub fn raise(&self) {
        // Refused only at 2^64 - 2, when it is raised anyway.
        let _ = self.0.write(1);
    }

    /// Lowers it. `true` if it was raised.
    pub fn clear(&self) -> bool {
        self.0.read().is_ok()
    }

    /// For KVM's irqfd and ioeventfd.
    #[must_use]
    pub fn eventfd(&self) -> &EventFd {
        &self.0
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor belongs to `self.0`, which keeps it open as long as `self` is
        // borrowed.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raised_once_or_often_is_cleared_at_once() {
        let event = Event::new().expect("a descriptor");
        let other = event.try_clone().expect("a descriptor");
        assert!(!event.clear());
        other.raise();
        other.raise();
        assert!(event.clear());
        assert!(!event.clear());
    }
}
