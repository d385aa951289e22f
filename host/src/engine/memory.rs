//! Guest memory: one instance's limit over all its memories and tables, its peak, its integral
//! over time, and its part of its tenant's.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use insula_types::quantity::Bytes;
use wasmtime::ResourceLimiter;

use super::config::caps;

/// Bytes of host memory behind one table element.
const TABLE_ELEMENT_BYTES: u64 = 8;

/// The memory of all instances of one tenant together.
#[derive(Debug)]
pub struct TenantMemory {
    used: AtomicU64,
    /// `u64::MAX` stands for no limit.
    limit: AtomicU64,
}

impl TenantMemory {
    /// Nothing used, no limit.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            used: AtomicU64::new(0),
            limit: AtomicU64::new(u64::MAX),
        }
    }

    /// Changes the limit. What is used already stays; growth beyond it is refused.
    pub fn set_limit(&self, limit: Option<Bytes>) {
        let limit = limit.map_or(u64::MAX, Bytes::get);
        self.limit.store(limit, Ordering::Relaxed);
    }

    /// The limit in bytes, if there is one.
    #[must_use]
    pub fn limit_bytes(&self) -> Option<u64> {
        let limit = self.limit.load(Ordering::Relaxed);
        (limit != u64::MAX).then_some(limit)
    }

    /// Bytes in use now.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    fn take(&self, bytes: u64) -> bool {
        let limit = self.limit.load(Ordering::Relaxed);
        let grow = |used: u64| used.checked_add(bytes).filter(|used| *used <= limit);
        self.used
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, grow)
            .is_ok()
    }

    fn give_back(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }
}

impl Default for TenantMemory {
    fn default() -> Self {
        Self::new()
    }
}

/// Counts one instance's memory, and refuses what is over a limit. Gives its part of the
/// tenant's memory back when dropped.
pub(super) struct MemoryMeter {
    tenant: Arc<TenantMemory>,
    limit: u64,
    used: u64,
    peak: u64,
    refused: bool,
    /// What was granted last, until the engine says whether it could grow.
    granted: u64,
    since: Instant,
    byte_ns: u128,
}

impl MemoryMeter {
    pub(super) fn new(tenant: Arc<TenantMemory>, limit: Bytes, now: Instant) -> Self {
        Self {
            tenant,
            limit: limit.get(),
            used: 0,
            peak: 0,
            refused: false,
            granted: 0,
            since: now,
            byte_ns: 0,
        }
    }

    /// Bytes in use now.
    pub(super) const fn used_bytes(&self) -> u64 {
        self.used
    }

    /// Most bytes in use at once.
    pub(super) const fn peak_bytes(&self) -> u64 {
        self.peak
    }

    /// Whether growth was ever refused to this instance.
    pub(super) const fn refused(&self) -> bool {
        self.refused
    }

    /// The integral of bytes over time until `now`, in byte-milliseconds.
    pub(super) fn byte_ms(&mut self, now: Instant) -> u64 {
        self.integrate(now);
        u64::try_from(self.byte_ns / 1_000_000).unwrap_or(u64::MAX)
    }

    fn integrate(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.since).as_nanos();
        self.byte_ns += elapsed * u128::from(self.used);
        self.since = now;
    }

    fn grow(&mut self, bytes: u64) -> bool {
        let fits = self
            .used
            .checked_add(bytes)
            .is_some_and(|used| used <= self.limit)
            && self.tenant.take(bytes);
        if !fits {
            self.refused = true;
            return false;
        }
        self.integrate(Instant::now());
        self.used += bytes;
        self.granted = bytes;
        self.peak = self.peak.max(self.used);
        true
    }

    /// Undoes the last grant: it was within the limits, and the engine still could not grow.
    fn take_back(&mut self) {
        self.refused = true;
        let bytes = std::mem::take(&mut self.granted);
        self.integrate(Instant::now());
        self.used -= bytes;
        self.tenant.give_back(bytes);
    }
}

impl Drop for MemoryMeter {
    fn drop(&mut self) {
        self.tenant.give_back(self.used);
    }
}

fn bytes_between(current: usize, desired: usize, unit: u64) -> u64 {
    u64::try_from(desired.saturating_sub(current))
        .unwrap_or(u64::MAX)
        .saturating_mul(unit)
}

impl ResourceLimiter for MemoryMeter {
    fn memory_growing(
        &mut self,
        current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        Ok(self.grow(bytes_between(current, desired, 1)))
    }

    fn memory_grow_failed(&mut self, _error: wasmtime::Error) -> wasmtime::Result<()> {
        self.take_back();
        Ok(())
    }

    fn table_grow_failed(&mut self, _error: wasmtime::Error) -> wasmtime::Result<()> {
        self.take_back();
        Ok(())
    }

    fn table_growing(
        &mut self,
        current: usize,
        desired: usize,
        _maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        Ok(self.grow(bytes_between(current, desired, TABLE_ELEMENT_BYTES)))
    }

    fn instances(&self) -> usize {
        caps::INSTANCES
    }

    fn tables(&self) -> usize {
        caps::TABLES
    }

    fn memories(&self) -> usize {
        caps::MEMORIES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_limits_hold_and_all_is_given_back() {
        let tenant = Arc::new(TenantMemory::new());
        tenant.set_limit(Some(Bytes::mib(3)));
        let now = Instant::now();
        let mut first = MemoryMeter::new(tenant.clone(), Bytes::mib(2), now);
        let mut second = MemoryMeter::new(tenant.clone(), Bytes::mib(2), now);
        assert!(first.memory_growing(0, 2 << 20, None).unwrap());
        assert!(
            !first.memory_growing(2 << 20, (2 << 20) + 1, None).unwrap(),
            "its own limit"
        );
        assert!(
            !second.memory_growing(0, 2 << 20, None).unwrap(),
            "the tenant's limit"
        );
        assert!(second.memory_growing(0, 1 << 20, None).unwrap());
        assert_eq!(tenant.used_bytes(), 3 << 20);
        assert!(first.refused() && second.refused());
        drop(first);
        assert_eq!(tenant.used_bytes(), 1 << 20);
        drop(second);
        assert_eq!(tenant.used_bytes(), 0);
    }

    #[test]
    fn the_integral_counts_bytes_times_time() {
        let tenant = Arc::new(TenantMemory::new());
        let mut meter = MemoryMeter::new(tenant, Bytes::mib(2), Instant::now());
        assert!(meter.memory_growing(0, 1000, None).unwrap());
        let later = meter.since + std::time::Duration::from_secs(2);
        assert_eq!(meter.byte_ms(later), 2_000_000);
    }
}
