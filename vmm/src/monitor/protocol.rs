//! What host and monitor say to each other, in packets of JSON with descriptors beside them.
//!
//! The host asks, the monitor answers each request with one reply, in order. Every packet begins
//! with the version, which is looked at before anything else: a host that was upgraded finds
//! monitors of its predecessor, and is told what they speak.
//!
//! Bounds: [`MESSAGE_MAX_BYTES`] for a packet, [`DESCRIPTORS_MAX`] for what comes beside it. What is
//! longer, not JSON, or has a field that nobody knows, is refused, and the connection closed.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::description::MachineDescription;
use super::wire::Slot;
use crate::machine::Phase;

/// Of this protocol. Raised with every change that an older side would not understand.
pub const VERSION: u16 = 1;
/// The longest packet.
pub const MESSAGE_MAX_BYTES: usize = 64 << 10;
/// Descriptors beside one packet: a kernel, an initrd, and two for each device.
pub const DESCRIPTORS_MAX: usize = 64;

/// What the host asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Makes the machine and lets it run. The first request, and only once.
    Start {
        /// What it is to be.
        machine: Box<MachineDescription>,
    },
    /// Parks it between two instructions.
    Pause,
    /// Lets it go on.
    Resume,
    /// Presses its power button: a guest that listens shuts down.
    PowerButton,
    /// Ends it at once; the monitor exits.
    End {
        /// What the record of its end is to say.
        cause: Cause,
    },
    /// Saves it, while it is paused, and makes durable what it wrote to its disks.
    Save {
        /// An empty file for its state.
        state: Slot,
        /// An empty file for its memory.
        memory: Slot,
    },
    /// What it did so far.
    Statistics,
    /// The descriptor beside it becomes one more terminal of the console.
    Console,
}

/// What the monitor answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Reply {
    /// It is done.
    Done,
    /// To [`Request::Statistics`].
    Statistics {
        /// The numbers.
        of: Box<Statistics>,
    },
    /// It is not done, and nothing has changed.
    Refused {
        /// Why, for a person.
        why: String,
    },
}

/// Why vCPUs leave the guest, as [`Statistics::exits`] says it.
pub const EXIT_REASONS: [&str; 6] = [
    "port_read",
    "port_write",
    "memory_read",
    "memory_write",
    "interrupted",
    "other",
];

/// What a machine did since its monitor started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Statistics {
    /// Where it is.
    pub phase: Phase,
    /// How often vCPUs left the guest, for each of [`EXIT_REASONS`].
    pub exits: [u64; EXIT_REASONS.len()],
    /// Bytes that the guest wrote to its console.
    pub console_written_bytes: u64,
    /// By device, in the order in which the guest finds them.
    pub devices: Vec<DeviceStatistics>,
}

/// What one device did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceStatistics {
    /// `block`, `net`, ….
    pub kind: String,
    /// From the outside to the guest.
    pub read_bytes: u64,
    /// From the guest to the outside.
    pub written_bytes: u64,
    /// How often it stopped because its driver broke the rules or its host side failed.
    pub failures: u64,
    /// Why it did last.
    pub last_failure: Option<String>,
}

/// Why a machine is over, by kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// The guest turned it off.
    PoweredOff,
    /// The guest wants to start anew.
    Rebooted,
    /// The host ended it.
    Stopped,
    /// The host ended it, to start it anew.
    Reset,
    /// It never ran.
    Setup,
    /// It could not go on.
    Failed,
}

/// What a monitor leaves behind in its record, once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// By kind.
    pub cause: Cause,
    /// For a person.
    pub detail: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Packet<T> {
    version: u16,
    body: T,
}

/// All that is certain of a packet of another version.
#[derive(Deserialize)]
struct Head {
    version: u16,
}

/// A packet that is not to be understood.
#[derive(Debug, thiserror::Error)]
pub enum PacketError {
    /// Of another version.
    #[error("the other side speaks version {found} of the monitor's protocol, this one {VERSION}")]
    Version {
        /// Which.
        found: u16,
    },
    /// Not what a packet looks like.
    #[error("not a packet: {0}")]
    Form(#[from] serde_json::Error),
    /// Larger than a packet may be.
    #[error("a packet of {bytes} bytes, and {MESSAGE_MAX_BYTES} are the most")]
    Long {
        /// Its length.
        bytes: usize,
    },
}

/// The bytes of a packet.
///
/// # Errors
/// It would be too long.
pub fn encode<T: Serialize>(body: &T) -> Result<Vec<u8>, PacketError> {
    let version = VERSION;
    let bytes = serde_json::to_vec(&Packet { version, body })?;
    if bytes.len() > MESSAGE_MAX_BYTES {
        let bytes = bytes.len();
        return Err(PacketError::Long { bytes });
    }
    Ok(bytes)
}

/// What a packet says.
///
/// # Errors
/// Another version, or no packet.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, PacketError> {
    let Head { version } = serde_json::from_slice(bytes)?;
    if version != VERSION {
        return Err(PacketError::Version { found: version });
    }
    let packet: Packet<T> = serde_json::from_slice(bytes)?;
    Ok(packet.body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_arrives() {
        for request in [
            Request::Pause,
            Request::End {
                cause: Cause::Reset,
            },
        ] {
            let bytes = encode(&request).expect("short");
            assert_eq!(decode::<Request>(&bytes).expect("ours"), request);
        }
    }

    #[test]
    fn another_version_is_named_whatever_its_body() {
        let later = br#"{"version":7,"soul":"teleport"}"#;
        let refused = decode::<Request>(later).expect_err("not ours");
        assert!(matches!(refused, PacketError::Version { found: 7 }));
    }

    #[test]
    fn what_nobody_knows_is_refused() {
        for bytes in [
            &br#"{"version":1,"body":"teleport"}"#[..],
            br#"{"version":1,"body":{"pause":{"gently":true}}}"#,
            br#"{"version":1,"body":{"end":{"cause":"stopped","now":1}}}"#,
            br#"{"version":1,"body":"pause","urgent":true}"#,
            br#"{"version":1}"#,
            b"",
            b"\xff\xff",
        ] {
            assert!(
                decode::<Request>(bytes).is_err(),
                "{}",
                bytes.escape_ascii()
            );
        }
    }

    #[test]
    fn what_is_too_long_is_not_sent() {
        let why = "a".repeat(MESSAGE_MAX_BYTES);
        let refused = encode(&Reply::Refused { why }).expect_err("too long");
        assert!(matches!(refused, PacketError::Long { .. }));
    }
}
