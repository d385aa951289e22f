//! Starting a machine: everything that its monitor needs, opened here and handed over.

use std::fs::File;
use std::io;
use std::num::{NonZeroU32, NonZeroU64};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::Duration;

use insula_types::machine::{DiskMode, Throughput};
use insula_types::{Digest, MachineId, MachineName, MachineSpec};
use insula_vmm::monitor::description::{
    DiskDescription, MachineDescription, NetDescription, Origin, Writes,
};
use insula_vmm::monitor::launch::{self, Orders, Walls};
use insula_vmm::monitor::protocol::Request;
use insula_vmm::monitor::wire::{Outgoing, SlotError};
use insula_vmm::monitor::{CallError, Client};
use insula_vmm::rate_limiter::{Rate, RateLimits};

use super::network::{Attached, NetworkError, Wire};
use super::runner::Whose;

/// The verb with which the program becomes a monitor.
pub const MONITOR_VERB: &str = "machine-monitor";
/// Reading a kernel and an initrd into a guest's memory.
const START_PATIENCE: Duration = Duration::from_secs(60);
/// From here on upward: beyond what systemd hands out to users, containers and services
/// (UIDS-GIDS.md of systemd), and below 2^31, which some programs take for negative.
const FIRST_USER: u32 = 0x7000_0000;
/// Numbers are used again after so many machines.
const USERS: u64 = 0x0f00_0000;
/// Beside one for each vCPU and device: the first one, the console's, the watchdog's, and two to spare.
const THREADS_BESIDE: u64 = 5;
const DEVICES_BESIDE_DISKS: u64 = 4;
/// Descriptors for each thread: its events, its files, its line.
const DESCRIPTORS_EACH: u64 = 8;
const DESCRIPTORS_BESIDE: u64 = 64;
/// Beside the disk itself: an overlay's header and bitmap.
const OVERLAY_BESIDE_BYTES: u64 = 256 << 20;

/// An image that is open.
#[derive(Debug)]
pub(crate) struct OpenImage {
    pub(crate) file: File,
    pub(crate) digest: Digest,
    pub(crate) bytes: u64,
}

/// What a machine begins with.
#[derive(Debug)]
pub(crate) enum Begin {
    /// Its kernel, and an initial ramdisk.
    Boot {
        kernel: OpenImage,
        initrd: Option<OpenImage>,
    },
    /// A snapshot, whose disks it has already.
    Saved { state: File, memory: File },
}

/// A machine that is to be started, with its images.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) program: PathBuf,
    pub(crate) spec: MachineSpec,
    /// What its guest may call itself.
    pub(crate) name: MachineName,
    pub(crate) begin: Begin,
    /// One for each of the spec's.
    pub(crate) disks: Vec<OpenImage>,
}

