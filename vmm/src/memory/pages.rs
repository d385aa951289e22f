//! Giving pages of guest memory back to the host.
#![allow(
    unsafe_code,
    reason = "madvise on a mapping that stays mapped; no crate wraps it for guest memory"
)]

use rustix::mm::{Advice, madvise};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::{GuestMemory, PAGE_BYTES};

/// Why pages were not given back.
#[derive(Debug, thiserror::Error)]
pub enum DiscardError {
    /// Not whole pages, or not all of it memory.
    #[error("{bytes} bytes at {start:#x} are not whole pages of guest memory")]
    Range {
        /// First address.
        start: u64,
        /// Length.
        bytes: u64,
    },
    /// The kernel refused.
    #[error("discarding {bytes} bytes at {start:#x}: {source}")]
    Kernel {
        /// First address.
        start: u64,
        /// Length.
        bytes: u64,
        /// The kernel's reason.
        source: std::io::Error,
    },
}

/// Gives the pages of a range back: the guest finds zeroes there (or, in a restored machine, what
/// the snapshot holds) when it next looks.
///
/// # Errors
/// The range is not whole pages of guest memory, or the kernel refuses.
pub fn discard(memory: &GuestMemory, start: GuestAddress, bytes: u64) -> Result<(), DiscardError> {
    let bad = DiscardError::Range {
        start: start.0,
        bytes,
    };
    let whole = start.0.is_multiple_of(PAGE_BYTES) && bytes.is_multiple_of(PAGE_BYTES);
    let Ok(length) = usize::try_from(bytes) else {
        return Err(bad);
    };
    if !whole || !memory.check_range(start, length) {
        return Err(bad);
    }
    for slice in memory.get_slices(start, length) {
        let Ok(slice) = slice else { return Err(bad) };
        let pointer = slice.ptr_guard_mut();
        // SAFETY: the slice was just checked to lie within one mapping of guest memory, which is
        // mapped as long as `memory` lives, and it is whole pages, as regions start on pages.
        // Guest memory is only ever read and written as volatile bytes, for which any content is
        // valid, so that its change to zeroes is no different from a guest's write.
        let done = unsafe { madvise(pointer.as_ptr().cast(), slice.len(), Advice::LinuxDontNeed) };
        done.map_err(|error| DiscardError::Kernel {
            start: start.0,
            bytes,
            source: error.into(),
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes as _;

    #[test]
    fn discarded_pages_read_zero_and_neighbours_stay() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x4000)]).expect("memory");
        memory
            .write_slice(&[7; 0x4000], GuestAddress(0))
            .expect("in range");
        discard(&memory, GuestAddress(0x1000), 0x2000).expect("whole pages");
        let mut seen = [1; 0x4000];
        memory
            .read_slice(&mut seen, GuestAddress(0))
            .expect("in range");
        assert!(seen[0x1000..0x3000].iter().all(|byte| *byte == 0));
        assert!(
            seen[..0x1000]
                .iter()
                .chain(&seen[0x3000..])
                .all(|byte| *byte == 7)
        );
    }

    #[test]
    fn lies_are_refused() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x4000)]).expect("memory");
        for (start, bytes) in [
            (0x800, 0x1000),
            (0, 0x800),
            (0x3000, 0x2000),
            (0x1_0000, 0x1000),
            (u64::MAX - 0xfff, 0x1000),
            (0, u64::MAX - 0xfff),
        ] {
            discard(&memory, GuestAddress(start), bytes).expect_err("a lie");
        }
    }
}
