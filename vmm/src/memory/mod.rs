//! Guest memory: one or two regions of private memory, reserved at once and filled by the kernel
//! page by page as the guest touches them.
//!
//! Every access goes through [`GuestMemory`], which checks the address each time; a range that a
//! guest named is never turned into a pointer that outlives the call. What needs pointers (vectors
//! for `preadv` and its like, giving pages back) is in [`vectors`] and [`pages`], the only places
//! in this module with `unsafe`.

pub mod pages;
pub mod vectors;

use std::fmt;

use insula_types::Bytes;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, GuestUsize};

use crate::layout::{DEVICE_HOLE, HIGH_MEMORY, MEMORY_ABOVE_4G};

/// All of a machine's memory. Cheap to clone: the regions are shared.
pub type GuestMemory = GuestMemoryMmap<()>;

/// Size of a page, and what a machine's memory is a multiple of.
pub const PAGE_BYTES: u64 = 4096;
/// Enough for a small kernel; less is a mistake.
const LEAST_BYTES: u64 = 2 << 20;
/// What 46 bits of physical address leave room for beside the hole, by far.
const MOST_BYTES: u64 = 1 << 40;

/// How much memory a machine has: whole pages, within bounds.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct MemorySize(u64);

/// Why a machine cannot have this memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Not whole pages, too little or too much.
    #[error(
        "{bytes} bytes of memory: a machine takes whole pages of {PAGE_BYTES}, from {LEAST_BYTES} to {MOST_BYTES} bytes"
    )]
    Size {
        /// What was asked for.
        bytes: u64,
    },
    /// The kernel did not map it.
    #[error("{bytes} bytes of memory could not be mapped: {reason}")]
    Map {
        /// What was asked for.
        bytes: u64,
        /// The kernel's reason.
        reason: String,
    },
}

impl MemorySize {
    /// # Errors
    /// Not whole pages, or out of bounds.
    pub fn new(bytes: Bytes) -> Result<Self, MemoryError> {
        let bytes = bytes.get();
        let whole = bytes.is_multiple_of(PAGE_BYTES);
        if !whole || !(LEAST_BYTES..=MOST_BYTES).contains(&bytes) {
            return Err(MemoryError::Size { bytes });
        }
        Ok(Self(bytes))
    }

    /// In bytes.
    #[must_use]
    pub fn get(self) -> u64 {
        self.0
    }

    /// The regions: below the hole, and above 4 GiB if there is more.
    #[must_use]
    pub fn regions(self) -> Vec<(GuestAddress, GuestUsize)> {
        let low = self.0.min(DEVICE_HOLE.0);
        let mut regions = vec![(GuestAddress(0), low)];
        if self.0 > low {
            regions.push((MEMORY_ABOVE_4G, self.0 - low));
        }
        regions
    }

    /// First address beyond the memory that lies below 4 GiB.
    #[must_use]
    pub fn low_end(self) -> GuestAddress {
        GuestAddress(self.0.min(DEVICE_HOLE.0))
    }

    /// Bytes from 1 MiB to [`MemorySize::low_end`].
    #[must_use]
    pub fn high_memory_bytes(self) -> u64 {
        self.low_end().0.saturating_sub(HIGH_MEMORY.0)
    }
}

impl fmt::Debug for MemorySize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0)
    }
}

/// Reserves the memory of a new machine. All of it reads as zero.
///
/// # Errors
/// The kernel refuses.
pub fn create(size: MemorySize) -> Result<GuestMemory, MemoryError> {
    let refused = |reason: String| MemoryError::Map {
        bytes: size.get(),
        reason,
    };
    let mut regions = Vec::new();
    for (start, bytes) in size.regions() {
        let bytes = usize::try_from(bytes).map_err(|error| refused(error.to_string()))?;
        let region = pages::reserve(bytes).map_err(|error| refused(error.to_string()))?;
        let region = GuestRegionMmap::new(region, start);
        regions.push(region.ok_or_else(|| refused("it wraps around".to_owned()))?);
    }
    GuestMemory::from_regions(regions).map_err(|error| refused(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn size(bytes: u64) -> Result<MemorySize, MemoryError> {
        MemorySize::new(Bytes::new(bytes).expect("a byte count"))
    }

    #[test]
    fn the_hole_is_left_out() {
        let below = size(DEVICE_HOLE.0).expect("a size");
        assert_eq!(below.regions(), [(GuestAddress(0), DEVICE_HOLE.0)]);
        let above = size(DEVICE_HOLE.0 + PAGE_BYTES).expect("a size");
        let expected = [
            (GuestAddress(0), DEVICE_HOLE.0),
            (MEMORY_ABOVE_4G, PAGE_BYTES),
        ];
        assert_eq!(above.regions(), expected);
    }

    #[test]
    fn odd_sizes_are_refused() {
        for bytes in [
            0,
            LEAST_BYTES - PAGE_BYTES,
            LEAST_BYTES + 1,
            MOST_BYTES + PAGE_BYTES,
        ] {
            assert!(size(bytes).is_err(), "{bytes}");
        }
    }

    proptest! {
        #[test]
        fn regions_sum_to_the_size(pages in LEAST_BYTES / PAGE_BYTES..=MOST_BYTES / PAGE_BYTES) {
            let size = size(pages * PAGE_BYTES).expect("a size");
            let sum: u64 = size.regions().iter().map(|(_, bytes)| bytes).sum();
            prop_assert_eq!(sum, size.get());
            for (start, bytes) in size.regions() {
                let clear = start.0 + bytes <= DEVICE_HOLE.0 || start.0 >= MEMORY_ABOVE_4G.0;
                prop_assert!(clear);
            }
        }
    }
}