/// Why a machine does not start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StartError {
    #[error("making its control groups: {0}")]
    Groups(io::Error),
    #[error("making its directory: {0}")]
    Place(io::Error),
    #[error("starting its monitor: {0}")]
    Spawn(io::Error),
    #[error("opening /dev/kvm: {0}")]
    Kvm(io::Error),
    #[error("opening its disk {number}: {source}")]
    Disk { number: usize, source: io::Error },
    #[error("its network: {0}")]
    Network(#[from] NetworkError),
    #[error(transparent)]
    Slot(#[from] SlotError),
    #[error(transparent)]
    Call(#[from] CallError),
}

impl Plan {
    fn threads(&self) -> u64 {
        let disks = self.disks.len() as u64;
        u64::from(self.spec.vcpus) + disks + DEVICES_BESIDE_DISKS + THREADS_BESIDE
    }

    /// What the kernel is told, with its address, where its owner says nothing about that.
    fn command_line(&self, wire: Option<Wire>) -> String {
        let mut line = self.spec.cmdline.clone();
        let says = line.split(' ').any(|word| word.starts_with("ip="));
        if let Some(wire) = wire
            && !says
        {
            line.push(' ');
            line.push_str(&wire.kernel_argument(self.name.as_str()));
        }
        line
    }

    fn orders(&self, whose: &Whose, cgroups: Vec<PathBuf>) -> Orders {
        let user = user_of(whose.place.salt(), whose.machine);
        let largest = self.disks.iter().zip(&self.spec.disks);
        let largest = largest.map(|(image, disk)| disk.size.map_or(image.bytes, |size| size.get()));
        Orders {
            root: whose.place.root(),
            cgroups,
            user,
            group: user,
            descriptors: self.threads() * DESCRIPTORS_EACH + DESCRIPTORS_BESIDE,
            // A snapshot of its memory is a file as well.
            file_bytes: largest
                .max()
                .unwrap_or(0)
                .max(self.spec.memory.get())
                .saturating_add(OVERLAY_BESIDE_BYTES),
            threads: self.threads(),
            walls: if rustix::process::geteuid().is_root() {
                Walls::All
            } else {
                Walls::Own
            },
        }
    }
}

/// Machines of one host have users that follow each other; another host's begin elsewhere, so that
/// the kernel's bound on a user's threads counts one machine's.
fn user_of(salt: u32, machine: MachineId) -> NonZeroU32 {
    let number = u64::from(salt).wrapping_add(machine.get()) % USERS;
    let number = u32::try_from(number).unwrap_or(0);
    NonZeroU32::new(FIRST_USER + number).unwrap_or(NonZeroU32::MAX)
}

/// The process, before it knows what it is to run.
pub(super) fn spawn(whose: &Whose, plan: &Plan) -> Result<Child, StartError> {
    let ids = (whose.tenant, whose.machine);
    let (cpu, memory) = (&plan.spec.cpu, plan.spec.memory);
    let cgroups = whose
        .groups
        .make_machine(ids, cpu, memory, plan.threads())
        .map_err(StartError::Groups)?;
    let (socket, record, log) = whose.place.prepare().map_err(StartError::Place)?;
    let orders = plan.orders(whose, cgroups);
    let program = (plan.program.as_path(), MONITOR_VERB);
    launch::spawn(program, &orders, socket, record, log).map_err(StartError::Spawn)
}

/// Tells the monitor what to run; returns when the guest does.
pub(super) fn tell(whose: &Whose, client: &Client, plan: Plan) -> Result<(), StartError> {
    let kvm = open_kvm(Path::new("/dev/kvm")).map_err(StartError::Kvm)?;
    let mut overlays = Vec::new();
    for (number, disk) in plan.spec.disks.iter().enumerate() {
        let overlay = match disk.mode {
            DiskMode::Ro => None,
            DiskMode::Rw => {
                let overlay = whose.place.overlay(number);
                Some(overlay.map_err(|source| StartError::Disk { number, source })?)
            }
        };
        overlays.push(overlay);
    }
    let attached = match &plan.spec.net {
        None => None,
        Some(net) => whose.network.attach(whose.machine, &whose.place, net)?,
    };
    let vsock = whose.place.vsock().map_err(StartError::Place)?;
    let mut with = Outgoing::default();
    let mut disks = Vec::new();
    let parts = plan.spec.disks.iter().zip(&plan.disks).zip(&overlays);
    for (number, ((disk, image), overlay)) in parts.enumerate() {
        let writes = match overlay {
            None => Writes::Refused,
            Some(overlay) => Writes::Overlay {
                file: with.add(overlay.as_fd())?,
                base: image.digest.hex(),
                disk_bytes: disk.size.map(|size| size.get()),
            },
        };
        disks.push(DiskDescription {
            serial: format!("disk-{number}"),
            image: with.add(image.file.as_fd())?,
            writes,
            limits: rates(disk.limits),
        });
    }
    let origin = match &plan.begin {
        Begin::Boot { kernel, initrd } => Origin::Boot {
            vcpus: plan.spec.vcpus,
            memory_bytes: plan.spec.memory.get(),
            kernel: with.add(kernel.file.as_fd())?,
            initrd: match initrd {
                Some(image) => Some(with.add(image.file.as_fd())?),
                None => None,
            },
            command_line: plan.command_line(attached.as_ref().map(|attached| attached.wire)),
        },
        Begin::Saved { state, memory } => Origin::Snapshot {
            state: with.add(state.as_fd())?,
            memory: with.add(memory.as_fd())?,
        },
    };
    let net = match &attached {
        None => None,
        Some(Attached { tap, wire }) => Some(NetDescription {
            tap: with.add(tap.as_fd())?,
            mac: wire.mac(),
            ipv4: wire.machine(),
            limits: rates(plan.spec.net.as_ref().and_then(|net| net.limits)),
        }),
    };
    let machine = MachineDescription {
        kvm: with.add(kvm.as_fd())?,
        origin,
        disks,
        vsock: Some(with.add(vsock.as_fd())?),
        net,
    };
    let machine = Box::new(machine);
    client.order(&Request::Start { machine }, &with, START_PATIENCE)?;
    Ok(())
}

/// A rested device moves a second's worth at once.
fn rates(limits: Option<Throughput>) -> RateLimits {
    let limits = limits.unwrap_or_default();
    let rate = |per_second| Rate {
        per_second,
        burst: per_second,
    };
    let bytes = limits.bytes_per_second.map(insula_types::Bytes::get);
    RateLimits {
        bytes: bytes.and_then(NonZeroU64::new).map(rate),
        operations: limits.operations_per_second.map(rate),
    }
}

fn open_kvm(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_machine_has_a_user_of_its_own() {
        let user = |salt, id| user_of(salt, MachineId::new(id)).get();
        for salt in [0, 7, u32::MAX] {
            let mut users: Vec<_> = [1, 2, 3, 1_000_000].map(|id| user(salt, id)).into();
            let bounds = FIRST_USER..1 << 31;
            assert!(users.iter().all(|user| bounds.contains(user)), "{users:?}");
            users.dedup();
            assert_eq!(users.len(), 4);
        }
        assert_ne!(user(7, 1), user(8, 1), "another host's");
        assert_eq!(user(0, USERS), FIRST_USER);
    }
}
