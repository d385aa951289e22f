//! The rings, as a device uses them.
//!
//! A chain is walked once, when it is popped: each descriptor is checked and noted, and what the
//! device then works with is our own copy of addresses and lengths, which the driver cannot change
//! any more. What the addresses point to it can, and every access checks them anew.

use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes as _, GuestMemoryBackend};

use super::device::{DeviceError, QueueSpec};
use super::interrupt::Interrupt;
use crate::event::Event;
use crate::memory::GuestMemory;
use crate::memory::vectors::{Segment, Vectors, part};

/// What is wrong with a driver's rings. The device stops, the machine does not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// The available index went further than the queue is long, or the ring is not memory.
    #[error("queue {queue}: {reason}")]
    Ring {
        /// Which queue.
        queue: usize,
        /// In the words of the queue crate.
        reason: String,
    },
    /// A chain that has no end, leads out of its table, or exceeds 4 GiB.
    #[error("queue {queue}: the chain at descriptor {head} is broken")]
    Broken {
        /// Which queue.
        queue: usize,
        /// Where the chain starts.
        head: u16,
    },
    /// A readable descriptor after a writable one (virtio 1.2, 2.7.4.2).
    #[error("queue {queue}: the chain at descriptor {head} is readable after writable")]
    Order {
        /// Which queue.
        queue: usize,
        /// Where the chain starts.
        head: u16,
    },
    /// Longer than the device takes.
    #[error("queue {queue}: a chain of {bytes} bytes, where {max} are the most")]
    TooLong {
        /// Which queue.
        queue: usize,
        /// How long it is.
        bytes: u64,
        /// The device's limit.
        max: u32,
    },
    /// A buffer that is not wholly guest memory.
    #[error("queue {queue}: {bytes} bytes at {address:#x} are not memory")]
    NotMemory {
        /// Which queue.
        queue: usize,
        /// First address.
        address: u64,
        /// Length.
        bytes: u32,
    },
    /// The device has no such queue: a mistake of ours.
    #[error("there is no queue {queue}")]
    NoQueue {
        /// Which queue.
        queue: usize,
    },
}

/// One request of the driver: what it wrote for the device, and where the device may write.
#[derive(Debug, PartialEq, Eq)]
pub struct Chain {
    head: u16,
    readable: Vec<Segment>,
    writable: Vec<Segment>,
    readable_bytes: u32,
    writable_bytes: u32,
}

impl Chain {
    /// What the driver wrote for the device.
    #[must_use]
    pub fn readable(&self) -> &[Segment] {
        &self.readable
    }

    /// Where the device may write.
    #[must_use]
    pub fn writable(&self) -> &[Segment] {
        &self.writable
    }

    /// Sum of the readable segments.
    #[must_use]
    pub fn readable_bytes(&self) -> u32 {
        self.readable_bytes
    }

    /// Sum of the writable segments.
    #[must_use]
    pub fn writable_bytes(&self) -> u32 {
        self.writable_bytes
    }

    /// Copies from the readable part, from `offset` on. Returns how many bytes there were.
    ///
    /// # Errors
    /// The memory is not there, which cannot be for a chain that was popped from the same memory.
    pub fn read(
        &self,
        memory: &GuestMemory,
        offset: u32,
        into: &mut [u8],
    ) -> Result<usize, DeviceError> {
        let most = u32::try_from(into.len()).unwrap_or(u32::MAX);
        let mut done = 0;
        for segment in part(&self.readable, offset, most) {
            let Some(to) = into.get_mut(done..done + segment.bytes as usize) else {
                break;
            };
            memory.read_slice(to, segment.address).map_err(|_| GONE)?;
            done += to.len();
        }
        Ok(done)
    }

    /// Copies to the writable part, from `offset` on. Returns how many bytes there was room for.
    ///
    /// # Errors
    /// As for [`Chain::read`].
    pub fn write(
        &self,
        memory: &GuestMemory,
        offset: u32,
        from: &[u8],
    ) -> Result<usize, DeviceError> {
        let most = u32::try_from(from.len()).unwrap_or(u32::MAX);
        let mut done = 0;
        for segment in part(&self.writable, offset, most) {
            let Some(bytes) = from.get(done..done + segment.bytes as usize) else {
                break;
            };
            memory
                .write_slice(bytes, segment.address)
                .map_err(|_| GONE)?;
            done += bytes.len();
        }
        Ok(done)
    }

