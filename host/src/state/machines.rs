//! Machines and images as callers of the [`Store`](super::Store) see them.
//!
//! A machine's spec names images; what the names stood for when the spec was put is kept beside it,
//! so that an image that is replaced under its name changes no machine.

use insula_types::{Digest, ImageName, MachineId, MachineName, MachineSpec, TenantId, TenantName};
use insula_vmm::life::State;

use super::{Deleted, Listed, Page, Precondition, Put, StoreError, Timestamp};

/// Most machines of one tenant.
pub const MACHINES_PER_TENANT_MAX: u64 = 1_000;
/// Most images of one host.
pub const IMAGES_MAX: u64 = 1_000;

/// An image as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Unique.
    pub name: ImageName,
    /// Its content.
    pub digest: Digest,
    /// Its size.
    pub size_bytes: u64,
    /// Rises with each change of the content.
    pub generation: u64,
    /// When it was created.
    pub created: Timestamp,
}

/// Content that an image is to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PinnedImage {
    /// Its content.
    pub digest: Digest,
    /// Its size.
    pub size_bytes: u64,
}

/// The content of all images of a machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineImages {
    /// What it boots.
    pub kernel: Digest,
    /// Its initial ramdisk.
    pub initrd: Option<Digest>,
    /// One for each disk.
    pub disks: Vec<Digest>,
}

impl MachineImages {
    /// In one list: kernel, initrd if there is one, disks.
    #[must_use]
    pub fn list(&self) -> Vec<Digest> {
        let mut all = vec![self.kernel];
        all.extend(self.initrd);
        all.extend(&self.disks);
        all
    }

    /// The reverse of [`list`](Self::list), for the spec that it belongs to.
    #[must_use]
    pub fn from_list(spec: &MachineSpec, list: Vec<Digest>) -> Option<Self> {
        let mut list = list.into_iter();
        let kernel = list.next()?;
        let initrd = match &spec.initrd {
            Some(_) => Some(list.next()?),
            None => None,
        };
        let disks: Vec<_> = list.collect();
        (disks.len() == spec.disks.len()).then_some(Self {
            kernel,
            initrd,
            disks,
        })
    }
}

/// A machine as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Machine {
    /// Never used twice.
    pub id: MachineId,
    /// Whose.
    pub tenant: TenantId,
    /// Whose, by name.
    pub tenant_name: TenantName,
    /// Unique within the tenant.
    pub name: MachineName,
    /// Processors, memory, images.
    pub spec: MachineSpec,
    /// What the spec's images are.
    pub images: MachineImages,
    /// Where it was in its life when that was last stored.
    pub life: State,
    /// Rises with each change of the spec.
    pub generation: u64,
    /// When it was created.
    pub created: Timestamp,
}

/// What all machines of a tenant used, as sums that only grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MachineTotals {
    /// CPU time of guests and monitors, in nanoseconds.
    pub cpu_ns: u64,
    /// Time in which they were ready to run and waited for a processor.
    pub wait_ns: u64,
    /// Time in which a limit held them back.
    pub throttled_ns: u64,
    /// Integral of guest memory over time. Guest memory is whole pages, so that nothing is rounded.
    pub memory_kib_ms: u64,
    /// Read from disks.
    pub disk_read_bytes: u64,
    /// Written to disks.
    pub disk_written_bytes: u64,
    /// Received from networks.
    pub net_received_bytes: u64,
    /// Sent to networks.
    pub net_sent_bytes: u64,
}

impl MachineTotals {
    /// All of them, in the order of the table's columns.
    #[must_use]
    pub const fn numbers(&self) -> [u64; 8] {
        [
            self.cpu_ns,
            self.wait_ns,
            self.throttled_ns,
            self.memory_kib_ms,
            self.disk_read_bytes,
            self.disk_written_bytes,
            self.net_received_bytes,
            self.net_sent_bytes,
        ]
    }

    /// The reverse of [`numbers`](Self::numbers).
    #[must_use]
    pub const fn from_numbers(numbers: [u64; 8]) -> Self {
        let [cpu, wait, throttled, memory, read, written, received, sent] = numbers;
        Self {
            cpu_ns: cpu,
            wait_ns: wait,
            throttled_ns: throttled,
            memory_kib_ms: memory,
            disk_read_bytes: read,
            disk_written_bytes: written,
            net_received_bytes: received,
            net_sent_bytes: sent,
        }
    }

    /// Adds another sum. Stays at the largest value instead of going round.
    pub fn add(&mut self, other: &Self) {
        let (mut sums, parts) = (self.numbers(), other.numbers());
        for (sum, part) in sums.iter_mut().zip(parts) {
            *sum = sum.saturating_add(part);
        }
        *self = Self::from_numbers(sums);
    }
}

/// The part of a [`Store`](super::Store) that is about machines and images; the same promises hold.
#[expect(clippy::missing_errors_doc, reason = "said once for all, at Store")]
pub trait MachineStore {
    /// Images by name.
    fn images(&mut self, page: &Page) -> Result<Listed<Image>, StoreError>;
    /// One image.
    fn image(&mut self, name: &ImageName) -> Result<Image, StoreError>;
    /// Gives an image its content; also answers what nothing refers to any more.
    fn put_image(
        &mut self,
        name: &ImageName,
        image: PinnedImage,
        precondition: Precondition,
        now: Timestamp,
    ) -> Result<(Put<Image>, Vec<Digest>), StoreError>;
    /// Deletes an image. Machines that were made with it keep its content.
    fn delete_image(
        &mut self,
        name: &ImageName,
        precondition: Precondition,
    ) -> Result<Deleted<Image>, StoreError>;

    /// A tenant's machines by name.
    fn machines(&mut self, tenant: &TenantName, page: &Page)
    -> Result<Listed<Machine>, StoreError>;
    /// Every machine there is.
    fn all_machines(&mut self) -> Result<Vec<Machine>, StoreError>;
    /// One machine.
    fn machine(&mut self, tenant: &TenantName, name: &MachineName) -> Result<Machine, StoreError>;
    /// The machine with this id.
    fn machine_by_id(&mut self, id: MachineId) -> Result<Machine, StoreError>;
    /// Creates a machine or replaces its spec, with the content that its images have now.
    fn put_machine(
        &mut self,
        tenant: &TenantName,
        name: &MachineName,
        spec: &MachineSpec,
        precondition: Precondition,
        now: Timestamp,
    ) -> Result<Put<Machine>, StoreError>;
    /// Notes where a machine is in its life.
    fn set_machine_life(&mut self, id: MachineId, life: &State) -> Result<(), StoreError>;
    /// Deletes a machine.
    fn delete_machine(
        &mut self,
        tenant: &TenantName,
        name: &MachineName,
        precondition: Precondition,
    ) -> Result<Deleted<Machine>, StoreError>;

    /// What tenants' machines used.
    fn machine_usage(&mut self) -> Result<Vec<(TenantId, MachineTotals)>, StoreError>;
    /// Adds to it. What a deleted tenant's machines used is forgotten.
    fn add_machine_usage(&mut self, parts: &[(TenantId, MachineTotals)]) -> Result<(), StoreError>;
}
