//! The registers of virtio-mmio, version 2 (virtio 1.2, 4.2.2).
//!
//! Lives behind a lock that vCPU threads share; nothing here waits for the device but a reset.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestAddress;

use super::config_space::ConfigSpace;
use super::device::{DeviceKind, DeviceState, QueueSpec, VirtioDevice};
use super::interrupt::{Interrupt, InterruptLine};
use super::queue;
use super::status::{Status, Step};
use super::worker::{Worker, WorkerError};
use crate::event::Event;
use crate::memory::GuestMemory;
use crate::threads::Threads;

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "INSU": who made the device; drivers do not care.
const VENDOR: u32 = 0x5553_4e49;
/// Where the device's configuration space starts.
const CONFIG: u64 = 0x100;

/// Offset of QueueNotify, where KVM may catch writes itself.
const QUEUE_NOTIFY: u64 = 0x50;

const RING_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// What the driver wrote of one queue, believed only when it is made ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
struct QueueRegisters {
    size: u16,
    ready: bool,
    descriptors: u64,
    driver: u64,
    device: u64,
}

/// One queue in a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedQueue {
    registers: QueueRegisters,
    next_available: u16,
    next_used: u16,
}

/// A device in a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    kind: u32,
    status: u32,
    offered: u64,
    accepted: u64,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u32,
    interrupt_status: u32,
    config: Vec<u8>,
    queues: Vec<SavedQueue>,
    device: Vec<u8>,
}

/// One device, as the guest sees it.
#[derive(Debug)]
pub struct MmioTransport {
    kind: DeviceKind,
    offered: u64,
    specs: Vec<QueueSpec>,
    config: Arc<ConfigSpace>,
    memory: GuestMemory,
    interrupt: Interrupt,
    worker: Worker,

    status: Status,
    accepted: u64,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u32,
    queues: Vec<QueueRegisters>,
}