    /// Vectors over `bytes` of the readable part from `offset` on; less where there is less.
    ///
    /// # Errors
    /// As for [`Chain::read`].
    pub fn readable_vectors<'m>(
        &self,
        memory: &'m GuestMemory,
        offset: u32,
        bytes: u32,
    ) -> Result<Vectors<'m>, DeviceError> {
        Vectors::new(memory, &part(&self.readable, offset, bytes)).ok_or(GONE)
    }

    /// Vectors over `bytes` of the writable part from `offset` on; less where there is less.
    ///
    /// # Errors
    /// As for [`Chain::read`].
    pub fn writable_vectors<'m>(
        &self,
        memory: &'m GuestMemory,
        offset: u32,
        bytes: u32,
    ) -> Result<Vectors<'m>, DeviceError> {
        Vectors::new(memory, &part(&self.writable, offset, bytes)).ok_or(GONE)
    }
}

const GONE: DeviceError = DeviceError::Protocol("a buffer is no longer guest memory");

/// The queues of a live device, its memory and its interrupt.
#[derive(Debug)]
pub struct Queues {
    memory: GuestMemory,
    rings: Vec<Ring>,
    interrupt: Interrupt,
}

#[derive(Debug)]
pub(super) struct Ring {
    pub(super) queue: Queue,
    pub(super) spec: QueueSpec,
    /// What the driver's notifications arrive on; also how a device calls itself back.
    pub(super) notification: Event,
    /// Something was given back since the driver was last told, or not told as it wished.
    pub(super) pushed: bool,
}

impl Queues {
    pub(super) fn new(memory: GuestMemory, rings: Vec<Ring>, interrupt: Interrupt) -> Self {
        Self {
            memory,
            rings,
            interrupt,
        }
    }

    pub(super) fn rings(&self) -> &[Ring] {
        &self.rings
    }

    /// The machine's memory.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// For telling the driver of changes of the configuration space.
    #[must_use]
    pub fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// Whether the driver set this queue up at all.
    #[must_use]
    pub fn is_ready(&self, index: usize) -> bool {
        self.rings.get(index).is_some_and(|ring| ring.queue.ready())
    }

    /// The next request, if there is one.
    ///
    /// # Errors
    /// The driver broke the rules.
    pub fn pop(&mut self, index: usize) -> Result<Option<Chain>, QueueError> {
        let memory = &self.memory;
        let ring = ring_mut(&mut self.rings, index)?;
        if !ring.queue.ready() {
            return Ok(None);
        }
        let mut available = ring
            .queue
            .iter(memory)
            .map_err(|error| broken(index, &error))?;
        let Some(descriptors) = available.next() else {
            return Ok(None);
        };
        walk(memory, index, ring.spec, descriptors).map(Some)
    }

    /// Puts the request that was popped last back, as if it had not been taken.
    pub fn unpop(&mut self, index: usize, chain: Chain) {
        let Chain { .. } = chain;
        if let Ok(ring) = ring_mut(&mut self.rings, index) {
            let before = ring.queue.next_avail().wrapping_sub(1);
            ring.queue.set_next_avail(before);
        }
    }

    /// Gives a request back with `written` bytes in its writable part. The driver is told by
    /// [`Queues::notify`].
    ///
    /// # Errors
    /// The used ring is not memory.
    pub fn push(&mut self, index: usize, chain: Chain, written: u32) -> Result<(), QueueError> {
        let written = written.min(chain.writable_bytes);
        let memory = &self.memory;
        let ring = ring_mut(&mut self.rings, index)?;
        ring.pushed = true;
        ring.queue
            .add_used(memory, chain.head, written)
            .map_err(|error| broken(index, &error))
    }

    /// Interrupts the driver, if it wants to know of what was pushed since the last time.
    ///
    /// # Errors
    /// The rings are not memory.
    pub fn notify(&mut self, index: usize) -> Result<(), QueueError> {
        let memory = &self.memory;
        let ring = ring_mut(&mut self.rings, index)?;
        if !std::mem::take(&mut ring.pushed) {
            return Ok(());
        }
        let wanted = ring.queue.needs_notification(memory);
        if wanted.map_err(|error| broken(index, &error))? {
            self.interrupt.buffers_used();
        }
        Ok(())
    }

    /// Asks the driver to notify, or not to. With `true`, `true` comes back if requests came in
    /// before the driver can have seen this: then look again.
    ///
    /// # Errors
    /// The rings are not memory.
    pub fn want_notifications(&mut self, index: usize, want: bool) -> Result<bool, QueueError> {
        let memory = &self.memory;
        let ring = ring_mut(&mut self.rings, index)?;
        if !ring.queue.ready() {
            return Ok(false);
        }
        let more = if want {
            ring.queue.enable_notification(memory)
        } else {
            ring.queue.disable_notification(memory).map(|()| false)
        };
        more.map_err(|error| broken(index, &error))
    }

