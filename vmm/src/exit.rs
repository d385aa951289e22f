//! Why a machine ended, in words for a person.

use std::io;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::event::Event;

/// How a guest asked for a reboot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RebootBy {
    /// The ACPI reset register.
    Acpi,
    /// The keyboard controller's reset line.
    Keyboard,
    /// It did not, but its watchdog ran out.
    Watchdog,
}

/// Why a machine ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExitReason {
    /// ACPI sleep state S5.
    #[error("the guest powered itself off")]
    Poweroff,
    /// It wants to start anew, or its watchdog finds that it should.
    #[error("{}", match .0 {
        RebootBy::Watchdog => "the guest's watchdog ran out: it did not say in time that it was well",
        RebootBy::Acpi | RebootBy::Keyboard => "the guest asked for a reboot",
    })]
    Reboot(RebootBy),
    /// Someone on the host.
    #[error("stopped by the host")]
    Stopped,
    /// A fault while handling a fault while handling a fault.
    #[error("vCPU {vcpu} triple-faulted: the guest's kernel crashed before it could say why")]
    TripleFault {
        /// Which.
        vcpu: u8,
    },
    /// The guest set its processor to a state that cannot be.
    #[error(
        "the processor refused to run vCPU {vcpu} in the state that the guest put it (hardware reason {reason:#x})"
    )]
    EntryFailed {
        /// Which.
        vcpu: u8,
        /// As the hardware gives it.
        reason: u64,
    },
    /// KVM gave up on an instruction.
    #[error("KVM could not go on with vCPU {vcpu} at {rip:#x}: {what}")]
    Internal {
        /// Which.
        vcpu: u8,
        /// Where the guest was.
        rip: u64,
        /// The kernel's sub-error, in words.
        what: String,
    },
    /// KVM returned something that cannot come with the devices that we have.
    #[error("KVM left vCPU {vcpu} for a reason that this monitor does not know: {what}")]
    Unknown {
        /// Which.
        vcpu: u8,
        /// The exit's name.
        what: String,
    },
    /// The call itself failed.
    #[error("running vCPU {vcpu}: {reason}")]
    Run {
        /// Which.
        vcpu: u8,
        /// The kernel's reason.
        reason: String,
    },
    /// A thread of ours ended where it must not.
    #[error("the monitor's own {thread} thread failed; this is a mistake of the monitor")]
    Monitor {
        /// Which.
        thread: String,
    },
}

impl ExitReason {
    /// Whether this is an ending that guest or host asked for.
    #[must_use]
    pub fn is_orderly(&self) -> bool {
        matches!(self, Self::Poweroff | Self::Reboot(_) | Self::Stopped)
    }
}

/// Where the first reason counts, and whoever waits finds it.
#[derive(Debug)]
pub(crate) struct Ending {
    reason: Mutex<Option<ExitReason>>,
    ended: Condvar,
    event: Event,
}

impl Ending {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            reason: Mutex::new(None),
            ended: Condvar::new(),
            event: Event::new()?,
        })
    }

    /// The machine is over. Later reasons are consequences of the first, and are dropped.
    pub(crate) fn end(&self, reason: ExitReason) {
        let mut first = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
        if first.is_none() {
            *first = Some(reason);
            self.event.raise();
            self.ended.notify_all();
        }
    }

    pub(crate) fn reason(&self) -> Option<ExitReason> {
        let reason = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
        reason.clone()
    }

    /// Stays raised once the machine is over.
    pub(crate) fn event(&self) -> &Event {
        &self.event
    }

    /// `None` if it is not over by then.
    pub(crate) fn wait(&self, deadline: Option<Instant>) -> Option<ExitReason> {
        let mut reason = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if reason.is_some() {
                return reason.clone();
            }
            reason = match deadline {
                None => self
                    .ended
                    .wait(reason)
                    .unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left == Duration::ZERO {
                        return None;
                    }
                    let waited = self.ended.wait_timeout(reason, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }
}
