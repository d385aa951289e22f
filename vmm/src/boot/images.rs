//! Loading kernel and initrd.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use vm_memory::{Bytes as _, GuestAddress};

use super::{BootError, Ramdisk};
use crate::layout::{COMMAND_LINE_MAX_BYTES, HIGH_MEMORY};
use crate::memory::{GuestMemory, MemorySize, PAGE_BYTES};

/// Where the setup header starts in a bzImage and in the zero page (boot.rst, The Real-Mode
/// Kernel Header).
pub(super) const HEADER_AT: usize = 0x1f1;
/// The byte in a bzImage that says how far the header goes beyond 0x202.
const HEADER_LENGTH_AT: usize = 0x201;
/// The header's room in the zero page: up to `_pad7`.
const HEADER_MAX_BYTES: usize = 0x290 - HEADER_AT;
/// XLF_KERNEL_64: there is a 64-bit entry point, 0x200 beyond the load address.
const HAS_64_BIT_ENTRY: u16 = 1;
/// Protocol 2.12, the first with `xloadflags`.
const LEAST_PROTOCOL: u16 = 0x020c;

/// The setup header of a bzImage, as it is in the file.
#[derive(Debug, Clone)]
pub(super) struct SetupHeader {
    bytes: Vec<u8>,
}

impl SetupHeader {
    fn read(kernel: &File) -> Result<Self, BootError> {
        let reading = |source| BootError::Read {
            what: "kernel",
            source,
        };
        let mut length = [0];
        let at = u64::try_from(HEADER_LENGTH_AT).unwrap_or(u64::MAX);
        kernel.read_exact_at(&mut length, at).map_err(reading)?;
        let length = 0x202 + usize::from(length[0]) - HEADER_AT;
        let mut bytes = vec![0; length.min(HEADER_MAX_BYTES)];
        let at = u64::try_from(HEADER_AT).unwrap_or(u64::MAX);
        kernel.read_exact_at(&mut bytes, at).map_err(reading)?;
        Ok(Self { bytes })
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// A field by its offset in the zero page; zero where the header ends before.
    fn field<const N: usize>(&self, offset: usize) -> [u8; N] {
        let at = offset - HEADER_AT;
        let field = self.bytes.get(at..at + N);
        field
            .and_then(|field| field.try_into().ok())
            .unwrap_or([0; N])
    }

    fn protocol(&self) -> u16 {
        u16::from_le_bytes(self.field(0x206))
    }

    fn load_flags(&self) -> u16 {
        u16::from_le_bytes(self.field(0x236))
    }

    fn initrd_max(&self) -> u64 {
        u32::from_le_bytes(self.field(0x22c)).into()
    }

    fn command_line_bytes(&self) -> u32 {
        u32::from_le_bytes(self.field(0x238))
    }

    /// Where the kernel moves itself to, and how much room it needs there.
    fn runtime_end(&self, load: u64) -> u64 {
        let preferred = u64::from_le_bytes(self.field(0x258));
        let needs = u64::from(u32::from_le_bytes(self.field(0x260)));
        preferred.max(load).saturating_add(needs)
    }
}

/// A kernel in memory.
#[derive(Debug)]
pub(super) struct Image {
    entry: GuestAddress,
    /// First address that the kernel does not need while it starts.
    end: u64,
    header: Option<SetupHeader>,
}

impl Image {
    pub(super) fn entry(&self) -> GuestAddress {
        self.entry
    }

    /// Of a bzImage; an ELF image has none.
    pub(super) fn header(&self) -> Option<&SetupHeader> {
        self.header.as_ref()
    }

    /// The longest command line that this kernel takes, with its end mark.
    pub(super) fn command_line_max(&self) -> usize {
        let header = self.header.as_ref();
        let most = header.map(|header| usize::try_from(header.command_line_bytes()));
        match most {
            Some(Ok(most)) => most.saturating_add(1),
            _ => COMMAND_LINE_MAX_BYTES,
        }
    }
}

pub(super) fn load_kernel(
    memory: &GuestMemory,
    size: MemorySize,
    kernel: &mut File,
) -> Result<Image, BootError> {
    let mut magic = [0; 4];
    kernel
        .read_exact_at(&mut magic, 0)
        .map_err(|source| BootError::Read {
            what: "kernel",
            source,
        })?;
    let image = if magic == *b"\x7fELF" {
        load_elf(memory, kernel)?
    } else {
        load_bzimage(memory, kernel)?
    };
    if image.end > size.low_end().0 {
        return Err(no_room(image.end, size));
    }
    Ok(image)
}

fn load_elf(memory: &GuestMemory, kernel: &mut File) -> Result<Image, BootError> {
    let loaded = Elf::load(memory, None, kernel, Some(HIGH_MEMORY)).map_err(bad_kernel)?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(BootError::Kernel {
            reason: "the ELF image has no PVH note".to_owned(),
        });
    };
    Ok(Image {
        entry,
        end: loaded.kernel_end,
        header: None,
    })
}

fn load_bzimage(memory: &GuestMemory, kernel: &mut File) -> Result<Image, BootError> {
    let loaded = BzImage::load(memory, Some(HIGH_MEMORY), kernel, Some(HIGH_MEMORY));
    let loaded = loaded.map_err(bad_kernel)?;
    let header = SetupHeader::read(kernel)?;
    if header.protocol() < LEAST_PROTOCOL || header.load_flags() & HAS_64_BIT_ENTRY == 0 {
        return Err(BootError::Kernel {
            reason: "the bzImage has no 64-bit entry point".to_owned(),
        });
    }
    let load = loaded.kernel_load.0;
    Ok(Image {
        entry: GuestAddress(load + 0x200),
        end: loaded.kernel_end.max(header.runtime_end(load)),
        header: Some(header),
    })
}

fn bad_kernel(error: linux_loader::loader::Error) -> BootError {
    BootError::Kernel {
        reason: error.to_string(),
    }
}

fn no_room(needed_end: u64, size: MemorySize) -> BootError {
    BootError::Memory {
        needed: needed_end.saturating_sub(HIGH_MEMORY.0),
        there: size.high_memory_bytes(),
        below: size.low_end().0,
    }
}

/// Puts the initrd as high as kernel and memory allow. `None` if the file is empty.
pub(super) fn load_initrd(
    memory: &GuestMemory,
    size: MemorySize,
    initrd: &mut File,
    image: &Image,
) -> Result<Option<Ramdisk>, BootError> {
    let reading = |source| BootError::Read {
        what: "initrd",
        source,
    };
    let bytes = initrd.seek(SeekFrom::End(0)).map_err(reading)?;
    if bytes == 0 {
        return Ok(None);
    }
    // boot.rst: initrd_addr_max is the last address that the initrd may occupy.
    let header = image.header();
    let limit = header.map_or(u64::MAX, |header| header.initrd_max().saturating_add(1));
    let top = size.low_end().0.min(limit);
    let address = top
        .checked_sub(bytes)
        .map(|at| at / PAGE_BYTES * PAGE_BYTES);
    let address = address.filter(|address| *address >= image.end);
    let Some(address) = address.map(GuestAddress) else {
        return Err(no_room(image.end.saturating_add(bytes), size));
    };
    initrd.rewind().map_err(reading)?;
    let length = usize::try_from(bytes).unwrap_or(usize::MAX);
    memory
        .read_exact_volatile_from(address, initrd, length)
        .map_err(|error| reading(std::io::Error::other(error)))?;
    Ok(Some(Ramdisk { address, bytes }))
}
