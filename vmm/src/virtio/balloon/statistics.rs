//! What a guest says of its memory (virtio 1.2, 5.5.6.4). Any of it may be missing, or a lie.

/// Bytes of one statistic: a tag and a value, packed.
const ENTRY_BYTES: usize = 10;

/// All in bytes but faults and huge pages, which are counts since the guest's start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GuestMemoryStatistics {
    /// Read back from swap.
    pub swap_in_bytes: Option<u64>,
    /// Written to swap.
    pub swap_out_bytes: Option<u64>,
    /// Page faults that needed a disk.
    pub major_faults: Option<u64>,
    /// Page faults that did not.
    pub minor_faults: Option<u64>,
    /// Not used for anything.
    pub free_bytes: Option<u64>,
    /// All that the guest's kernel has.
    pub total_bytes: Option<u64>,
    /// What a new program could get without swapping.
    pub available_bytes: Option<u64>,
    /// Caches that could be dropped.
    pub disk_cache_bytes: Option<u64>,
    /// Huge pages that were to be had.
    pub huge_allocations: Option<u64>,
    /// Huge pages that were not.
    pub huge_failures: Option<u64>,
}

impl GuestMemoryStatistics {
    /// Unknown tags are left out; of two with the same tag the last counts.
    pub(super) fn parse(bytes: &[u8]) -> Self {
        let mut found = Self::default();
        let (entries, _) = bytes.as_chunks::<ENTRY_BYTES>();
        for [a, b, value @ ..] in entries {
            let value = Some(u64::from_le_bytes(*value));
            match u16::from_le_bytes([*a, *b]) {
                0 => found.swap_in_bytes = value,
                1 => found.swap_out_bytes = value,
                2 => found.major_faults = value,
                3 => found.minor_faults = value,
                4 => found.free_bytes = value,
                5 => found.total_bytes = value,
                6 => found.available_bytes = value,
                7 => found.disk_cache_bytes = value,
                8 => found.huge_allocations = value,
                9 => found.huge_failures = value,
                _ => {}
            }
        }
        found
    }
}