impl MmioTransport {
    /// Starts the device's thread; the driver finds the device as after a reset.
    ///
    /// # Errors
    /// No thread or descriptor is to be had.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        line: InterruptLine,
        threads: &Threads,
    ) -> Result<Self, WorkerError> {
        let kind = device.kind();
        let offered = device.features() | RING_FEATURES;
        let specs = device.queues().to_vec();
        let config = Arc::clone(device.config());
        let interrupt = Interrupt::new(line);
        let worker = Worker::spawn(device, memory.clone(), interrupt.clone(), threads)?;
        let mut transport = Self {
            kind,
            offered,
            specs,
            config,
            memory,
            interrupt,
            worker,
            status: Status::default(),
            accepted: 0,
            device_features_select: 0,
            driver_features_select: 0,
            queue_select: 0,
            queues: Vec::new(),
        };
        transport.forget();
        Ok(transport)
    }

    /// What kind of device this is.
    #[must_use]
    pub fn kind(&self) -> DeviceKind {
        self.kind
    }

    /// For each queue the descriptor on which its notifications arrive.
    #[must_use]
    pub fn notifications(&self) -> &[Event] {
        self.worker.notifications()
    }

    /// Where the driver writes to notify, for a device whose registers start at `base`.
    pub(crate) fn notify_address(base: GuestAddress) -> GuestAddress {
        GuestAddress(base.0 + QUEUE_NOTIFY)
    }

    /// How often the device stopped because of its driver or its host side, and why it did last.
    #[must_use]
    pub fn failures(&self) -> (u64, Option<String>) {
        self.worker.health().failures()
    }

    /// The guest reads.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            self.config
                .read(usize::try_from(offset).unwrap_or(usize::MAX), data);
            return;
        }
        data.fill(0);
        // 4.2.2.2: all registers before the configuration are read and written as 32 bits.
        if let (Ok(data), 0) = (<&mut [u8; 4]>::try_from(data), offset % 4) {
            *data = self.register(offset).to_le_bytes();
        }
    }

    /// The guest writes.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG) {
            let may = self.status.has(Status::DRIVER) && !self.status.has(Status::FAILED);
            let offset = usize::try_from(offset).unwrap_or(usize::MAX);
            if may && self.config.write(offset, data) {
                self.worker.config_written();
            }
            return;
        }
        if let (Ok(data), 0) = (<[u8; 4]>::try_from(data), offset % 4) {
            self.set_register(offset, u32::from_le_bytes(data));
        }
    }

    fn register(&self, offset: u64) -> u32 {
        match offset {
            0x00 => MAGIC,
            0x04 => VERSION,
            0x08 => self.kind.id(),
            0x0c => VENDOR,
            0x10 => half(self.offered, self.device_features_select),
            0x34 => self
                .selected()
                .map_or(0, |(_, spec)| u32::from(spec.max_size)),
            0x44 => self
                .selected()
                .map_or(0, |(queue, _)| u32::from(queue.ready)),
            0x60 => self.interrupt.status(),
            0x70 => self.shown_status().bits(),
            // 4.2.2: the length of a shared memory region that does not exist is -1, and its
            // base is undefined.
            0xb0 | 0xb4 | 0xb8 | 0xbc => u32::MAX,
            0xfc => self.config.generation(),
            _ => 0,
        }
    }

    fn set_register(&mut self, offset: u64, value: u32) {
        match offset {
            0x14 => self.device_features_select = value,
            0x20 if self.status.negotiating() => {
                set_half(&mut self.accepted, self.driver_features_select, value);
            }
            0x24 => self.driver_features_select = value,
            0x30 => self.queue_select = value,
            0x44 => self.make_ready(value),
            QUEUE_NOTIFY => self.notify(value),
            0x64 => self.interrupt.acknowledge(value),
            0x70 => self.set_status(value),
            _ => self.set_queue(offset, value),
        }
    }

    /// Sizes and addresses: writable until the queue is ready, and never once the driver is live.
    fn set_queue(&mut self, offset: u64, value: u32) {
        if !self.status.configuring() {
            return;
        }
        let Some((queue, spec)) = self.selected_mut() else {
            return;
        };
        if queue.ready {
            return;
        }
        match offset {
            0x38 => {
                let size = u16::try_from(value).ok();
                let size = size.filter(|size| size.is_power_of_two() && *size <= spec.max_size);
                // A size that cannot be leaves the queue one that cannot be made ready.
                queue.size = size.unwrap_or(0);
            }
            0x80 => set_half(&mut queue.descriptors, 0, value),
            0x84 => set_half(&mut queue.descriptors, 1, value),
            0x90 => set_half(&mut queue.driver, 0, value),
            0x94 => set_half(&mut queue.driver, 1, value),
            0xa0 => set_half(&mut queue.device, 0, value),
            0xa4 => set_half(&mut queue.device, 1, value),
            _ => {}
        }
    }

    fn make_ready(&mut self, value: u32) {
        if !self.status.configuring() {
            return;
        }
        let event_index = self.event_index();
        let Some((registers, spec)) = self.selected() else {
            return;
        };
        let ready = value == 1 && build(&registers, spec, event_index, &self.memory).is_some();
        if let Some((registers, _)) = self.selected_mut() {
            registers.ready = ready;
        }
    }

    fn event_index(&self) -> EventIndex {
        if self.accepted & 1 << VIRTIO_RING_F_EVENT_IDX == 0 {
            EventIndex::Off
        } else {
            EventIndex::On
        }
    }

    /// Where KVM does not catch the write itself.
    fn notify(&self, queue: u32) {
        let queue = usize::try_from(queue).unwrap_or(usize::MAX);
        if let Some(notification) = self.worker.notifications().get(queue) {
            notification.raise();
        }
    }

    fn set_status(&mut self, written: u32) {
        match self.status.step(written) {
            Step::Reset => self.reset(),
            Step::FeaturesOk => {
                let version_1 = self.accepted & 1 << VIRTIO_F_VERSION_1 != 0;
                // 2.2.2: otherwise the bit stays clear, and the driver finds it so.
                if version_1 && self.accepted & !self.offered == 0 {
                    self.status = self.status.with(written & !Status::NEEDS_RESET);
                }
            }
            Step::DriverOk => {
                self.status = self.status.with(written & !Status::NEEDS_RESET);
                self.go_live(&[]);
            }
            Step::Noted => self.status = self.status.with(written & !Status::NEEDS_RESET),
            Step::Refused => {}
        }
    }

    /// Hands the queues to the worker, at the positions of a snapshot if there are any.
    fn go_live(&self, positions: &[SavedQueue]) {
        let mut queues = Vec::with_capacity(self.queues.len());
        for (index, (registers, spec)) in self.queues.iter().zip(&self.specs).enumerate() {
            let ready = registers
                .ready
                .then(|| build(registers, *spec, self.event_index(), &self.memory));
            // A queue that is not ready takes its place in the list, and gives nothing.
            let mut queue = match ready.flatten() {
                Some(queue) => queue,
                None => match Queue::new(spec.max_size) {
                    Ok(queue) => queue,
                    Err(_) => return,
                },
            };
            if let Some(saved) = positions.get(index) {
                queue.set_next_avail(saved.next_available);
                queue.set_next_used(saved.next_used);
            }
            queues.push(queue);
        }
        // If its thread is gone, the device shows NEEDS_RESET already.
        let _ = self.worker.activate(self.accepted, queues);
    }

    fn reset(&mut self) {
        // If its thread is gone, there is nothing that could go on.
        let _ = self.worker.reset();
        self.interrupt.acknowledge(u32::MAX);
        self.forget();
    }

    fn forget(&mut self) {
        self.status = Status::default();
        self.accepted = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.queue_select = 0;
        self.queues = self
            .specs
            .iter()
            .map(|spec| QueueRegisters {
                size: spec.max_size,
                ..QueueRegisters::default()
            })
            .collect();
    }

    fn shown_status(&self) -> Status {
        if self.worker.health().is_broken() {
            self.status.with(Status::NEEDS_RESET)
        } else {
            self.status
        }
    }

    fn selected(&self) -> Option<(QueueRegisters, QueueSpec)> {
        let index = usize::try_from(self.queue_select).ok()?;
        Some((*self.queues.get(index)?, *self.specs.get(index)?))
    }

    fn selected_mut(&mut self) -> Option<(&mut QueueRegisters, QueueSpec)> {
        let index = usize::try_from(self.queue_select).ok()?;
        Some((self.queues.get_mut(index)?, *self.specs.get(index)?))
    }
}

