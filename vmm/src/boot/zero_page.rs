//! `boot_params`, what a bzImage kernel is told (kernel, `Documentation/arch/x86/zero-page.rst`,
//! and boot.rst for the fields of the header).

use vm_memory::Bytes as _;

use super::images::{HEADER_AT, SetupHeader};
use super::memory_map::memory_map;
use super::{BootError, CommandLine, Ramdisk};
use crate::layout::{ACPI, COMMAND_LINE, ZERO_PAGE};
use crate::memory::{GuestMemory, MemorySize, PAGE_BYTES};

/// Offsets in the page.
mod at {
    pub(super) const ACPI_RSDP_ADDR: usize = 0x070;
    pub(super) const E820_ENTRIES: usize = 0x1e8;
    pub(super) const TYPE_OF_LOADER: usize = 0x210;
    pub(super) const RAMDISK_IMAGE: usize = 0x218;
    pub(super) const RAMDISK_SIZE: usize = 0x21c;
    pub(super) const CMD_LINE_PTR: usize = 0x228;
    pub(super) const CMDLINE_SIZE: usize = 0x238;
    pub(super) const E820_TABLE: usize = 0x2d0;
}

/// An unregistered loader (boot.rst, type_of_loader).
const LOADER_UNKNOWN: u8 = 0xff;
const E820_ENTRY_BYTES: usize = 20;

pub(super) fn write(
    memory: &GuestMemory,
    size: MemorySize,
    header: &SetupHeader,
    command_line: &CommandLine,
    ramdisk: Option<Ramdisk>,
) -> Result<(), BootError> {
    let bad = BootError::Place {
        what: "the zero page",
        address: ZERO_PAGE.0,
    };
    let page = build(size, header, command_line, ramdisk).ok_or(bad)?;
    memory
        .write_slice(&page.bytes, ZERO_PAGE)
        .map_err(|_| BootError::Place {
            what: "the zero page",
            address: ZERO_PAGE.0,
        })
}

/// `None` if a number does not fit its field, which the layout excludes.
fn build(
    size: MemorySize,
    header: &SetupHeader,
    command_line: &CommandLine,
    ramdisk: Option<Ramdisk>,
) -> Option<Page> {
    let mut page = Page::default();
    page.put(HEADER_AT, header.bytes())?;
    page.put(at::TYPE_OF_LOADER, &[LOADER_UNKNOWN])?;
    page.put(at::ACPI_RSDP_ADDR, &ACPI.0.to_le_bytes())?;
    page.put_u32(at::CMD_LINE_PTR, COMMAND_LINE.0)?;
    page.put_u32(at::CMDLINE_SIZE, u64::try_from(command_line.len()).ok()?)?;
    if let Some(ramdisk) = ramdisk {
        page.put_u32(at::RAMDISK_IMAGE, ramdisk.address.0)?;
        page.put_u32(at::RAMDISK_SIZE, ramdisk.bytes)?;
    }
    let map = memory_map(size);
    page.put(at::E820_ENTRIES, &[u8::try_from(map.len()).ok()?])?;
    for (index, range) in map.iter().enumerate() {
        let entry = at::E820_TABLE + index * E820_ENTRY_BYTES;
        page.put(entry, &range.start.0.to_le_bytes())?;
        page.put(entry + 8, &range.bytes.to_le_bytes())?;
        page.put(entry + 16, &range.kind.number().to_le_bytes())?;
    }
    Some(page)
}

struct Page {
    bytes: Vec<u8>,
}

impl Default for Page {
    fn default() -> Self {
        let bytes = usize::try_from(PAGE_BYTES).unwrap_or_default();
        Self {
            bytes: vec![0; bytes],
        }
    }
}

impl Page {
    fn put(&mut self, at: usize, bytes: &[u8]) -> Option<()> {
        let field = self.bytes.get_mut(at..at.checked_add(bytes.len())?)?;
        field.copy_from_slice(bytes);
        Some(())
    }

    fn put_u32(&mut self, at: usize, value: u64) -> Option<()> {
        self.put(at, &u32::try_from(value).ok()?.to_le_bytes())
    }
}
