//! A machine as the host describes it, and the configuration that it becomes in the monitor.

use std::fs::File;
use std::io::{self, Read};
use std::net::Ipv4Addr;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use insula_types::Bytes;
use serde::{Deserialize, Serialize};

use super::wire::{Incoming, Slot, SlotError};
use crate::boot::{BootSource, CommandLineError};
use crate::config::{VcpuCount, VcpuCountError};
use crate::memory::{MemoryError, MemorySize};
use crate::rate_limiter::RateLimits;
use crate::snapshot::{FormatError, MachineState, STATE_MAX_BYTES, Snapshot};
use crate::virtio::VirtioDevice;
use crate::virtio::balloon::Balloon;
use crate::virtio::block::{
    Access, BaseId, Block, Disk, DiskCounts, DiskError, Overlay, OverlayError, RawDisk,
    SerialNumberError,
};
use crate::virtio::net::{Identity, MacAddressError, Mtu, Net, NetCounts, Tap};
use crate::virtio::rng::Rng;
use crate::virtio::vsock::{BesidePath, GuestCid, GuestCidError, Vsock};

/// All of a machine, with its files as descriptors beside the packet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineDescription {
    /// `/dev/kvm`.
    pub kvm: Slot,
    /// Where its first instruction comes from.
    pub origin: Origin,
    /// In the order in which the guest finds them.
    pub disks: Vec<DiskDescription>,
    /// A listening Unix socket, where processes of the host speak with sockets of the guest. The
    /// guest's own calls go to sockets in the monitor's root, [`VSOCK_PREFIX`] and the port.
    pub vsock: Option<Slot>,
    /// Its network, if it has one.
    pub net: Option<NetDescription>,
}

/// A network device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetDescription {
    /// The tap.
    pub tap: Slot,
    /// The guest's address on the link; nothing leaves with another one.
    pub mac: String,
    /// And on the internet.
    pub ipv4: Ipv4Addr,
    /// What it may receive and, apart from that, send.
    #[serde(default)]
    pub limits: RateLimits,
}

/// Where a monitor looks for sockets that its guest may connect to: `/vsock_1024` for port 1024.
pub const VSOCK_PREFIX: &str = "/vsock";
/// The first address that is not reserved (virtio 1.2, 5.10.4). Each guest has its own device, so
/// that all may have the same.
const GUEST_CID: u32 = 3;

/// What a machine begins with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Origin {
    /// A kernel.
    Boot {
        /// Processors.
        vcpus: u8,
        /// Memory.
        memory_bytes: u64,
        /// bzImage, or ELF with a PVH note.
        kernel: Slot,
        /// The initial ramdisk.
        initrd: Option<Slot>,
        /// What the kernel is told.
        command_line: String,
    },
    /// A machine that was saved. The disks are to be as they were then.
    Snapshot {
        /// All but its memory.
        state: Slot,
        /// Its memory; only read.
        memory: Slot,
    },
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
    /// What it may read and write, together.
    #[serde(default)]
    pub limits: RateLimits,
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
    /// The guest's address on its link.
    #[error(transparent)]
    Mac(#[from] MacAddressError),
    /// The guest's address.
    #[error(transparent)]
    Cid(#[from] GuestCidError),
    /// The state of a saved machine.
    #[error(transparent)]
    State(#[from] FormatError),
    /// A file.
    #[error(transparent)]
    File(#[from] io::Error),
}

/// What the description becomes, but for the console.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) begin: Begin,
    pub(super) devices: Vec<Box<dyn VirtioDevice>>,
    pub(super) meters: Vec<Meter>,
}

/// What a machine begins with, checked and open.
#[derive(Debug)]
pub(super) enum Begin {
    Boot {
        vcpus: VcpuCount,
        memory: MemorySize,
        boot: BootSource,
    },
    Snapshot(Box<Snapshot>),
}

/// Where a device's bytes are counted, by its place among the devices.
#[derive(Debug)]
pub(super) enum Meter {
    /// It moves none that anybody is charged for.
    Nothing,
    Disk(Arc<DiskCounts>),
    Net(Arc<NetCounts>),
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
            Self::Net(counts) => {
                let totals = counts.read();
                (totals.received_bytes, totals.sent_bytes)
            }
        }
    }
}

