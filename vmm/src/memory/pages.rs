//! Pages of guest memory: large ones where they can be had, and giving them back to the host.
#![allow(
    unsafe_code,
    reason = "mapping and madvise; no crate wraps them for guest memory"
)]

use std::ffi::c_void;
use std::io;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use vm_memory::{GuestAddress, GuestMemoryBackend, MmapRegion};

use super::{GuestMemory, PAGE_BYTES};

/// A large page of x86-64. KVM maps guest memory by large pages only where a guest-physical address
/// and ours are the same in all lower bits, and regions of guests start on one.
const LARGE_PAGE_BYTES: usize = 2 << 20;

/// Reserves a region, at an address that is good for large pages if that can be had; and asks for
/// them. Where the host has none, or no such address, pages are small and nothing else differs.
pub(super) fn reserve(bytes: usize) -> io::Result<MmapRegion> {
    let region = {
        let _keeps_off = below_large_page(bytes);
        MmapRegion::new(bytes).map_err(io::Error::other)?
    };
    // SAFETY: all of the region, which was just mapped and nobody uses yet. It may be refused: by a
    // kernel without large pages.
    let _ = unsafe { madvise(region.as_ptr().cast(), bytes, Advice::LinuxHugepage) };
    Ok(region)
}

/// Takes back that this process may have no large pages: its allocator was told so when the process
/// began, and does not ask for them any more.
pub(crate) fn allow_large_pages() {
    // SAFETY: the call takes numbers and touches no memory of ours. Where it is refused pages are small.
    let _ = unsafe { libc::prctl(libc::PR_SET_THP_DISABLE, 0, 0, 0, 0) };
}

/// A mapping that is in the way of others.
struct InTheWay {
    at: *mut c_void,
    bytes: usize,
}

impl Drop for InTheWay {
    fn drop(&mut self) {
        // SAFETY: `below_large_page` mapped it, nobody else knows its address, and it holds nothing.
        let _ = unsafe { munmap(self.at, self.bytes) };
    }
}

/// The kernel puts a new mapping as high as it fits. This looks where that is for so many bytes, and
/// takes what is too much at the top, so that the next mapping of that length starts on a large
/// page. Best effort: another thread may map something in between.
fn below_large_page(bytes: usize) -> Option<InTheWay> {
    let map = |hint: *mut c_void, bytes: usize| {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new anonymous mapping, which replaces none: the address is a hint.
        let at = unsafe { mmap_anonymous(hint, bytes, ProtFlags::empty(), flags) };
        at.ok().map(|at| InTheWay { at, bytes })
    };
    let there = map(std::ptr::null_mut(), bytes)?;
    let too_much = there.at.addr() % LARGE_PAGE_BYTES;
    let top = there.at.wrapping_byte_add(bytes.checked_sub(too_much)?);
    drop(there);
    (too_much != 0).then(|| map(top, too_much)).flatten()
}

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
    fn regions_start_on_large_pages() {
        // Whatever is mapped beside them, most of the time: nobody promises it.
        let mut kept = Vec::new();
        for pages in 0..32 {
            let bytes = (pages + 3) * 0x10_0000 + pages * 0x3000;
            kept.push(reserve(bytes).expect("memory"));
        }
        let aligned = |region: &&MmapRegion| region.as_ptr().addr() % LARGE_PAGE_BYTES == 0;
        let count = kept.iter().filter(aligned).count();
        assert!(count > 24, "{count} of 32");
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
