//! What a kernel finds where a PC has its firmware's entry.
//!
//! A Linux that finds ACPI hardware-reduced reboots through EFI (`efi_reboot_required` in
//! `arch/x86/platform/efi/quirks.c`, which does not ask whether there is EFI), and failing that
//! jumps to f000:fff0 in real mode, without a try of the ACPI reset register. So there is code
//! there, which does what the register's description says.

use vm_memory::Bytes as _;

use super::BootError;
use crate::layout::{RESET_PORT, RESET_VALUE, RESET_VECTOR};
use crate::memory::GuestMemory;

/// `mov dx, RESET_PORT; mov al, RESET_VALUE; out dx, al; 1: hlt; jmp 1b`
fn code() -> [u8; 9] {
    let [low, high] = RESET_PORT.to_le_bytes();
    [0xba, low, high, 0xb0, RESET_VALUE, 0xee, 0xf4, 0xeb, 0xfd]
}

pub(crate) fn write_reset_vector(memory: &GuestMemory) -> Result<(), BootError> {
    let written = memory.write_slice(&code(), RESET_VECTOR);
    written.map_err(|_| BootError::Place {
        what: "the reset vector",
        address: RESET_VECTOR.0,
    })
}
