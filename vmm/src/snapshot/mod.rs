//! A machine that stands still, as bytes: its state in one file, its memory in another.
//!
//! ```text
//! state:   "INSULASN" │ version, 4 bytes │ JSON                        at most 16 MiB
//! memory:  the regions one after the other; a page of zeroes is a hole
//! ```
//!
//! The memory file is mapped privately when a machine is restored: pages come in as the guest touches
//! them, all machines restored from one file share them, and what a guest writes stays its own.
//!
//! *Who may be believed.* The state comes from a monitor that a guest may have taken over, so it is
//! read like anything that a guest says: bounded, checked, and used only by a monitor in the same
//! jail. That nobody else has changed it is the host's to know, which keeps a code of authentication
//! over both files. What the state says of processors goes to KVM, which checks it.
//!
//! *Not in it:* disks. The monitor makes what was written durable before it answers, and the host
//! copies the files while the machine stands still.

mod memory;
mod vcpu;
mod vm;

use std::fs::File;
use std::io;

use serde::{Deserialize, Serialize};

use crate::devices::SerialSaved;
use crate::devices::watchdog::WatchdogSaved;
use crate::virtio::TransportState;

pub(crate) use memory::{map, write};
pub use vcpu::VcpuState;
pub(crate) use vcpu::{MsrList, restore as restore_vcpu, save as save_vcpu};
pub use vm::VmState;

const MAGIC: [u8; 8] = *b"INSULASN";
/// Of the state's form. The first had no watchdog; its guests have no table that names one.
const VERSION: u32 = 2;
const OLDEST: u32 = 1;
const HEAD_BYTES: usize = 12;
/// Far beyond 32 vCPUs with 18 devices.
pub const STATE_MAX_BYTES: usize = 16 << 20;

/// All of a machine but its memory and its disks.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineState {
    /// Size of the memory that belongs to it.
    pub memory_bytes: u64,
    /// Processors, by number.
    pub vcpus: Vec<VcpuState>,
    /// What all processors share.
    pub vm: VmState,
    /// The console's port.
    pub(crate) serial: SerialSaved,
    /// The guest's, off where it is not told.
    #[serde(default)]
    pub(crate) watchdog: WatchdogSaved,
    /// In the order in which the guest finds them.
    pub devices: Vec<TransportState>,
}

/// A machine that was saved.
#[derive(Debug)]
pub struct Snapshot {
    /// All but its memory and its disks.
    pub state: MachineState,
    /// Its memory; never written to.
    pub memory: File,
}

/// Not a state that this version reads.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// Something else.
    #[error("not the state of a machine")]
    NotOne,
    /// Of another version.
    #[error("the state has version {found}, and this monitor reads {OLDEST} to {VERSION}")]
    Version {
        /// Which.
        found: u32,
    },
    /// Too large.
    #[error("a state of {bytes} bytes, and {STATE_MAX_BYTES} are the most")]
    Long {
        /// Its length.
        bytes: usize,
    },
    /// Broken.
    #[error("the state cannot be read: {0}")]
    Content(#[from] serde_json::Error),
    /// The file.
    #[error("the state cannot be read: {0}")]
    File(#[from] io::Error),
}

impl MachineState {
    /// As bytes.
    ///
    /// # Errors
    /// It would be too large.
    pub fn encode(&self) -> Result<Vec<u8>, FormatError> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        serde_json::to_writer(&mut bytes, self)?;
        if bytes.len() > STATE_MAX_BYTES {
            let bytes = bytes.len();
            return Err(FormatError::Long { bytes });
        }
        Ok(bytes)
    }

    /// From bytes that anybody may have written.
    ///
    /// # Errors
    /// Not a state that this version reads.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        if bytes.len() > STATE_MAX_BYTES {
            let bytes = bytes.len();
            return Err(FormatError::Long { bytes });
        }
        let (head, content) = bytes
            .split_at_checked(HEAD_BYTES)
            .ok_or(FormatError::NotOne)?;
        let version = match head.split_at(MAGIC.len()) {
            (magic, version) if magic == MAGIC => version.try_into(),
            _ => return Err(FormatError::NotOne),
        };
        let found = u32::from_le_bytes(version.map_err(|_| FormatError::NotOne)?);
        if !(OLDEST..=VERSION).contains(&found) {
            return Err(FormatError::Version { found });
        }
        Ok(serde_json::from_slice(content)?)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn with_head(version: u32, content: &[u8]) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(version.to_le_bytes());
        bytes.extend(content);
        bytes
    }

    #[test]
    fn what_is_no_state_is_refused() {
        let decode = |bytes: &[u8]| MachineState::decode(bytes).expect_err("not one");
        assert!(matches!(decode(b""), FormatError::NotOne));
        assert!(matches!(decode(b"INSULASN\x01\0\0"), FormatError::NotOne));
        assert!(matches!(
            decode(b"INSULAOV\x01\0\0\0{}"),
            FormatError::NotOne
        ));
        let later = decode(&with_head(VERSION + 1, b"{}"));
        assert!(matches!(later, FormatError::Version { found: 3 }));
        let earlier = decode(&with_head(OLDEST - 1, b"{}"));
        assert!(matches!(earlier, FormatError::Version { found: 0 }));
        assert!(matches!(
            decode(&with_head(VERSION, b"{}")),
            FormatError::Content(_)
        ));
        let long = vec![b' '; STATE_MAX_BYTES + 1];
        assert!(matches!(decode(&long), FormatError::Long { .. }));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_harm(content in proptest::collection::vec(any::<u8>(), 0..400)) {
            prop_assert!(MachineState::decode(&with_head(VERSION, &content)).is_err());
            prop_assert!(MachineState::decode(&content).is_err());
        }
    }
}
