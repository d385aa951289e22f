//! The firmware tables (ACPI 6.5): how an unmodified kernel finds processors, interrupts, serial
//! port and virtio devices, and how it turns itself off.
//!
//! ```text
//! RSDP ─▶ XSDT ─┬▶ FADT ─▶ DSDT: \_S5, COM1, one LNRO0005 per virtio device, event device
//!               ├▶ MADT: local APICs, I/O APIC
//!               └▶ WDAT: the watchdog's registers
//! ```
//! The machine is *hardware-reduced* (ACPI 6.5, 4.1): no PM timer, no GPEs, no SCI; sleep and reset
//! go through registers that the FADT names.

mod dsdt;
mod wdat;

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes as _, GuestAddress};

use crate::config::VcpuCount;
use crate::layout;
use crate::memory::GuestMemory;

const OEM_ID: [u8; 6] = *b"INSULA";
const OEM_TABLE_ID: [u8; 8] = *b"INSULAVM";
const OEM_REVISION: u32 = 1;

/// IAPC_BOOT_ARCH (ACPI 6.5, table 5.11): no VGA, no CMOS clock; and bit 1, which would say that
/// there is a keyboard controller, is clear, so that the kernel does not probe for a keyboard.
const BOOT_ARCH: u16 = 1 << 2 | 1 << 5;

/// Why there are no tables.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// More devices than there is room for.
    #[error("{bytes} bytes of ACPI tables, and room for {room}")]
    Room {
        /// What the tables take.
        bytes: u64,
        /// What there is.
        room: u64,
    },
    /// The place is not memory.
    #[error("the ACPI tables' place is not memory")]
    Place,
}

/// Puts all tables into memory.
pub(crate) fn write(
    memory: &GuestMemory,
    vcpus: VcpuCount,
    virtio_devices: usize,
) -> Result<(), AcpiError> {
    let tables = build(vcpus, virtio_devices);
    let bytes = u64::try_from(tables.len()).unwrap_or(u64::MAX);
    let room = layout::ACPI_END.0 - layout::ACPI.0;
    if bytes > room {
        return Err(AcpiError::Room { bytes, room });
    }
    memory
        .write_slice(&tables, layout::ACPI)
        .map_err(|_| AcpiError::Place)
}

/// All tables, as they are from [`layout::ACPI`] on.
fn build(vcpus: VcpuCount, virtio_devices: usize) -> Vec<u8> {
    let mut image = Image {
        // The RSDP has to be first, and to name what comes after it.
        bytes: vec![0; Rsdp::len()],
    };
    let dsdt = image.append(&dsdt::build(virtio_devices));
    let fadt = image.append(&bytes_of(&fadt(dsdt)));
    let madt = image.append(&bytes_of(&madt(vcpus)));
    let wdat = image.append(&wdat::build());
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt.0);
    xsdt.add_entry(madt.0);
    xsdt.add_entry(wdat.0);
    let xsdt = image.append(&bytes_of(&xsdt));
    let rsdp = bytes_of(&Rsdp::new(OEM_ID, xsdt.0));
    for (to, from) in image.bytes.iter_mut().zip(rsdp) {
        *to = from;
    }
    image.bytes
}

struct Image {
    bytes: Vec<u8>,
}

impl Image {
    /// Returns where the table is going to be in guest memory.
    fn append(&mut self, table: &[u8]) -> GuestAddress {
        let at = self.bytes.len().next_multiple_of(16);
        self.bytes.resize(at, 0);
        self.bytes.extend(table);
        GuestAddress(layout::ACPI.0 + u64::try_from(at).unwrap_or_default())
    }
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(dsdt: GuestAddress) -> acpi_tables::fadt::FADT {
    let port = |port: u16| {
        let byte = AccessSize::ByteAccess;
        GAS::new(AddressSpace::SystemIo, 8, 0, byte, u64::from(port))
    };
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt.0)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = port(layout::RESET_PORT);
    fadt.reset_value = layout::RESET_VALUE;
    fadt.sleep_control_reg = port(layout::SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(layout::SLEEP_STATUS_PORT);
    fadt.finalize()
}

fn madt(vcpus: VcpuCount) -> MADT {
    let local_apic = LocalInterruptController::Address(layout::LOCAL_APIC);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, local_apic);
    for vcpu in 0..vcpus.get() {
        madt.add_structure(ProcessorLocalApic::new(vcpu, vcpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IO_APIC, 0));
    madt
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn le64(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
    }

    /// The table at an address, with its checksum looked at.
    fn table<'i>(image: &'i [u8], address: u64, signature: &[u8]) -> &'i [u8] {
        let at = usize::try_from(address - layout::ACPI.0).expect("within the image");
        let length = u32::from_le_bytes(image[at + 4..at + 8].try_into().expect("four bytes"));
        let table = &image[at..at + length as usize];
        assert_eq!(&table[..4], signature);
        assert_eq!(sum(table), 0, "checksum of {}", signature.escape_ascii());
        table
    }

    /// Follows the pointers as a kernel does.
    #[test]
    fn every_table_is_found_and_sums_to_zero() {
        for vcpus in [1, 2, VcpuCount::MAX.get()] {
            for devices in [0, 1, layout::VIRTIO_DEVICES_MAX] {
                let count = VcpuCount::new(vcpus).expect("a count");
                let image = build(count, devices);
                assert_eq!(&image[..8], b"RSD PTR ");
                assert_eq!((sum(&image[..20]), sum(&image[..36])), (0, 0));
                let xsdt = table(&image, le64(&image, 24), b"XSDT");
                let fadt = table(&image, le64(xsdt, 36), b"FACP");
                let madt = table(&image, le64(xsdt, 44), b"APIC");
                table(&image, le64(xsdt, 52), b"WDAT");
                let dsdt = table(&image, le64(fadt, 140), b"DSDT");
                // ACPI 6.5, table 5.9: flags, reset register and value.
                let flags = u32::from_le_bytes(fadt[112..116].try_into().expect("four"));
                assert_eq!(flags & (1 << 20 | 1 << 10), 1 << 20 | 1 << 10);
                assert_eq!(le64(fadt, 120), u64::from(layout::RESET_PORT));
                assert_eq!(fadt[128], layout::RESET_VALUE);
                assert_eq!(le64(fadt, 248), u64::from(layout::SLEEP_CONTROL_PORT));
                assert_eq!(le64(fadt, 260), u64::from(layout::SLEEP_STATUS_PORT));
                assert_eq!(madt.len(), 44 + 8 * usize::from(vcpus) + 12);
                let found = dsdt.windows(8).filter(|window| window == b"LNRO0005");
                assert_eq!(found.count(), devices);
            }
        }
    }

    #[test]
    fn the_largest_machine_has_room() {
        let size = crate::memory::MemorySize::new(insula_types::Bytes::mib(2)).expect("a size");
        let memory = crate::memory::create(size).expect("memory");
        write(&memory, VcpuCount::MAX, layout::VIRTIO_DEVICES_MAX).expect("room");
    }
}
