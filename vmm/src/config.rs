//! What a machine is to be: values that were checked, and files that are open.

use std::fmt;
use std::io::Write;
use std::os::fd::OwnedFd;

use crate::boot::BootSource;
use crate::memory::MemorySize;
use crate::virtio::VirtioDevice;

/// How many processors a machine has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct VcpuCount(u8);

/// Not a number of processors that a machine can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{count} vCPUs: a machine has from 1 to {}", VcpuCount::MAX.0)]
pub struct VcpuCountError {
    /// What was asked for.
    pub count: u8,
}

impl VcpuCount {
    /// One.
    pub const ONE: Self = Self(1);
    /// The most.
    pub const MAX: Self = Self(32);

    /// # Errors
    /// None, or too many.
    pub fn new(count: u8) -> Result<Self, VcpuCountError> {
        if (Self::ONE.0..=Self::MAX.0).contains(&count) {
            Ok(Self(count))
        } else {
            Err(VcpuCountError { count })
        }
    }

    /// As a number.
    #[must_use]
    pub fn get(self) -> u8 {
        self.0
    }
}

/// The serial port's other side.
pub struct Console {
    /// Where the guest's output goes. Called on vCPU threads: must not block. What it does not
    /// take is lost, as on a real port.
    pub output: Box<dyn Write + Send>,
    /// Where the guest's input comes from; at its end the port stays silent.
    pub input: Option<OwnedFd>,
}

impl fmt::Debug for Console {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Console").finish_non_exhaustive()
    }
}

impl Default for Console {
    /// Nobody listens, nobody types.
    fn default() -> Self {
        Self {
            output: Box::new(std::io::sink()),
            input: None,
        }
    }
}

/// All of a machine.
#[derive(Debug)]
pub struct MachineConfig {
    /// Processors.
    pub vcpus: VcpuCount,
    /// Memory.
    pub memory: MemorySize,
    /// What runs.
    pub boot: BootSource,
    /// The serial port.
    pub console: Console,
    /// Devices, in the order in which the guest finds them.
    pub devices: Vec<Box<dyn VirtioDevice>>,
}
