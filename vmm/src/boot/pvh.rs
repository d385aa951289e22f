//! `hvm_start_info`, what a PVH kernel is told (Xen, `xen/include/public/arch-x86/hvm/start_info.h`,
//! version 1).

use vm_memory::{Bytes as _, GuestAddress};

use super::memory_map::memory_map;
use super::{BootError, Ramdisk};
use crate::layout::{ACPI, COMMAND_LINE, PVH_MEMORY_MAP, PVH_MODULES, PVH_START_INFO};
use crate::memory::{GuestMemory, MemorySize};

/// "xEn3" with the top bit of the first byte set.
const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;

pub(super) fn write(
    memory: &GuestMemory,
    size: MemorySize,
    ramdisk: Option<Ramdisk>,
) -> Result<(), BootError> {
    let mut map = Vec::new();
    let ranges = memory_map(size);
    for range in &ranges {
        map.extend(range.start.0.to_le_bytes());
        map.extend(range.bytes.to_le_bytes());
        map.extend(range.kind.number().to_le_bytes());
        map.extend(0_u32.to_le_bytes());
    }
    let mut modules = Vec::new();
    if let Some(ramdisk) = ramdisk {
        for field in [ramdisk.address.0, ramdisk.bytes, 0, 0] {
            modules.extend(field.to_le_bytes());
        }
    }
    let mut info = Vec::new();
    for field in [MAGIC, VERSION, 0, u32::from(ramdisk.is_some())] {
        info.extend(field.to_le_bytes());
    }
    for field in [PVH_MODULES, COMMAND_LINE, ACPI, PVH_MEMORY_MAP] {
        info.extend(field.0.to_le_bytes());
    }
    let entries = u32::try_from(ranges.len()).unwrap_or_default();
    info.extend(entries.to_le_bytes());
    info.extend(0_u32.to_le_bytes());
    put(memory, "the memory map", &map, PVH_MEMORY_MAP)?;
    put(memory, "the module list", &modules, PVH_MODULES)?;
    put(memory, "the start info", &info, PVH_START_INFO)
}

fn put(
    memory: &GuestMemory,
    what: &'static str,
    bytes: &[u8],
    at: GuestAddress,
) -> Result<(), BootError> {
    let address = at.0;
    let written = memory.write_slice(bytes, at);
    written.map_err(|_| BootError::Place { what, address })
}
