//! Guest memory: one instance's limit over all its memories and tables, its peak, its integral
//! over time, and its part of its tenant's, which has its part of the host's.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use insula_types::quantity::Bytes;
use wasmtime::ResourceLimiter;

use super::config::caps;
use crate::storage::Purse;

/// Bytes of host memory behind one table element.
const TABLE_ELEMENT_BYTES: u64 = 8;

/// The memory of all guests of the host together.
#[derive(Debug)]
pub struct HostMemory {
    used: AtomicU64,
    /// What they may use.
    budget: u64,
    /// Shares of all tenants.
    shares: AtomicU64,
}

impl HostMemory {
    /// Nothing used of `budget`.
    #[must_use]
    pub const fn new(budget: Bytes) -> Self {
        Self {
            used: AtomicU64::new(0),
            budget: budget.get(),
            shares: AtomicU64::new(0),
        }
    }

    /// Bytes in use now.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Bytes that guests may use.
    #[must_use]
    pub const fn budget_bytes(&self) -> u64 {
        self.budget
    }

    /// From here on a tenant may have no more than its part.
    const fn pressed_from(&self) -> u64 {
        self.budget - self.budget / 8
    }

    /// What a tenant of these shares may have while the host is pressed.
    fn part(&self, shares: u64) -> u64 {
        let all = self.shares.load(Ordering::Relaxed).max(shares).max(1);
        let part = u128::from(self.budget) * u128::from(shares) / u128::from(all);
        u64::try_from(part).unwrap_or(u64::MAX)
    }
}

/// By whose limit memory was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// The instance's, or its tenant's.
    Limit,
    /// The host has no more to give to this tenant.
    Host,
}

/// The memory of all instances of one tenant together. Two limits: its own; and where seven eighths
/// of the host's budget are in use, its part of that by shares. So whoever has much is refused
/// first, and whoever has little still finds some.
#[derive(Debug)]
pub struct TenantMemory {
    host: Arc<HostMemory>,
    used: AtomicU64,
    /// `u64::MAX` stands for no limit.
    limit: AtomicU64,
    shares: AtomicU64,
    /// How often growth was refused, by [`Refused`].
    refused: [AtomicU64; 2],
}

impl TenantMemory {
    /// Nothing used, no limit, no shares.
    #[must_use]
    pub fn new(host: Arc<HostMemory>) -> Self {
        Self {
            host,
            used: AtomicU64::new(0),
            limit: AtomicU64::new(u64::MAX),
            shares: AtomicU64::new(0),
            refused: Default::default(),
        }
    }

    /// Changes the limit and the shares. What is used already stays; growth beyond is refused.
    pub fn set(&self, limit: Option<Bytes>, shares: u64) {
        let limit = limit.map_or(u64::MAX, Bytes::get);
        self.limit.store(limit, Ordering::Relaxed);
        let before = self.shares.swap(shares, Ordering::Relaxed);
        self.host.shares.fetch_add(shares, Ordering::Relaxed);
        self.host.shares.fetch_sub(before, Ordering::Relaxed);
    }

    /// Bytes in use now.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// How often growth was refused by the tenant's or an instance's limit, and by the host.
    #[must_use]
    pub fn refusals(&self) -> (u64, u64) {
        let [limit, host] = &self.refused;
        (limit.load(Ordering::Relaxed), host.load(Ordering::Relaxed))
    }

    /// Whether one more instance may be begun: not where nothing can be left for it.
    ///
    /// # Errors
    /// By whose limit it may not.
    pub fn has_room(&self) -> Result<(), Refused> {
        let used = self.used_bytes();
        if used >= self.limit.load(Ordering::Relaxed) {
            return Err(Refused::Limit);
        }
        self.host_allows(used, self.host.used_bytes())
    }

    fn host_allows(&self, own: u64, all: u64) -> Result<(), Refused> {
        let host = &self.host;
        if all <= host.pressed_from() {
            return Ok(());
        }
        let shares = self.shares.load(Ordering::Relaxed);
        if all > host.budget || own > host.part(shares) {
            return Err(Refused::Host);
        }
        Ok(())
    }

    fn take(&self, bytes: u64) -> Result<(), Refused> {
        let own = self.used.fetch_add(bytes, Ordering::Relaxed);
        let all = self.host.used.fetch_add(bytes, Ordering::Relaxed);
        let (own, all) = (own.saturating_add(bytes), all.saturating_add(bytes));
        let allowed = if own > self.limit.load(Ordering::Relaxed) {
            Err(Refused::Limit)
        } else {
            self.host_allows(own, all)
        };
        if allowed.is_err() {
            self.give_back(bytes);
        }
        allowed
    }

    fn refuse(&self, by: Refused) {
        self.refused[by as usize].fetch_add(1, Ordering::Relaxed);
    }

    fn give_back(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
        self.host.used.fetch_sub(bytes, Ordering::Relaxed);
    }
}

impl Purse for TenantMemory {
    fn take(&self, bytes: u64) -> bool {
        let taken = Self::take(self, bytes);
        taken.map_err(|by| self.refuse(by)).is_ok()
    }

