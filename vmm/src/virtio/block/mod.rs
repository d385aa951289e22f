//! Block device (virtio 1.2, 5.2): a disk image, read and written straight from guest memory.
//!
//! ```text
//! chain: 16 bytes of header │ data ... │ 1 byte of status (the last that is writable)
//! ```
//!
//! Requests are served one after the other on the device's thread. What a request asks of the
//! disk beyond its end, or of a read-only disk, is an I/O error to the guest; a chain that has no
//! room for its status stops the device. An error of the image file is an I/O error to the guest
//! and is counted: the guest decides what to do about a failing disk.
//!
//! *Limits.* A request is charged when it is read, before anything is done; what its buckets do not
//! let through yet stays in the queue, and what comes after it, too. Zeroes are charged as what they
//! may have to be written as, a discard as one operation.
//!
//! *Durability.* With FLUSH accepted, writes go to the host's page cache and a flush makes all
//! that came before it durable. A driver that does not take FLUSH gets a disk that writes through
//! (5.2.6.2).

mod disk;
mod overlay;
mod request;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};

use super::config_space::ConfigSpace;
use super::device::{DeviceError, DeviceKind, Interest, QueueSpec, VirtioDevice};
use super::queue::{Chain, Queues, Served};
use super::throttle::Throttle;
use crate::memory::GuestMemory;
use crate::rate_limiter::RateLimits;

pub use disk::{Access, Disk, DiskError, RawDisk};
pub use overlay::{BaseId, Overlay, OverlayError};
use request::{Kind, Refusal, Request};

/// The unit in which virtio counts, whatever the block size.
pub(crate) const SECTOR_BYTES: u64 = 512;
const QUEUE_SIZE: u16 = 256;
/// Data segments of one request: the queue less header and status.
const SEGMENTS_MAX: u32 = 254;
/// Bytes of one segment.
const SEGMENT_BYTES: u32 = 64 << 10;
const HEADER_BYTES: u32 = 16;
const STATUS_BYTES: u32 = 1;

const QUEUES: [QueueSpec; 1] = [QueueSpec {
    max_size: QUEUE_SIZE,
    max_chain_bytes: SEGMENTS_MAX * SEGMENT_BYTES + HEADER_BYTES + STATUS_BYTES,
}];

/// What one discard may cover: it is one call to the file system for each range.
pub(crate) const DISCARD_SECTORS: u32 = 1 << 21;
/// What one request to write zeroes may cover: where the file system cannot, they are written.
pub(crate) const ZEROES_SECTORS: u32 = 1 << 16;
/// Ranges in one discard or one request for zeroes.
pub(crate) const RANGES_MAX: u32 = 16;

/// Status byte (5.2.6).
const STATUS_OK: u8 = 0;
const STATUS_IO_ERROR: u8 = 1;
const STATUS_UNSUPPORTED: u8 = 2;

/// What the guest finds as the disk's serial number: up to 20 printable bytes.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct SerialNumber([u8; 20]);

/// Not a serial number.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{given:?} is no disk serial number: up to 20 characters of printable ASCII")]
pub struct SerialNumberError {
    /// What was given.
    pub given: String,
}

impl FromStr for SerialNumber {
    type Err = SerialNumberError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut serial = Self::default();
        let printable = text.bytes().all(|byte| byte.is_ascii_graphic());
        match serial.0.get_mut(..text.len()) {
            Some(room) if printable => room.copy_from_slice(text.as_bytes()),
            _ => {
                let given = text.chars().take(40).collect();
                return Err(SerialNumberError { given });
            }
        }
        Ok(serial)
    }
}

impl fmt::Debug for SerialNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = self.0.split(|byte| *byte == 0).next().unwrap_or_default();
        write!(f, "{:?}", text.escape_ascii().to_string())
    }
}

/// What a disk did so far.
#[derive(Debug, Default)]
pub struct DiskCounts {
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
    requests: AtomicU64,
    errors: AtomicU64,
}

impl DiskCounts {
    /// Bytes read, bytes written, requests served, and requests of these that failed.
    #[must_use]
    pub fn read(&self) -> [u64; 4] {
        [
            &self.read_bytes,
            &self.written_bytes,
            &self.requests,
            &self.errors,
        ]
        .map(|count| count.load(Ordering::Relaxed))
    }
}

/// The device.
#[derive(Debug)]
pub struct Block {
    disk: Box<dyn Disk>,
    serial: SerialNumber,
    config: Arc<ConfigSpace>,
    counts: Arc<DiskCounts>,
    caching: Caching,
    throttle: Option<Throttle>,
}

/// Whether the driver sends flushes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Caching {
    WriteBack,
    WriteThrough,
}

impl Block {
    /// A device with this disk.
    #[must_use]
    pub fn new(disk: Box<dyn Disk>, serial: SerialNumber) -> Self {
        let config = Arc::new(ConfigSpace::new(config_space(disk.bytes()), 0..0));
        Self {
            disk,
            serial,
            config,
            counts: Arc::default(),
            caching: Caching::WriteThrough,
            throttle: None,
        }
    }

    /// The same device with limits of what it moves, reads and writes together.
    ///
    /// # Errors
    /// No descriptor is to be had.
    pub fn with_limits(mut self, limits: RateLimits) -> io::Result<Self> {
        self.throttle = Throttle::of(limits)?;
        Ok(self)
    }

    /// What it does, for whoever meters it.
    #[must_use]
    pub fn counts(&self) -> Arc<DiskCounts> {
        Arc::clone(&self.counts)
    }