    /// Calls the device back for this queue, after all that is waiting now.
    pub fn call_back(&self, index: usize) {
        if let Some(ring) = self.rings.get(index) {
            ring.notification.raise();
        }
    }

    /// Serves what is in a queue, at most once its length: a driver that adds as fast as the
    /// device takes does not keep it from its other work, as the rest gets a turn of its own.
    /// `serve` returns how many bytes it wrote.
    ///
    /// # Errors
    /// The driver broke the rules, or `serve` did not succeed.
    pub fn drain(
        &mut self,
        index: usize,
        mut serve: impl FnMut(&GuestMemory, &Chain) -> Result<u32, DeviceError>,
    ) -> Result<(), DeviceError> {
        let served = |memory: &GuestMemory, chain: &Chain| serve(memory, chain).map(Served::Done);
        self.drain_until(index, served).map(|_| ())
    }

    /// The same with a `serve` that may leave a request in its queue. After that, which is what
    /// `true` says, the device has to come back for it on its own: the driver is not asked to
    /// notify.
    ///
    /// # Errors
    /// The driver broke the rules, or `serve` did not succeed.
    pub fn drain_until(
        &mut self,
        index: usize,
        mut serve: impl FnMut(&GuestMemory, &Chain) -> Result<Served, DeviceError>,
    ) -> Result<bool, DeviceError> {
        self.want_notifications(index, false)?;
        let most = ring_mut(&mut self.rings, index)?.queue.size();
        let mut left_one = false;
        for _ in 0..most {
            let Some(chain) = self.pop(index)? else { break };
            match serve(&self.memory, &chain)? {
                Served::Done(written) => self.push(index, chain, written)?,
                Served::Later => {
                    self.unpop(index, chain);
                    left_one = true;
                    break;
                }
            }
        }
        self.notify(index)?;
        if !left_one && self.want_notifications(index, true)? {
            self.call_back(index);
        }
        Ok(left_one)
    }
}

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    /// It is done, with this many bytes written for the driver.
    Done(u32),
    /// It stays where it was.
    Later,
}

fn ring_mut(rings: &mut [Ring], index: usize) -> Result<&mut Ring, QueueError> {
    rings
        .get_mut(index)
        .ok_or(QueueError::NoQueue { queue: index })
}

fn broken(queue: usize, error: &virtio_queue::Error) -> QueueError {
    QueueError::Ring {
        queue,
        reason: error.to_string(),
    }
}

/// Whether the rings lie where they may: what the transport asks before the driver goes live.
pub(super) fn is_valid(queue: &Queue, memory: &GuestMemory) -> bool {
    queue.is_valid(memory) && queue.avail_idx(memory, Ordering::Acquire).is_ok()
}

/// Notes and checks all descriptors of a chain.
fn walk(
    memory: &GuestMemory,
    queue: usize,
    spec: QueueSpec,
    descriptors: virtio_queue::DescriptorChain<&GuestMemory>,
) -> Result<Chain, QueueError> {
    let head = descriptors.head_index();
    let mut chain = Chain {
        head,
        readable: Vec::new(),
        writable: Vec::new(),
        readable_bytes: 0,
        writable_bytes: 0,
    };
    // The iterator ends early, without a word, where a chain is broken: then the last descriptor
    // that it gave says that there is another.
    let mut expects_more = true;
    let mut bytes = 0_u64;
    for descriptor in descriptors {
        expects_more = descriptor.has_next();
        bytes += u64::from(descriptor.len());
        if bytes > u64::from(spec.max_chain_bytes) {
            let max = spec.max_chain_bytes;
            return Err(QueueError::TooLong { queue, bytes, max });
        }
        let segment = Segment {
            address: descriptor.addr(),
            bytes: descriptor.len(),
        };
        check(memory, queue, segment)?;
        if descriptor.is_write_only() {
            chain.writable_bytes += segment.bytes;
            chain.writable.push(segment);
        } else if chain.writable.is_empty() {
            chain.readable_bytes += segment.bytes;
            chain.readable.push(segment);
        } else {
            return Err(QueueError::Order { queue, head });
        }
    }
    if expects_more {
        return Err(QueueError::Broken { queue, head });
    }
    Ok(chain)
}

fn check(memory: &GuestMemory, queue: usize, segment: Segment) -> Result<(), QueueError> {
    let length = usize::try_from(segment.bytes).unwrap_or(usize::MAX);
    if memory.check_range(segment.address, length) {
        return Ok(());
    }
    Err(QueueError::NotMemory {
        queue,
        address: segment.address.0,
        bytes: segment.bytes,
    })
}