impl MachineDescription {
    /// Checks everything, and takes the descriptors.
    pub(super) fn realize(self, with: &mut Incoming) -> Result<Parts, DescriptionError> {
        let begin = self.origin.open(with)?;
        let memory = begin.memory()?;
        let (mut devices, mut meters) = (Vec::<Box<dyn VirtioDevice>>::new(), Vec::new());
        for disk in self.disks {
            let (serial, limits) = (disk.serial.parse()?, disk.limits);
            let block = Block::new(disk.open(with)?, serial).with_limits(limits)?;
            meters.push(Meter::Disk(block.counts()));
            devices.push(Box::new(block));
        }
        devices.push(Box::new(Rng::default()));
        meters.push(Meter::Nothing);
        devices.push(Box::new(Balloon::new(memory)?));
        meters.push(Meter::Nothing);
        if let Some(listener) = self.vsock {
            let listener = UnixListener::from(with.take(listener)?);
            let dial = Box::new(BesidePath::new(VSOCK_PREFIX.into())?);
            let vsock = Vsock::new(GuestCid::new(GUEST_CID)?, Some(listener), dial)?;
            meters.push(Meter::Nothing);
            devices.push(Box::new(vsock));
        }
        // The last one, so that the others are where they are in a machine without it.
        if let Some(net) = self.net {
            let net = net.open(with)?;
            meters.push(Meter::Net(net.counts()));
            devices.push(Box::new(net));
        }
        Ok(Parts {
            begin,
            devices,
            meters,
        })
    }
}

impl NetDescription {
    fn open(self, with: &mut Incoming) -> Result<Net, DescriptionError> {
        let identity = Identity {
            mac: self.mac.parse()?,
            ipv4: vec![self.ipv4],
            ipv6: Vec::new(),
        };
        let tap = Tap::adopt(with.take(self.tap)?)?;
        let net = Net::new(tap, identity, Mtu::default());
        Ok(net.with_limits(self.limits, self.limits)?)
    }
}

impl Begin {
    fn memory(&self) -> Result<MemorySize, DescriptionError> {
        match self {
            Self::Boot { memory, .. } => Ok(*memory),
            Self::Snapshot(snapshot) => size(snapshot.state.memory_bytes),
        }
    }
}

fn size(bytes: u64) -> Result<MemorySize, DescriptionError> {
    let checked = Bytes::new(bytes).map_err(|_| DescriptionError::Bytes { bytes })?;
    Ok(MemorySize::new(checked)?)
}

impl Origin {
    fn open(self, with: &mut Incoming) -> Result<Begin, DescriptionError> {
        match self {
            Self::Boot {
                vcpus,
                memory_bytes,
                kernel,
                initrd,
                command_line,
            } => {
                let initrd = initrd.map(|slot| with.take(slot)).transpose()?;
                Ok(Begin::Boot {
                    vcpus: VcpuCount::new(vcpus)?,
                    memory: size(memory_bytes)?,
                    boot: BootSource::Kernel {
                        kernel: with.take(kernel)?.into(),
                        initrd: initrd.map(File::from),
                        command_line: command_line.parse()?,
                    },
                })
            }
            Self::Snapshot { state, memory } => {
                let mut bytes = Vec::new();
                let most = STATE_MAX_BYTES as u64 + 1;
                File::from(with.take(state)?)
                    .take(most)
                    .read_to_end(&mut bytes)?;
                Ok(Begin::Snapshot(Box::new(Snapshot {
                    state: MachineState::decode(&bytes)?,
                    memory: with.take(memory)?.into(),
                })))
            }
        }
    }
}

impl DiskDescription {
    fn open(self, with: &mut Incoming) -> Result<Box<dyn Disk>, DescriptionError> {
        let Self {
            serial,
            image,
            writes,
            limits: _,
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
