//! The table that tells a kernel of the watchdog: which register to read or write for what
//! ("Hardware Watchdog Timers Design Specification", Microsoft, 2006; the numbers are its tables 1, 2
//! and 3).

use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::sdt::Sdt;

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, bytes_of};
use crate::devices::watchdog::{AGAIN, COUNT, COUNTS_MIN_MAX, LEFT, PERIOD_MS, RUN};
use crate::layout;

const REVISION: u8 = 1;
/// Of all tables.
const HEADER_BYTES: u32 = 36;
/// From the end of that header to the first entry.
const WATCHDOG_HEADER_BYTES: u32 = 32;
const ENABLED: u8 = 1;

#[derive(Clone, Copy)]
enum Instruction {
    /// True where the register has this value.
    Is(u32),
    /// A number of counts.
    Read,
    /// This value.
    Set(u32),
    /// A number of counts.
    Write,
}

/// What is wanted, where, how.
const ENTRIES: [(u8, u64, Instruction); 8] = [
    // Begin again.
    (1, AGAIN, Instruction::Set(1)),
    // How many are left; from how many does it begin.
    (4, LEFT, Instruction::Read),
    (5, COUNT, Instruction::Read),
    (6, COUNT, Instruction::Write),
    // Does it count; count.
    (8, RUN, Instruction::Is(1)),
    (9, RUN, Instruction::Set(1)),
    // Does it not; do not.
    (10, RUN, Instruction::Is(0)),
    (11, RUN, Instruction::Set(0)),
];

/// The table.
pub(super) fn build() -> Vec<u8> {
    let mut table = Sdt::new(
        *b"WDAT",
        HEADER_BYTES,
        REVISION,
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
    );
    table.append(WATCHDOG_HEADER_BYTES);
    // It is no PCI device: segment (two bytes), bus, device, function. Then three that are reserved.
    table.append_slice(&[0xff, 0, 0xff, 0xff, 0xff, 0, 0, 0]);
    let (least, most) = COUNTS_MIN_MAX;
    for number in [PERIOD_MS, most, least] {
        table.append(number);
    }
    table.append_slice(&[ENABLED, 0, 0, 0]);
    table.append(u32::try_from(ENTRIES.len()).unwrap_or_default());
    for (action, register, instruction) in ENTRIES {
        let (code, value, mask) = match instruction {
            Instruction::Is(value) => (0, value, 1),
            Instruction::Read => (1, 0, u32::MAX),
            Instruction::Set(value) => (2, value, 1),
            Instruction::Write => (3, 0, u32::MAX),
        };
        table.append_slice(&[action, code, 0, 0]);
        let address = layout::WATCHDOG.0 + register;
        let (space, access) = (AddressSpace::SystemMemory, AccessSize::DwordAccess);
        table.append_slice(&bytes_of(&GAS::new(space, 32, 0, access, address)));
        table.append(value);
        table.append(mask);
    }
    table.update_checksum();
    table.as_slice().to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the kernel's driver reads it (`drivers/acpi/acpi_watchdog.c`, `drivers/watchdog/wdat_wdt.c`).
    #[test]
    fn a_kernel_finds_every_register_and_no_pci_device() {
        let table = build();
        let word = |at: usize| u32::from_le_bytes(table[at..at + 4].try_into().expect("four"));
        assert_eq!(word(4) as usize, table.len());
        assert_eq!(word(36), 32);
        assert_eq!(table[40..45], [0xff, 0, 0xff, 0xff, 0xff]);
        assert_eq!((word(48), word(52), word(56)), (100, 36_000, 10));
        assert_eq!(table[60], 1);
        let entries: Vec<&[u8]> = table[68..].chunks(24).collect();
        assert_eq!(entries.len(), word(64) as usize);
        for entry in entries {
            // Memory, of four bytes.
            assert_eq!((entry[4], entry[5], entry[7]), (0, 32, 3));
            let address = u64::from_le_bytes(entry[8..16].try_into().expect("eight"));
            assert!(crate::devices::watchdog::Watchdog::offset_of(address).is_some());
        }
    }
}
