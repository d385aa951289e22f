//! The first vCPU's registers, and the tables that they point to.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use vm_memory::{Bytes as _, GuestAddress};

use super::{BootError, Entry, ProcessorMode};
use crate::layout::{BOOT_STACK, GDT, PAGE_TABLES, PVH_START_INFO, ZERO_PAGE};
use crate::memory::GuestMemory;

/// Descriptors (Intel SDM volume 3, 3.4.5): null, null, 64-bit code at 0x10 (`__BOOT_CS`), data at
/// 0x18 (`__BOOT_DS`), task state at 0x20; flat, ring 0.
const DESCRIPTORS: [u64; 5] = [
    0,
    0,
    0x00af_9b00_0000_ffff,
    0x00cf_9300_0000_ffff,
    0x0000_8b00_0000_0067,
];
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;

/// CR0: protection on, paging on; ET reads as one (Intel SDM volume 3, 2.5).
const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
/// EFER: long mode enabled, and active.
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// RFLAGS: bit 1 is always one; interrupts are off.
const RFLAGS_CLEAR: u64 = 2;

/// Page table entries (Intel SDM volume 3, 4.5.4): present and writable; and a 2 MiB page.
const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;
const LARGE_PAGE: u64 = 1 << 7;
const TABLE_BYTES: u64 = 0x1000;
const ENTRIES: u64 = 512;
/// One page directory maps 1 GiB.
const DIRECTORIES: u64 = 4;

/// Puts descriptor and page tables where the registers point.
pub(crate) fn write_tables(memory: &GuestMemory) -> Result<(), BootError> {
    let descriptors: Vec<u8> = DESCRIPTORS
        .iter()
        .flat_map(|entry| entry.to_le_bytes())
        .collect();
    put(memory, &descriptors, GDT)?;
    let pointers = PAGE_TABLES.0 + TABLE_BYTES;
    let first_directory = pointers + TABLE_BYTES;
    put_entry(memory, PAGE_TABLES.0, pointers | PRESENT | WRITABLE)?;
    for directory in 0..DIRECTORIES {
        let at = first_directory + directory * TABLE_BYTES;
        put_entry(memory, pointers + 8 * directory, at | PRESENT | WRITABLE)?;
        let first_page = directory * ENTRIES;
        let pages = (first_page..first_page + ENTRIES)
            .flat_map(|page| (page << 21 | PRESENT | WRITABLE | LARGE_PAGE).to_le_bytes());
        put(memory, &pages.collect::<Vec<u8>>(), GuestAddress(at))?;
    }
    Ok(())
}

fn put_entry(memory: &GuestMemory, at: u64, entry: u64) -> Result<(), BootError> {
    put(memory, &entry.to_le_bytes(), GuestAddress(at))
}

fn put(memory: &GuestMemory, bytes: &[u8], at: GuestAddress) -> Result<(), BootError> {
    memory.write_slice(bytes, at).map_err(|_| BootError::Place {
        what: "a processor table",
        address: at.0,
    })
}

/// Changes what the first vCPU has after reset into what its entry demands.
pub(crate) fn first_registers(entry: Entry, sregs: &mut kvm_sregs) -> kvm_regs {
    let mut regs = kvm_regs {
        rflags: RFLAGS_CLEAR,
        ..kvm_regs::default()
    };
    match entry {
        Entry::Linux64 { address } => {
            long_mode(sregs);
            regs.rip = address.0;
            regs.rsi = ZERO_PAGE.0;
            regs.rsp = BOOT_STACK.0;
            regs.rbp = BOOT_STACK.0;
        }
        // pvh.pandoc: EBX at the start info; CR0 with PE only; CS and DS flat; TR 32-bit.
        Entry::Pvh { address } => {
            flat_segments(sregs, Width::Bits32);
            sregs.cr0 = CR0_PE | CR0_ET;
            sregs.cr4 = 0;
            sregs.efer = 0;
            regs.rip = address.0;
            regs.rbx = PVH_START_INFO.0;
        }
        Entry::Flat {
            address,
            mode: ProcessorMode::Long,
        } => {
            long_mode(sregs);
            regs.rip = address.0;
            regs.rsp = BOOT_STACK.0;
        }
        Entry::Flat {
            address,
            mode: ProcessorMode::Real,
        } => {
            for segment in [
                &mut sregs.cs,
                &mut sregs.ds,
                &mut sregs.es,
                &mut sregs.ss,
                &mut sregs.fs,
                &mut sregs.gs,
            ] {
                segment.base = 0;
                segment.selector = 0;
            }
            regs.rip = address.0;
            regs.rsp = BOOT_STACK.0;
        }
    }
    regs
}

fn long_mode(sregs: &mut kvm_sregs) {
    flat_segments(sregs, Width::Bits64);
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.cr3 = PAGE_TABLES.0;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Width {
    Bits32,
    Bits64,
}

fn flat_segments(sregs: &mut kvm_sregs, width: Width) {
    let flat = kvm_segment {
        limit: u32::MAX,
        present: 1,
        s: 1,
        g: 1,
        ..kvm_segment::default()
    };
    // Type 11: code, readable, accessed. Type 3: data, writable, accessed.
    sregs.cs = kvm_segment {
        selector: CODE_SELECTOR,
        type_: 11,
        l: u8::from(width == Width::Bits64),
        db: u8::from(width == Width::Bits32),
        ..flat
    };
    let data = kvm_segment {
        selector: DATA_SELECTOR,
        type_: 3,
        db: 1,
        ..flat
    };
    for segment in [
        &mut sregs.ds,
        &mut sregs.es,
        &mut sregs.fs,
        &mut sregs.gs,
        &mut sregs.ss,
    ] {
        *segment = data;
    }
    // A busy 32-bit (or in long mode 64-bit) task state segment.
    sregs.tr = kvm_segment {
        selector: TASK_SELECTOR,
        type_: 11,
        limit: 0x67,
        present: 1,
        ..kvm_segment::default()
    };
    sregs.gdt.base = GDT.0;
    sregs.gdt.limit = u16::try_from(size_of_val(&DESCRIPTORS) - 1).unwrap_or(u16::MAX);
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;
    use insula_types::Bytes;

    /// Walks the tables as the processor does.
    #[test]
    fn the_first_4_gib_are_mapped_one_to_one() {
        let size = memory::MemorySize::new(Bytes::mib(2)).expect("a size");
        let memory = memory::create(size).expect("memory");
        write_tables(&memory).expect("room");
        let read = |at: u64| memory.read_obj::<u64>(GuestAddress(at)).expect("memory");
        for address in [0, 0x1234_5678, 0x8000_0000, 0xd000_1000, 0xffff_ffff_u64] {
            let mut table = PAGE_TABLES.0;
            for shift in [39, 30, 21] {
                let entry = read(table + 8 * (address >> shift & (ENTRIES - 1)));
                assert_eq!(entry & (PRESENT | WRITABLE), PRESENT | WRITABLE);
                assert_eq!(entry & LARGE_PAGE != 0, shift == 21);
                table = entry & !0xfff;
            }
            assert_eq!(table, address & !0x1f_ffff, "{address:#x}");
        }
    }
}
