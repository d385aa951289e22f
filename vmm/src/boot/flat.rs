//! Bare code at an address, for micro-guests: the smallest thing that runs.

use vm_memory::{Bytes as _, GuestAddress};

use super::{BootError, Entry};
use crate::memory::GuestMemory;

/// What state the processor is in when the code starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProcessorMode {
    /// 16-bit real mode, all segments at zero.
    Real,
    /// 64-bit mode, the first 4 GiB mapped one to one.
    Long,
}

/// Code, and where it goes.
#[derive(Debug, Clone)]
pub struct FlatCode {
    /// The instructions; the first is the first to run.
    pub code: Vec<u8>,
    /// Where they are put. In real mode below 64 KiB.
    pub address: GuestAddress,
    /// What they are written for.
    pub mode: ProcessorMode,
}

pub(super) fn load(memory: &GuestMemory, flat: &FlatCode) -> Result<Entry, BootError> {
    let bad = BootError::Place {
        what: "the code",
        address: flat.address.0,
    };
    if flat.mode == ProcessorMode::Real && flat.address.0 > u64::from(u16::MAX) {
        return Err(bad);
    }
    memory
        .write_slice(&flat.code, flat.address)
        .map_err(|_| bad)?;
    Ok(Entry::Flat {
        address: flat.address,
        mode: flat.mode,
    })
}
