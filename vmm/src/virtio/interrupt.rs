//! How a device interrupts its driver.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::event::Event;

/// Bit 0 of InterruptStatus: a queue was used (virtio 1.2, 4.2.2).
const USED_BUFFER: u32 = 1;
/// Bit 1: the configuration changed.
const CONFIG_CHANGED: u32 = 2;

/// The wire to the interrupt controller: edge-triggered, one per device.
pub enum InterruptLine {
    /// KVM watches the descriptor and raises the line itself.
    Irqfd(Event),
    /// For a KVM without irqfd: a call that raises and lowers the line.
    Call(Box<dyn Fn() + Send + Sync>),
}

impl fmt::Debug for InterruptLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Irqfd(_) => "Irqfd",
            Self::Call(_) => "Call",
        })
    }
}

impl InterruptLine {
    /// One edge.
    pub fn pulse(&self) {
        match self {
            Self::Irqfd(line) => line.raise(),
            Self::Call(call) => call(),
        }
    }
}

/// Status and line together. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Interrupt {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    status: AtomicU32,
    line: InterruptLine,
}

impl Interrupt {
    /// Nothing is pending.
    #[must_use]
    pub fn new(line: InterruptLine) -> Self {
        Self {
            inner: Arc::new(Inner {
                status: AtomicU32::new(0),
                line,
            }),
        }
    }

    /// A queue has used buffers. [`Queues::notify`](super::Queues::notify) asks first whether the
    /// driver wants to know.
    pub fn buffers_used(&self) {
        self.raise(USED_BUFFER);
    }

    /// The configuration space, or NEEDS_RESET, has changed.
    pub fn config_changed(&self) {
        self.raise(CONFIG_CHANGED);
    }

    fn raise(&self, bit: u32) {
        self.inner.status.fetch_or(bit, Ordering::SeqCst);
        self.inner.line.pulse();
    }

    pub(super) fn status(&self) -> u32 {
        self.inner.status.load(Ordering::SeqCst)
    }

    pub(super) fn acknowledge(&self, bits: u32) {
        self.inner.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// After a restore: what was pending is pending again, and the line tells so.
    pub(super) fn restore(&self, status: u32) {
        self.acknowledge(u32::MAX);
        if status & (USED_BUFFER | CONFIG_CHANGED) != 0 {
            self.raise(status & (USED_BUFFER | CONFIG_CHANGED));
        }
    }
}
