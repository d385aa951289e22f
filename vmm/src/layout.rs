//! Guest-physical memory, from the bottom up.
//!
//! ```text
//! 0            real-mode vectors; kept free
//! 0x0500       GDT                      0x6000  PVH start info and its tables
//! 0x7000       zero page                0x9000  page tables, 6 pages
//! 0x2_0000     command line
//! 0x9_fc00     end of low memory ── reserved ──▶ 0x10_0000
//! 0xe_0000     ACPI tables (RSDP first: kernels without a boot pointer scan from here)
//! 0xf_f000     VM generation id
//! 0xf_fff0     reset vector
//! 0x10_0000    kernel; the initrd as high as it may go
//! 0xd000_0000  end of memory below 4 GiB ── devices ──▶ 0x1_0000_0000
//! 0x1_0000_0000  the rest of memory
//! ```
//!
//! Sources: "The Linux/x86 Boot Protocol" (kernel, `Documentation/arch/x86/boot.rst`), sections
//! Memory Layout and 64-bit Boot Protocol; Xen, "x86/HVM direct boot ABI" (`docs/misc/pvh.pandoc`);
//! ACPI 6.5, 5.2.5.1 (finding the RSDP); Intel SDM volume 3, 11.4.1 (local APIC base).

use vm_memory::GuestAddress;

/// Global descriptor table of the first vCPU.
pub const GDT: GuestAddress = GuestAddress(0x500);
/// `hvm_start_info` of the PVH boot ABI.
pub const PVH_START_INFO: GuestAddress = GuestAddress(0x6000);
/// Its module list: the initrd.
pub const PVH_MODULES: GuestAddress = GuestAddress(0x6100);
/// Its memory map.
pub const PVH_MEMORY_MAP: GuestAddress = GuestAddress(0x6200);
/// `boot_params`, the zero page of the Linux boot protocol; one page.
pub const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
/// Top of the boot stack; Linux sets its own at once.
pub const BOOT_STACK: GuestAddress = GuestAddress(0x8ff0);
/// PML4, PDPT, and four page directories that map the first 4 GiB one to one.
pub const PAGE_TABLES: GuestAddress = GuestAddress(0x9000);
/// The kernel's command line.
pub const COMMAND_LINE: GuestAddress = GuestAddress(0x2_0000);
/// `COMMAND_LINE_SIZE` of x86 Linux (`arch/x86/include/asm/setup.h`), the end mark included.
pub const COMMAND_LINE_MAX_BYTES: usize = 2048;
/// End of conventional memory: where a PC has its extended BIOS data area.
pub const LOW_MEMORY_END: GuestAddress = GuestAddress(0x9_fc00);
/// RSDP and all tables that it leads to (ACPI 6.5, 5.2.5.1: on a 16-byte boundary in here).
pub const ACPI: GuestAddress = GuestAddress(0xe_0000);
/// First byte beyond the room for ACPI tables.
pub const ACPI_END: GuestAddress = GuestAddress(0xf_f000);
/// The 16 bytes of the VM generation id, in reserved memory as its specification demands.
pub const GENERATION_ID: GuestAddress = GuestAddress(0xf_f000);
/// f000:fff0, where a PC's processor starts, and where kernels jump to reboot by firmware.
pub const RESET_VECTOR: GuestAddress = GuestAddress(0xf_fff0);
/// Where high memory starts, and 64-bit kernels are loaded.
pub const HIGH_MEMORY: GuestAddress = GuestAddress(0x10_0000);

/// First byte of the hole below 4 GiB; memory beyond this size continues at [`MEMORY_ABOVE_4G`].
pub const DEVICE_HOLE: GuestAddress = GuestAddress(0xd000_0000);
/// Where memory continues above the hole.
pub const MEMORY_ABOVE_4G: GuestAddress = GuestAddress(0x1_0000_0000);

/// Registers of the first virtio-mmio device; each device has one page of its own.
pub const VIRTIO_MMIO: GuestAddress = DEVICE_HOLE;
/// Registers of one virtio-mmio device (virtio 1.2, 4.2.2: 0x100 and the device's configuration).
pub const VIRTIO_MMIO_BYTES: u64 = 0x1000;
/// Registers of the guest's watchdog, beyond all virtio devices.
pub const WATCHDOG: GuestAddress = GuestAddress(DEVICE_HOLE.0 + 0x10_0000);
/// The in-kernel I/O APIC's fixed address (`IOAPIC_DEFAULT_BASE_ADDRESS` in KVM).
pub const IO_APIC: u32 = 0xfec0_0000;
/// The local APIC's address after reset (Intel SDM volume 3, 11.4.1).
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// One page that Intel's real-mode emulation uses for an identity map (KVM API 4.37).
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages after it for a task state segment (KVM API 4.36).
pub const KVM_TSS: usize = 0xfffb_d000;

