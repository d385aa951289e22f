//! What is in memory before the first instruction: kernel, initrd, command line, and the tables
//! that tell the kernel of its machine.
//!
//! Two ways in, by what the kernel image is: a **bzImage** is entered at its 64-bit entry point
//! with a zero page ("The Linux/x86 Boot Protocol", 64-bit Boot Protocol); an **ELF** image at its
//! PVH note's entry point with a start info ("x86/HVM direct boot ABI"). A third, **flat** code at
//! an address, is for the micro-guests of tests and measurements.
//!
//! Images are a tenant's, and so as hostile as its guest: the loader writes only into guest memory,
//! and an image that does not fit is refused with the numbers.

mod command_line;
mod flat;
mod images;
mod memory_map;
mod pvh;
mod registers;
mod reset_vector;
mod zero_page;

pub use command_line::{CommandLine, CommandLineError};
pub use flat::{FlatCode, ProcessorMode};
pub(crate) use registers::{first_registers, write_tables};
pub(crate) use reset_vector::write_reset_vector;

use std::fs::File;
use std::io;

use vm_memory::GuestAddress;

use crate::layout;
use crate::memory::{GuestMemory, MemorySize};

/// What a machine boots. All files are open already.
#[derive(Debug)]
pub enum BootSource {
    /// A Linux kernel, or another that speaks one of its boot protocols.
    Kernel {
        /// bzImage, or ELF with a PVH note.
        kernel: File,
        /// The initial ramdisk.
        initrd: Option<File>,
        /// What the kernel is told.
        command_line: CommandLine,
    },
    /// Bare code, for tests and measurements.
    Flat(FlatCode),
}

/// Why an image does not boot.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// Neither kind of image, or a broken one.
    #[error("the kernel is neither a 64-bit bzImage nor an ELF image with a PVH entry: {reason}")]
    Kernel {
        /// In the words of the loader.
        reason: String,
    },
    /// The memory is too small for kernel and initrd.
    #[error("kernel and initrd need {needed} bytes below {below:#x}, and there are {there}")]
    Memory {
        /// Bytes that are needed.
        needed: u64,
        /// Bytes that there are.
        there: u64,
        /// Where they have to be.
        below: u64,
    },
    /// The command line is longer than the kernel takes.
    #[error("the command line has {bytes} bytes, and this kernel takes {most}")]
    CommandLine {
        /// Its length.
        bytes: usize,
        /// The kernel's limit.
        most: usize,
    },
    /// A file could not be read.
    #[error("reading the {what}: {source}")]
    Read {
        /// Which file.
        what: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// An address that the layout or the image names is not memory.
    #[error("{what} at {address:#x} is not memory")]
    Place {
        /// What was to be written.
        what: &'static str,
        /// Where.
        address: u64,
    },
}

/// How the first vCPU starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// 64-bit Linux boot protocol: long mode, RSI at the zero page.
    Linux64 {
        /// First instruction.
        address: GuestAddress,
    },
    /// PVH: 32-bit protected mode without paging, EBX at the start info.
    Pvh {
        /// First instruction.
        address: GuestAddress,
    },
    /// A micro-guest.
    Flat {
        /// First instruction.
        address: GuestAddress,
        /// The mode it is written for.
        mode: ProcessorMode,
    },
}

/// An initial ramdisk in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ramdisk {
    address: GuestAddress,
    bytes: u64,
}

/// Fills memory. The ACPI tables are the machine's to write; they are where [`layout`] says.
///
/// # Errors
/// The image cannot be booted in this memory.
pub(crate) fn load(
    memory: &GuestMemory,
    size: MemorySize,
    source: &mut BootSource,
) -> Result<Entry, BootError> {
    match source {
        BootSource::Flat(code) => flat::load(memory, code),
        BootSource::Kernel {
            kernel,
            initrd,
            command_line,
        } => load_kernel(memory, size, kernel, initrd.as_mut(), command_line),
    }
}

fn load_kernel(
    memory: &GuestMemory,
    size: MemorySize,
    kernel: &mut File,
    initrd: Option<&mut File>,
    command_line: &CommandLine,
) -> Result<Entry, BootError> {
    let image = images::load_kernel(memory, size, kernel)?;
    let ramdisk = match initrd {
        Some(initrd) => images::load_initrd(memory, size, initrd, &image)?,
        None => None,
    };
    let most = image.command_line_max().min(layout::COMMAND_LINE_MAX_BYTES);
    command_line.write(memory, most)?;
    match image.header() {
        Some(header) => {
            zero_page::write(memory, size, header, command_line, ramdisk)?;
            Ok(Entry::Linux64 {
                address: image.entry(),
            })
        }
        None => {
            pvh::write(memory, size, ramdisk)?;
            Ok(Entry::Pvh {
                address: image.entry(),
            })
        }
    }
}
