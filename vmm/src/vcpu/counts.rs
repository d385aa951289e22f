//! How often a vCPU left the guest, and for what.

use std::sync::atomic::{AtomicU64, Ordering};

/// Since the machine started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ExitCounts {
    /// Reads from ports.
    pub port_read: u64,
    /// Writes to ports.
    pub port_write: u64,
    /// Reads from device addresses.
    pub memory_read: u64,
    /// Writes to device addresses.
    pub memory_write: u64,
    /// Kicks, and signals of others.
    pub interrupted: u64,
    /// All else.
    pub other: u64,
}

impl std::ops::Add for ExitCounts {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            port_read: self.port_read.saturating_add(other.port_read),
            port_write: self.port_write.saturating_add(other.port_write),
            memory_read: self.memory_read.saturating_add(other.memory_read),
            memory_write: self.memory_write.saturating_add(other.memory_write),
            interrupted: self.interrupted.saturating_add(other.interrupted),
            other: self.other.saturating_add(other.other),
        }
    }
}

/// Written by one vCPU thread, read by whoever wants to know.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) port_read: Counter,
    pub(super) port_write: Counter,
    pub(super) memory_read: Counter,
    pub(super) memory_write: Counter,
    pub(super) interrupted: Counter,
    pub(super) other: Counter,
}

impl Counters {
    pub(super) fn read(&self) -> ExitCounts {
        ExitCounts {
            port_read: self.port_read.read(),
            port_write: self.port_write.read(),
            memory_read: self.memory_read.read(),
            memory_write: self.memory_write.read(),
            interrupted: self.interrupted.read(),
            other: self.other.read(),
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct Counter(AtomicU64);

impl Counter {
    /// One thread counts, so that no locked instruction is needed.
    pub(super) fn count(&self) {
        let before = self.0.load(Ordering::Relaxed);
        self.0.store(before.wrapping_add(1), Ordering::Relaxed);
    }

    fn read(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
