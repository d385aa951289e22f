//! What a guest is told of its memory, in the words that both boot protocols share.

use vm_memory::GuestAddress;

use crate::layout::{HIGH_MEMORY, LOW_MEMORY_END, MEMORY_ABOVE_4G};
use crate::memory::MemorySize;

/// What a range is. The numbers are those of ACPI 6.5, 15.3 (address range types), which E820
/// and PVH share for these two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RangeKind {
    Usable,
    Reserved,
}

impl RangeKind {
    pub(super) fn number(self) -> u32 {
        match self {
            Self::Usable => 1,
            Self::Reserved => 2,
        }
    }
}

/// One range of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MapRange {
    pub(super) start: GuestAddress,
    pub(super) bytes: u64,
    pub(super) kind: RangeKind,
}

/// All of memory, in order. The firmware tables' place is reserved.
pub(super) fn memory_map(size: MemorySize) -> Vec<MapRange> {
    let range = |start: GuestAddress, bytes, kind| MapRange { start, bytes, kind };
    let reserved = HIGH_MEMORY.0 - LOW_MEMORY_END.0;
    let mut map = vec![
        range(GuestAddress(0), LOW_MEMORY_END.0, RangeKind::Usable),
        range(LOW_MEMORY_END, reserved, RangeKind::Reserved),
        range(HIGH_MEMORY, size.high_memory_bytes(), RangeKind::Usable),
    ];
    let above = size.get() - size.low_end().0;
    if above > 0 {
        map.push(range(MEMORY_ABOVE_4G, above, RangeKind::Usable));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use insula_types::Bytes;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn all_memory_is_in_the_map_once(pages in 512_u64..1 << 25) {
            let size = MemorySize::new(Bytes::new(pages * 4096).expect("bytes")).expect("a size");
            let map = memory_map(size);
            let sum: u64 = map.iter().map(|range| range.bytes).sum();
            prop_assert_eq!(sum, size.get());
            for pair in map.windows(2) {
                prop_assert!(pair[0].start.0 + pair[0].bytes <= pair[1].start.0);
            }
        }
    }
}
