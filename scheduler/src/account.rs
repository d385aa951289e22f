//! What a tenant got and what it waited for.

use crate::units::Nanos;

/// Monotone totals since the tenant was added.
///
/// The two waiting totals are exact integrals over the tenant's queued jobs:
/// two jobs waiting for 1 ms count 2 ms. A job that runs or is blocked counts
/// in neither.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Account {
    /// Measured time of the slices that were charged.
    pub charged: Nanos,
    /// The part of `charged` in slices that were picked because a reservation
    /// was due.
    pub charged_reserved: Nanos,
    /// Runnable but waiting for a core (hypervisors call it CPU ready).
    pub waited: Nanos,
    /// Runnable but held back by the tenant's own limit.
    pub throttled: Nanos,
    /// Number of slices charged.
    pub slices: u64,
}

/// Totals over all tenants, removed ones included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Measured time of all slices that were charged.
    pub charged: Nanos,
    /// Number of slices charged.
    pub slices: u64,
}
