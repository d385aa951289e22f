//! A machine as the host describes it, and the configuration that it becomes in the monitor.

use std::fs::File;
use std::io;
use std::sync::Arc;

use insula_types::Bytes;
use serde::{Deserialize, Serialize};

use super::wire::{Incoming, Slot, SlotError};
use crate::boot::{BootSource, CommandLineError};
use crate::config::{VcpuCount, VcpuCountError};
use crate::memory::{MemoryError, MemorySize};
use crate::virtio::VirtioDevice;
use crate::virtio::block::{
    Access, BaseId, Block, Disk, DiskCounts, DiskError, Overlay, OverlayError, RawDisk,
    SerialNumberError,
};
use crate::virtio::rng::Rng;

/// All of a machine, with its files as descriptors beside the packet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineDescription {
    /// Processors.
    pub vcpus: u8,
    /// Memory.
    pub memory_bytes: u64,
    /// `/dev/kvm`.
    pub kvm: Slot,
    /// bzImage, or ELF with a PVH note.
    pub kernel: Slot,
    /// The initial ramdisk.
    pub initrd: Option<Slot>,
    /// What the kernel is told.
    pub command_line: String,
    /// In the order in which the guest finds them.
    pub disks: Vec<DiskDescription>,
}

/// One disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskDescription {
    /// What the guest finds as its serial number.
    pub serial: String,
    /// The image.
    pub image: Slot,
    /// What may be written, and where it goes.
    pub writes: Writes,
}

/// Where a guest's writes to a disk go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Writes {
    /// Nowhere: it is read-only.
    Refused,
    /// Into the image itself.
    Image,
    /// Into an overlay over the image, which stays as it is.
    Overlay {
        /// The overlay's file; empty for a new one.
        file: Slot,
        /// The image's sha256, in hexadecimal.
        base: String,
        /// Size of the disk, where it is to be larger than the image.
        disk_bytes: Option<u64>,
    },
}

/// Why a description is of no machine.
#[derive(Debug, thiserror::Error)]
pub enum DescriptionError {
    /// Processors.
    #[error(transparent)]
    Vcpus(#[from] VcpuCountError),
    /// Memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// More bytes than there are.
    #[error("{bytes} bytes of memory")]
    Bytes {
        /// How many.
        bytes: u64,
    },
    /// The command line.
    #[error(transparent)]
    CommandLine(#[from] CommandLineError),
    /// A descriptor.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// A disk's name.
    #[error(transparent)]
    Serial(#[from] SerialNumberError),
    /// A disk's image.
    #[error("disk {serial}: {source}")]
    Disk {
        /// Which.
        serial: String,
        /// Why.
        source: DiskError,
    },
    /// A disk's overlay.
    #[error("disk {serial}: {source}")]
    Overlay {
        /// Which.
        serial: String,
        /// Why.
        source: OverlayError,
    },
    /// Not 64 hexadecimal digits.
    #[error("{given:?} is no sha256 digest")]
    Digest {
        /// What was given.
        given: String,
    },
    /// A file.
    #[error(transparent)]
    File(#[from] io::Error),
}

/// What the description becomes, but for the console.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) vcpus: VcpuCount,
    pub(super) memory: MemorySize,
    pub(super) boot: BootSource,
    pub(super) devices: Vec<Box<dyn VirtioDevice>>,
    pub(super) meters: Vec<Meter>,
}

/// Where a device's bytes are counted, by its place among the devices.
#[derive(Debug)]
pub(super) enum Meter {
    /// It moves none that anybody is charged for.
    Nothing,
    Disk(Arc<DiskCounts>),
}

impl Meter {
    /// Read and written.
    pub(super) fn read(&self) -> (u64, u64) {
        match self {
            Self::Nothing => (0, 0),
            Self::Disk(counts) => {
                let [read, written, ..] = counts.read();
                (read, written)
            }
        }
    }
}

impl MachineDescription {
    /// Checks everything, and takes the descriptors.
    pub(super) fn realize(self, with: &mut Incoming) -> Result<Parts, DescriptionError> {
        let vcpus = VcpuCount::new(self.vcpus)?;
        let bytes = self.memory_bytes;
        let memory = Bytes::new(bytes).map_err(|_| DescriptionError::Bytes { bytes })?;
        let memory = MemorySize::new(memory)?;
        let initrd = self.initrd.map(|slot| with.take(slot)).transpose()?;
        let boot = BootSource::Kernel {
            kernel: with.take(self.kernel)?.into(),
            initrd: initrd.map(File::from),
            command_line: self.command_line.parse()?,
        };
        let (mut devices, mut meters) = (Vec::<Box<dyn VirtioDevice>>::new(), Vec::new());
        for disk in self.disks {
            let serial = disk.serial.parse()?;
            let block = Block::new(disk.open(with)?, serial);
            meters.push(Meter::Disk(block.counts()));
            devices.push(Box::new(block));
        }
        devices.push(Box::new(Rng::default()));
        meters.push(Meter::Nothing);
        Ok(Parts {
            vcpus,
            memory,
            boot,
            devices,
            meters,
        })
    }
}

impl DiskDescription {
    fn open(self, with: &mut Incoming) -> Result<Box<dyn Disk>, DescriptionError> {
        let Self {
            serial,
            image,
            writes,
        } = self;
        let image = File::from(with.take(image)?);
        let raw = |image, access| match RawDisk::new(image, access) {
            Ok(disk) => Ok(Box::new(disk) as Box<dyn Disk>),
            Err(source) => Err(DescriptionError::Disk {
                serial: serial.clone(),
                source,
            }),
        };
        match writes {
            Writes::Refused => raw(image, Access::ReadOnly),
            Writes::Image => raw(image, Access::ReadWrite),
            Writes::Overlay {
                file,
                base,
                disk_bytes,
            } => {
                let base = digest(&base)?;
                let file = with.take(file)?.into();
                match Overlay::open(image, base, file, disk_bytes) {
                    Ok(disk) => Ok(Box::new(disk)),
                    Err(source) => Err(DescriptionError::Overlay { serial, source }),
                }
            }
        }
    }
}

fn digest(text: &str) -> Result<BaseId, DescriptionError> {
    let wrong = || DescriptionError::Digest {
        given: text.chars().take(80).collect(),
    };
    let mut bytes = [0; 32];
    if text.len() != 64 || !text.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return Err(wrong());
    }
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
        let pair = std::str::from_utf8(pair).map_err(|_| wrong())?;
        *byte = u8::from_str_radix(pair, 16).map_err(|_| wrong())?;
    }
    Ok(BaseId(bytes))
}
