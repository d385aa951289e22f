//! What tenants and services used, as sums that only grow.

use insula_types::Outcome;

use crate::messages::UsageDelta;

/// Sums since creation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct UsageTotals {
    /// Requests, by [`Outcome::index`].
    pub requests: [u64; Outcome::ALL.len()],
    /// Fuel consumed.
    pub fuel: u64,
    /// CPU time charged, in nanoseconds.
    pub cpu_ns: u64,
    /// Integral of guest memory over time, in byte-milliseconds. Wider than the rest: 64 GiB for
    /// two days are 10^19 already.
    pub memory_byte_ms: u128,
    /// Request heads and bodies.
    pub bytes_in: u64,
    /// Response heads and bodies.
    pub bytes_out: u64,
}

impl UsageTotals {
    /// Adds another sum. Stays at the largest value instead of going round.
    pub fn add(&mut self, other: &Self) {
        for (sum, part) in self.requests.iter_mut().zip(other.requests) {
            *sum = sum.saturating_add(part);
        }
        self.fuel = self.fuel.saturating_add(other.fuel);
        self.cpu_ns = self.cpu_ns.saturating_add(other.cpu_ns);
        self.memory_byte_ms = self.memory_byte_ms.saturating_add(other.memory_byte_ms);
        self.bytes_in = self.bytes_in.saturating_add(other.bytes_in);
        self.bytes_out = self.bytes_out.saturating_add(other.bytes_out);
    }

    /// Requests whatever their outcome.
    #[must_use]
    pub fn requests_total(&self) -> u64 {
        self.requests
            .iter()
            .fold(0, |sum, part| sum.saturating_add(*part))
    }
}

impl From<&UsageDelta> for UsageTotals {
    fn from(delta: &UsageDelta) -> Self {
        Self {
            requests: delta.requests,
            fuel: delta.fuel,
            cpu_ns: delta.cpu_ns,
            memory_byte_ms: u128::from(delta.memory_byte_ms),
            bytes_in: delta.bytes_in,
            bytes_out: delta.bytes_out,
        }
    }
}
