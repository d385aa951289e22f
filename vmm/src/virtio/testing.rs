//! A driver for tests of devices: it sets a device up over its registers as a guest does, and then
//! does what it is told, good or bad.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use vm_memory::{Bytes as _, GuestAddress};

use super::device::VirtioDevice;
use super::interrupt::InterruptLine;
use super::transport::MmioTransport;
use crate::event::Event;
use crate::memory::GuestMemory;
use crate::threads::Threads;

/// Descriptors in each queue, unless the device takes fewer.
const SIZE: u16 = 64;
/// Each queue has its rings in a piece of memory of its own.
const QUEUE_BYTES: u64 = 0x4000;
/// Buffers come after the queues.
const BUFFERS: u64 = 0x8_0000;
/// All of the test machine's memory.
pub(crate) const MEMORY_BYTES: u64 = 0x40_0000;

/// Flags of a descriptor (virtio 1.2, 2.7.5).
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

pub(crate) struct Driver {
    pub(crate) transport: MmioTransport,
    pub(crate) memory: GuestMemory,
    pub(crate) interrupt: Event,
    sizes: Vec<u16>,
    available: Vec<u16>,
    used: Vec<u16>,
    next_descriptor: Vec<u16>,
    next_buffer: u64,
}

/// Memory as the tests' machines have it.
pub(crate) fn memory() -> GuestMemory {
    let bytes = usize::try_from(MEMORY_BYTES).expect("it fits");
    GuestMemory::from_ranges(&[(GuestAddress(0), bytes)]).expect("memory")
}

impl Driver {
    /// A device that no driver has touched.
    pub(crate) fn cold(device: impl VirtioDevice + 'static) -> Self {
        let memory = memory();
        let interrupt = Event::new().expect("a descriptor");
        let line = InterruptLine::Irqfd(interrupt.try_clone().expect("a descriptor"));
        let specs = device.queues().to_vec();
        let threads = Threads::default();
        let transport = MmioTransport::new(Box::new(device), memory.clone(), line, &threads);
        Self {
            transport: transport.expect("a thread"),
            memory,
            interrupt,
            sizes: specs.iter().map(|spec| spec.max_size.min(SIZE)).collect(),
            available: vec![0; specs.len()],
            used: vec![0; specs.len()],
            next_descriptor: vec![0; specs.len()],
            next_buffer: BUFFERS,
        }
    }

    /// A device that is live with these features, beside VERSION_1.
    pub(crate) fn live(device: impl VirtioDevice + 'static, features: u64) -> Self {
        let mut driver = Self::cold(device);
        driver.set_up(features);
        driver
    }

    pub(crate) fn get(&self, register: u64) -> u32 {
        let mut value = [0; 4];
        self.transport.read(register, &mut value);
        u32::from_le_bytes(value)
    }

    pub(crate) fn set(&mut self, register: u64, value: u32) {
        self.transport.write(register, &value.to_le_bytes());
    }

    /// Through all steps to DRIVER_OK.
    pub(crate) fn set_up(&mut self, features: u64) {
        let features = features | 1 << VIRTIO_F_VERSION_1;
        self.set(0x70, 1);
        self.set(0x70, 3);
        for half in 0..2 {
            self.set(0x24, half);
            let value = u32::try_from(features >> (32 * half) & 0xffff_ffff).expect("a half");
            self.set(0x20, value);
        }
        self.set(0x70, 11);
        assert_eq!(self.get(0x70), 11, "features are accepted");
        for (queue, size) in self.sizes.clone().into_iter().enumerate() {
            let base = u32::try_from(Self::base(queue)).expect("low memory");
            self.set(0x30, u32::try_from(queue).expect("few queues"));
            self.set(0x38, u32::from(size));
            for (register, offset) in [(0x80, 0), (0x90, 0x1000), (0xa0, 0x2000)] {
                self.set(register, base + offset);
                self.set(register + 4, 0);
            }
            self.set(0x44, 1);
            assert_eq!(self.get(0x44), 1, "queue {queue} is ready");
        }
        self.set(0x70, 15);
        assert_eq!(self.get(0x70) & 15, 15, "the driver is live");
    }

    /// Resets the device, and forgets what was under way.
    pub(crate) fn reset(&mut self) {
        self.set(0x70, 0);
        assert_eq!(self.get(0x70), 0, "the device is reset");
        for queue in 0..self.sizes.len() {
            let zeroes = [0; 0x4000];
            self.memory
                .write_slice(&zeroes, GuestAddress(Self::base(queue)))
                .expect("memory");
        }
        self.available.fill(0);
        self.used.fill(0);
        self.next_descriptor.fill(0);
    }

    /// Buffers may be used anew.
    pub(crate) fn forget_buffers(&mut self) {
        self.next_buffer = BUFFERS;
    }

    pub(crate) fn base(queue: usize) -> u64 {
        0x1_0000 + u64::try_from(queue).expect("few queues") * QUEUE_BYTES
    }