    fn give(&self, bytes: u64) {
        self.give_back(bytes);
    }
}

impl Drop for TenantMemory {
    fn drop(&mut self) {
        let shares = *self.shares.get_mut();
        self.host.shares.fetch_sub(shares, Ordering::Relaxed);
    }
}

/// Counts one instance's memory, and refuses what is over a limit. Gives its part of the
/// tenant's memory back when dropped.
pub(super) struct MemoryMeter {
    tenant: Arc<TenantMemory>,
    limit: u64,
    used: u64,
    peak: u64,
    refused: Option<Refused>,
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
            refused: None,
            granted: 0,
            since: now,
            byte_ns: 0,
        }
    }

    /// Another request begins in this instance. Its integral begins with the end of the last one:
    /// what was held between the two was held for it.
    pub(super) const fn begin(&mut self) {
        self.peak = self.used;
        self.byte_ns = 0;
        self.refused = None;
    }

    /// Whether the tenant and the host have room for more than there is.
    pub(super) fn has_room(&self) -> bool {
        self.tenant.has_room().is_ok()
    }

    /// Bytes in use now.
    pub(super) const fn used_bytes(&self) -> u64 {
        self.used
    }

    /// Most bytes in use at once.
    pub(super) const fn peak_bytes(&self) -> u64 {
        self.peak
    }

    /// By whose limit growth was refused to this instance first, if ever it was.
    pub(super) const fn refused(&self) -> Option<Refused> {
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
        let used = self.used.checked_add(bytes);
        let granted = match used {
            Some(used) if used <= self.limit => self.tenant.take(bytes),
            _ => Err(Refused::Limit),
        };
        if let Err(by) = granted {
            self.refuse(by);
            return false;
        }
        self.integrate(Instant::now());
        self.used += bytes;
        self.granted = bytes;
        self.peak = self.peak.max(self.used);
        true
    }

    fn refuse(&mut self, by: Refused) {
        self.tenant.refuse(by);
        self.refused.get_or_insert(by);
    }

    /// Undoes the last grant: it was within the limits, and the engine still could not grow.
    fn take_back(&mut self) {
        self.refuse(Refused::Limit);
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

    fn tenant(host: &Arc<HostMemory>, limit: Option<Bytes>, shares: u64) -> Arc<TenantMemory> {
        let tenant = TenantMemory::new(host.clone());
        tenant.set(limit, shares);
        Arc::new(tenant)
    }

    fn host(mib: u64) -> Arc<HostMemory> {
        Arc::new(HostMemory::new(Bytes::mib(mib)))
    }

    #[test]
    fn both_limits_hold_and_all_is_given_back() {
        let host = host(1_000);
        let tenant = tenant(&host, Some(Bytes::mib(3)), 1);
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
        assert_eq!((tenant.used_bytes(), host.used_bytes()), (3 << 20, 3 << 20));
        assert_eq!(first.refused(), Some(Refused::Limit));
        assert_eq!(second.refused(), Some(Refused::Limit));
        assert_eq!(tenant.refusals(), (2, 0));
        assert_eq!(tenant.has_room(), Err(Refused::Limit));
        drop(first);
        assert_eq!(tenant.used_bytes(), 1 << 20);
        assert_eq!(tenant.has_room(), Ok(()));
        drop(second);
        assert_eq!((tenant.used_bytes(), host.used_bytes()), (0, 0));
    }

    #[test]
    fn what_is_left_of_the_host_is_for_those_who_have_little() {
        let host = host(80);
        let (much, little) = (tenant(&host, None, 1), tenant(&host, None, 1));
        let grab = |tenant: &Arc<TenantMemory>, mib: usize| {
            let mut meter = MemoryMeter::new(tenant.clone(), Bytes::mib(100), Instant::now());
            let granted = meter.memory_growing(0, mib << 20, None).unwrap();
            (meter, granted)
        };
        let (held, granted) = grab(&much, 70);
        assert!(granted, "nobody else wants it");
        assert_eq!(much.has_room(), Ok(()), "seven eighths are not passed");
        let (refused, granted) = grab(&much, 1);
        assert!(!granted, "beyond them it has more than its half");
        assert_eq!(refused.refused(), Some(Refused::Host));
        let (small, granted) = grab(&little, 10);
        assert!(granted, "the other has little");
        assert_eq!(much.has_room(), Err(Refused::Host));
        assert!(!grab(&little, 1).1, "nothing is left");
        assert_eq!((much.refusals(), little.refusals()), ((0, 1), (0, 1)));
        drop((held, refused, small));
        assert_eq!(host.used_bytes(), 0);
        drop(little);
        assert_eq!(host.part(1), 80 << 20, "shares go with their tenant");
    }

    #[test]
    fn the_integral_counts_bytes_times_time() {
        let tenant = tenant(&host(1), None, 1);
        let mut meter = MemoryMeter::new(tenant, Bytes::mib(2), Instant::now());
        assert!(meter.memory_growing(0, 1000, None).unwrap());
        let later = meter.since + std::time::Duration::from_secs(2);
        assert_eq!(meter.byte_ms(later), 2_000_000);
    }
}
