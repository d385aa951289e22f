//! What a device implements.

use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::config_space::ConfigSpace;
use super::queue::{QueueError, Queues};

/// Device ids (virtio 1.2, section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceKind {
    /// 5.1
    Network,
    /// 5.2
    Block,
    /// 5.4
    Entropy,
    /// 5.5
    Balloon,
    /// 5.10
    Socket,
}

impl DeviceKind {
    /// As the driver reads it.
    #[must_use]
    pub fn id(self) -> u32 {
        match self {
            Self::Network => 1,
            Self::Block => 2,
            Self::Entropy => 4,
            Self::Balloon => 5,
            Self::Socket => 19,
        }
    }

    /// For logs, thread names and exit reasons.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Network => "net",
            Self::Block => "block",
            Self::Entropy => "rng",
            Self::Balloon => "balloon",
            Self::Socket => "vsock",
        }
    }
}

/// One queue of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueSpec {
    /// Most descriptors that the driver may give it: a power of two, at most 32768.
    pub max_size: u16,
    /// Most bytes that one chain may have, readable and writable together. A longer one stops the
    /// device.
    pub max_chain_bytes: u32,
}

/// Why a device stopped. The driver finds NEEDS_RESET set; nothing else happens to the machine.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The driver broke the rules of the rings.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The driver broke the rules of the device.
    #[error("{0}")]
    Protocol(&'static str),
    /// The host side failed for good.
    #[error("{what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// The system's reason.
        source: std::io::Error,
    },
}

/// A device's own state in a snapshot: bytes that only the same kind of device understands, and
/// that start with the version of their form.
#[derive(Clone, PartialEq, Eq)]
pub struct DeviceState(pub Vec<u8>);

impl fmt::Debug for DeviceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceState({} bytes)", self.0.len())
    }
}

/// When to call a device for one of its own descriptors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Readiness {
    /// There is something to read, or the other side is gone.
    Readable,
    /// There is room to write, or the other side is gone.
    Writable,
    /// Either.
    Both,
}

/// A descriptor that a device waits for at the moment.
#[derive(Debug, Clone, Copy)]
pub struct Interest<'d> {
    /// Polled level-triggered: a device that does not want to be called again does not name it
    /// the next time.
    pub descriptor: BorrowedFd<'d>,
    /// What for.
    pub readiness: Readiness,
    /// Given back to [`VirtioDevice::host_ready`].
    pub token: u64,
}

/// The back end of a device. All methods are called on its worker's thread, never at once.
///
/// Between [`activate`](Self::activate) and [`reset`](Self::reset) the device is live. An error
/// stops it: after it only `reset`, `save` and `activate` are called.
pub trait VirtioDevice: Send + fmt::Debug {
    /// What it is.
    fn kind(&self) -> DeviceKind;

    /// The feature bits of this kind of device that it offers. The transport adds those that all
    /// devices have: `VERSION_1`, `RING_EVENT_IDX`, `RING_INDIRECT_DESC`.
    fn features(&self) -> u64;

    /// Its queues, in the order that virtio gives them.
    fn queues(&self) -> &[QueueSpec];

    /// Its configuration space, which the transport reads and writes without asking.
    fn config(&self) -> &Arc<ConfigSpace>;

    /// The driver is ready. `accepted` is a subset of what was offered.
    ///
    /// # Errors
    /// The device cannot run with these features.
    fn activate(&mut self, accepted: u64) -> Result<(), DeviceError>;

    /// The driver notified a queue; also called once for each queue after activation and after
    /// restore. What the device leaves in the queue it has to come back for itself.
    ///
    /// # Errors
    /// The device stops.
    fn queue_notified(&mut self, index: usize, queues: &mut Queues) -> Result<(), DeviceError>;

    /// The descriptors that the device waits for now. Asked anew before each wait.
    fn interests<'d>(&'d self, into: &mut Vec<Interest<'d>>) {
        let _ = into;
    }

    /// A descriptor is ready.
    ///
    /// # Errors
    /// The device stops.
    fn host_ready(&mut self, token: u64, queues: &mut Queues) -> Result<(), DeviceError> {
        let _ = (token, queues);
        Ok(())
    }

    /// The driver wrote to the configuration space. Several writes may have come together.
    ///
    /// # Errors
    /// The device stops.
    fn config_written(&mut self, queues: &mut Queues) -> Result<(), DeviceError> {
        let _ = queues;
        Ok(())
    }

    /// Back to before activation: whatever is under way is dropped.
    fn reset(&mut self);

    /// Makes durable what was written so far, for a copy of the host's files. The worker is at rest.
    ///
    /// # Errors
    /// The host side's; the device goes on.
    fn settle(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }

    /// What a restored device needs beyond features, queues and configuration space. The worker
    /// is at rest: no request is under way.
    fn save(&self) -> DeviceState {
        DeviceState(Vec::new())
    }

    /// Takes over what [`save`](Self::save) gave; called before `activate`.
    ///
    /// # Errors
    /// It is not this device's state.
    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceError> {
        if state.0.is_empty() {
            Ok(())
        } else {
            Err(DeviceError::Protocol("state of another kind of device"))
        }
    }
}