/// COM1's first port, as on every PC.
pub const COM1_PORT: u16 = 0x3f8;
/// COM1's line, as on every PC.
pub const COM1_GSI: u32 = 4;
/// Data port of the keyboard controller; its command port is four higher.
pub const I8042_PORT: u16 = 0x60;
/// ACPI reset register: a port that no PC device has.
pub const RESET_PORT: u16 = 0x600;
/// Any other value written to [`RESET_PORT`] does nothing.
pub const RESET_VALUE: u8 = 0x01;
/// ACPI sleep control register (ACPI 6.5, 4.8.3.7).
pub const SLEEP_CONTROL_PORT: u16 = 0x601;
/// ACPI sleep status register.
pub const SLEEP_STATUS_PORT: u16 = 0x602;
/// The sleep type that our DSDT's `_S5` names.
pub const SLEEP_TYPE_S5: u8 = 5;

/// Line of the power button: COM2's on a PC, which we do not have.
pub const POWER_BUTTON_GSI: u32 = 3;
/// Line of the generic event device, through which the VM generation id announces its change.
pub const EVENT_GSI: u32 = 5;
/// Line of the first virtio-mmio device.
pub const VIRTIO_FIRST_GSI: u32 = 6;
/// Inputs of the in-kernel I/O APIC (`KVM_IOAPIC_NUM_PINS`).
pub const IO_APIC_LINES: u32 = 24;
/// As many as there are lines for.
pub const VIRTIO_DEVICES_MAX: usize = (IO_APIC_LINES - VIRTIO_FIRST_GSI) as usize;

/// Where device number `slot` has its registers, and its line.
#[must_use]
pub fn virtio_slot(slot: usize) -> Option<(GuestAddress, u32)> {
    if slot >= VIRTIO_DEVICES_MAX {
        return None;
    }
    let slot = u32::try_from(slot).ok()?;
    let base = VIRTIO_MMIO.0 + u64::from(slot) * VIRTIO_MMIO_BYTES;
    Some((GuestAddress(base), VIRTIO_FIRST_GSI + slot))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_overlaps() {
        let places = [
            (GDT.0, 0x40),
            (PVH_START_INFO.0, 0x100),
            (PVH_MODULES.0, 0x100),
            (PVH_MEMORY_MAP.0, 0x100),
            (ZERO_PAGE.0, 0x1000),
            (PAGE_TABLES.0, 6 * 0x1000),
            (COMMAND_LINE.0, COMMAND_LINE_MAX_BYTES as u64),
            (ACPI.0, ACPI_END.0 - ACPI.0),
            (GENERATION_ID.0, 16),
            (RESET_VECTOR.0, 16),
            (HIGH_MEMORY.0, 1),
            (VIRTIO_MMIO.0, VIRTIO_DEVICES_MAX as u64 * VIRTIO_MMIO_BYTES),
            (WATCHDOG.0, 0x1000),
            (u64::from(IO_APIC), 0x1000),
            (u64::from(LOCAL_APIC), 0x1000),
            (KVM_IDENTITY_MAP, 0x1000),
            (KVM_TSS as u64, 0x3000),
            (MEMORY_ABOVE_4G.0, 1),
        ];
        for pair in places.windows(2) {
            let [(first, length), (second, _)] = pair else {
                unreachable!("windows of two")
            };
            assert!(
                first + length <= *second,
                "{first:#x} reaches into {second:#x}"
            );
        }
    }

    #[test]
    fn slots_end_where_the_lines_end() {
        assert_eq!(virtio_slot(0), Some((VIRTIO_MMIO, VIRTIO_FIRST_GSI)));
        let (_, last) = virtio_slot(VIRTIO_DEVICES_MAX - 1).expect("the last slot");
        assert_eq!(last, IO_APIC_LINES - 1);
        assert_eq!(virtio_slot(VIRTIO_DEVICES_MAX), None);
    }
}