/// Life of the machine, as far as it concerns the device.
impl MmioTransport {
    /// Returns when the device is at rest. vCPUs must not run.
    ///
    /// # Errors
    /// The device's thread is gone.
    pub fn hold(&self) -> Result<(), WorkerError> {
        self.worker.hold()
    }

    /// The device works again.
    ///
    /// # Errors
    /// The device's thread is gone.
    pub fn release(&self) -> Result<(), WorkerError> {
        self.worker.release()
    }

    /// All of a device that [`hold`](Self::hold) brought to rest.
    ///
    /// # Errors
    /// The device's thread is gone.
    pub fn save(&self) -> Result<TransportState, WorkerError> {
        let worker = self.worker.save()?;
        let queues = self.queues.iter().enumerate().map(|(index, registers)| {
            let (next_available, next_used) =
                worker.positions.get(index).copied().unwrap_or((0, 0));
            SavedQueue {
                registers: *registers,
                next_available,
                next_used,
            }
        });
        Ok(TransportState {
            kind: self.kind.id(),
            status: self.shown_status().bits(),
            offered: self.offered,
            accepted: self.accepted,
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            queue_select: self.queue_select,
            interrupt_status: self.interrupt.status(),
            config: self.config.snapshot(),
            queues: queues.collect(),
            device: worker.device.0,
        })
    }

    /// Takes over a saved device of the same kind. A device that was broken comes back live, and
    /// breaks again at the same request.
    ///
    /// # Errors
    /// The state is of another device, or of one that cannot be.
    pub fn restore(&mut self, state: &TransportState) -> Result<(), RestoreError> {
        let status = Status::from_bits(state.status).ok_or(RestoreError::Impossible)?;
        let matches = state.kind == self.kind.id()
            && state.offered == self.offered
            && state.queues.len() == self.specs.len();
        if !matches {
            return Err(RestoreError::OtherDevice);
        }
        self.status = status.without_needs_reset();
        self.accepted = state.accepted;
        self.device_features_select = state.device_features_select;
        self.driver_features_select = state.driver_features_select;
        self.queue_select = state.queue_select;
        self.queues = state.queues.iter().map(|queue| queue.registers).collect();
        let config_differs = self.config.restore(&state.config);
        self.worker.restore(DeviceState(state.device.clone()))?;
        if self.status.live() {
            self.go_live(&state.queues);
        }
        self.interrupt.restore(state.interrupt_status);
        if config_differs && self.status.live() {
            self.interrupt.config_changed();
        }
        Ok(())
    }
}

/// Why a device was not restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// Other kind, features or queues.
    #[error("the snapshot holds another device here")]
    OtherDevice,
    /// A status that no driver can have come to.
    #[error("the snapshot's device status cannot be")]
    Impossible,
    /// Its thread.
    #[error(transparent)]
    Worker(#[from] WorkerError),
}

/// Whether both sides say up to where they want to be told (virtio 1.2, 2.7.7 and 2.7.8).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum EventIndex {
    On,
    Off,
}

/// The queue that these registers describe, if there can be one.
fn build(
    registers: &QueueRegisters,
    spec: QueueSpec,
    event_index: EventIndex,
    memory: &GuestMemory,
) -> Option<Queue> {
    let mut queue = Queue::new(spec.max_size).ok()?;
    queue.try_set_size(registers.size).ok()?;
    queue
        .try_set_desc_table_address(GuestAddress(registers.descriptors))
        .ok()?;
    queue
        .try_set_avail_ring_address(GuestAddress(registers.driver))
        .ok()?;
    queue
        .try_set_used_ring_address(GuestAddress(registers.device))
        .ok()?;
    queue.set_event_idx(event_index == EventIndex::On);
    queue.set_ready(true);
    queue::is_valid(&queue, memory).then_some(queue)
}

fn half(whole: u64, select: u32) -> u32 {
    let [low, high] = halves(whole);
    match select {
        0 => low,
        1 => high,
        _ => 0,
    }
}

fn set_half(whole: &mut u64, select: u32, value: u32) {
    let [low, high] = halves(*whole);
    *whole = match select {
        0 => u64::from(high) << 32 | u64::from(value),
        1 => u64::from(value) << 32 | u64::from(low),
        _ => *whole,
    };
}

fn halves(whole: u64) -> [u32; 2] {
    let bytes = whole.to_le_bytes();
    let [a, b, c, d, e, f, g, h] = bytes;
    [
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
    ]
}