    /// Serves one request, or leaves it for later.
    fn serve(&mut self, memory: &GuestMemory, chain: &Chain) -> Result<Served, DeviceError> {
        let Some(status_at) = chain.writable_bytes().checked_sub(STATUS_BYTES) else {
            return Err(DeviceError::Protocol(
                "a request without room for its status",
            ));
        };
        let request = Request::parse(memory, chain, self.disk.bytes());
        if let Some(throttle) = &mut self.throttle {
            let bytes = request.as_ref().map_or(0, Request::charged_bytes);
            if !throttle.admit(bytes)? {
                return Ok(Served::Later);
            }
        }
        let outcome = request.and_then(|request| self.perform(memory, &request));
        self.counts.requests.fetch_add(1, Ordering::Relaxed);
        let (status, written) = match outcome {
            Ok(written) => (STATUS_OK, written),
            Err(Refusal::Unsupported) => (STATUS_UNSUPPORTED, 0),
            Err(Refusal::Error) => (STATUS_IO_ERROR, 0),
        };
        if status != STATUS_OK {
            self.counts.errors.fetch_add(1, Ordering::Relaxed);
        }
        chain.write(memory, status_at, &[status])?;
        // The status comes last: where it was not all written, the driver may count on nothing
        // between.
        Ok(Served::Done(if written == status_at {
            written + 1
        } else {
            status_at + 1
        }))
    }

    fn perform(&mut self, memory: &GuestMemory, request: &Request) -> Result<u32, Refusal> {
        let disk = &mut self.disk;
        let writes = !matches!(
            request.kind,
            Kind::Read(_) | Kind::Flush | Kind::Identify(_)
        );
        if writes && disk.access() == Access::ReadOnly {
            return Err(Refusal::Error);
        }
        let mut returned = 0;
        match &request.kind {
            Kind::Read(segments) => {
                disk.read(memory, segments, request.at)?;
                self.counts
                    .read_bytes
                    .fetch_add(request.bytes, Ordering::Relaxed);
                returned = u32::try_from(request.bytes).unwrap_or(u32::MAX);
            }
            Kind::Write(segments) => {
                disk.write(memory, segments, request.at)?;
                self.counts
                    .written_bytes
                    .fetch_add(request.bytes, Ordering::Relaxed);
            }
            Kind::Flush => disk.flush()?,
            Kind::Discard(ranges) => {
                for range in ranges {
                    disk.discard(range.clone())?;
                }
            }
            Kind::Zeroes(ranges) => {
                for range in ranges {
                    disk.zero(range.clone())?;
                }
            }
            Kind::Identify(segments) => {
                returned = request::put(memory, segments, &self.serial.0)?;
            }
        }
        if writes && self.caching == Caching::WriteThrough {
            self.disk.flush()?;
        }
        Ok(returned)
    }
}

impl VirtioDevice for Block {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Block
    }

    fn features(&self) -> u64 {
        let mut bits = vec![
            VIRTIO_BLK_F_SIZE_MAX,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_FLUSH,
        ];
        match self.disk.access() {
            Access::ReadOnly => bits.push(VIRTIO_BLK_F_RO),
            Access::ReadWrite => bits.extend([VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]),
        }
        bits.iter().fold(0, |features, bit| features | 1 << bit)
    }

    fn queues(&self) -> &[QueueSpec] {
        &QUEUES
    }

    fn config(&self) -> &Arc<ConfigSpace> {
        &self.config
    }

    fn activate(&mut self, accepted: u64) -> Result<(), DeviceError> {
        self.caching = if accepted & 1 << VIRTIO_BLK_F_FLUSH == 0 {
            Caching::WriteThrough
        } else {
            Caching::WriteBack
        };
        Ok(())
    }

    fn queue_notified(&mut self, index: usize, queues: &mut Queues) -> Result<(), DeviceError> {
        // A notification is no reason to look sooner than the buckets said.
        if self.throttle.as_ref().is_some_and(Throttle::waits) {
            return Ok(());
        }
        queues.drain_until(index, |memory, chain| self.serve(memory, chain))?;
        Ok(())
    }

    fn interests<'d>(&'d self, into: &mut Vec<Interest<'d>>) {
        into.extend(self.throttle.as_ref().and_then(|it| it.interest(0)));
    }

    fn host_ready(&mut self, _token: u64, queues: &mut Queues) -> Result<(), DeviceError> {
        self.throttle.iter_mut().for_each(Throttle::go_on);
        self.queue_notified(0, queues)
    }

    fn reset(&mut self) {
        self.throttle.iter_mut().for_each(Throttle::go_on);
    }

    fn settle(&mut self) -> Result<(), DeviceError> {
        let what = "flushing the disk";
        let flushed = self.disk.flush();
        flushed.map_err(|source| DeviceError::Host { what, source })
    }
}

/// `struct virtio_blk_config` (5.2.4).
fn config_space(bytes: u64) -> Vec<u8> {
    let mut space = vec![0; 60];
    let mut put = |at: usize, value: u32| {
        if let Some(field) = space.get_mut(at..at + 4) {
            field.copy_from_slice(&value.to_le_bytes());
        }
    };
    put(8, SEGMENT_BYTES);
    put(12, SEGMENTS_MAX);
    put(20, 512);
    put(36, DISCARD_SECTORS);
    put(40, RANGES_MAX);
    put(44, 8);
    put(48, ZEROES_SECTORS);
    put(52, RANGES_MAX);
    // write_zeroes_may_unmap
    put(56, 1);
    let capacity = bytes / SECTOR_BYTES;
    if let Some(field) = space.first_chunk_mut() {
        *field = capacity.to_le_bytes();
    }
    space
}