    /// Room for a buffer.
    pub(crate) fn buffer(&mut self, bytes: u32) -> u64 {
        let at = self.next_buffer;
        self.next_buffer += u64::from(bytes).next_multiple_of(16);
        assert!(
            self.next_buffer <= MEMORY_BYTES,
            "the test needs more memory"
        );
        at
    }

    /// Writes one descriptor as it is told.
    pub(crate) fn descriptor(
        &self,
        queue: usize,
        index: u16,
        (address, bytes, flags, next): (u64, u32, u16, u16),
    ) {
        let at = Self::base(queue) + 16 * u64::from(index);
        self.raw_descriptor(at, (address, bytes, flags, next));
    }

    /// Writes a descriptor anywhere: into an indirect table.
    pub(crate) fn raw_descriptor(
        &self,
        at: u64,
        (address, bytes, flags, next): (u64, u32, u16, u16),
    ) {
        self.poke(at, &address.to_le_bytes());
        self.poke(at + 8, &bytes.to_le_bytes());
        self.poke(at + 12, &flags.to_le_bytes());
        self.poke(at + 14, &next.to_le_bytes());
    }

    pub(crate) fn poke(&self, at: u64, bytes: &[u8]) {
        self.memory
            .write_slice(bytes, GuestAddress(at))
            .expect("memory");
    }

    pub(crate) fn peek(&self, at: u64, bytes: usize) -> Vec<u8> {
        let mut seen = vec![0; bytes];
        self.memory
            .read_slice(&mut seen, GuestAddress(at))
            .expect("memory");
        seen
    }

    /// Makes a chain of what the device is to read and where it is to write, and offers it.
    /// Returns the addresses of the writable buffers. Descriptors are used in a circle, and the
    /// test must not have more under way than there are.
    pub(crate) fn offer(&mut self, queue: usize, readable: &[&[u8]], writable: &[u32]) -> Vec<u64> {
        let mut parts = Vec::new();
        for bytes in readable {
            let length = u32::try_from(bytes.len()).expect("a short buffer");
            let at = self.buffer(length);
            self.poke(at, bytes);
            parts.push((at, length, 0));
        }
        let mut room = Vec::new();
        for length in writable {
            let at = self.buffer(*length);
            room.push(at);
            parts.push((at, *length, WRITE));
        }
        let size = self.sizes[queue];
        let head = self.next_descriptor[queue];
        let count = parts.len();
        for (number, (at, length, flags)) in parts.into_iter().enumerate() {
            let index = self.next_descriptor[queue];
            let next = (index + 1) % size;
            self.next_descriptor[queue] = next;
            let more = if number + 1 < count { NEXT } else { 0 };
            self.descriptor(queue, index, (at, length, flags | more, next));
        }
        self.make_available(queue, head);
        room
    }

    /// Puts a head into the available ring.
    pub(crate) fn make_available(&mut self, queue: usize, head: u16) {
        let ring = Self::base(queue) + 0x1000;
        let slot = u64::from(self.available[queue] % self.sizes[queue]);
        self.poke(ring + 4 + 2 * slot, &head.to_le_bytes());
        self.available[queue] = self.available[queue].wrapping_add(1);
        let index = self.available[queue];
        self.memory
            .store(index, GuestAddress(ring + 2), Ordering::Release)
            .expect("memory");
    }

    /// Claims that the available ring has got to here.
    pub(crate) fn claim_available(&mut self, queue: usize, index: u16) {
        self.available[queue] = index;
        let at = GuestAddress(Self::base(queue) + 0x1000 + 2);
        self.memory
            .store(index, at, Ordering::Release)
            .expect("memory");
    }

    pub(crate) fn notify(&mut self, queue: usize) {
        self.set(0x50, u32::try_from(queue).expect("few queues"));
    }

    /// The next used element: head and bytes written.
    pub(crate) fn take_used(&mut self, queue: usize) -> Option<(u32, u32)> {
        let ring = Self::base(queue) + 0x2000;
        let index: u16 = self
            .memory
            .load(GuestAddress(ring + 2), Ordering::Acquire)
            .expect("memory");
        if index == self.used[queue] {
            return None;
        }
        let slot = u64::from(self.used[queue] % self.sizes[queue]);
        self.used[queue] = self.used[queue].wrapping_add(1);
        let element = self.peek(ring + 4 + 8 * slot, 8);
        let number = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().expect("four bytes"));
        Some((number(&element[..4]), number(&element[4..])))
    }

    /// Waits for it. Panics after ten seconds.
    pub(crate) fn wait_used(&mut self, queue: usize) -> (u32, u32) {
        let mut found = None;
        self.wait_until("a used buffer", |driver| {
            found = driver.take_used(queue);
            found.is_some()
        });
        found.expect("it was just found")
    }

    /// Waits until the device has stopped because of what the driver did, and says why.
    pub(crate) fn wait_broken(&mut self) -> String {
        self.wait_until("NEEDS_RESET", |driver| driver.get(0x70) & 64 != 0);
        self.transport.failures().1.expect("a reason")
    }

    pub(crate) fn wait_until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !done(self) {
            assert!(Instant::now() < deadline, "waiting for {what}");
            std::thread::yield_now();
        }
    }
}
