//! Reading a request, and checking all that it names.

use std::io;
use std::ops::Range;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::Bytes as _;

use super::{
    DISCARD_SECTORS, HEADER_BYTES, RANGES_MAX, SECTOR_BYTES, STATUS_BYTES, ZEROES_SECTORS,
};
use crate::memory::GuestMemory;
use crate::memory::vectors::{Segment, part};
use crate::virtio::queue::Chain;

/// Bytes of one range of a discard (5.2.6, `struct virtio_blk_discard_write_zeroes`).
const RANGE_BYTES: usize = 16;
/// Bit 0 of a range's flags: zeroes may be a hole. No other is defined.
const MAY_UNMAP: u32 = 1;

/// Why a request is not served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// VIRTIO_BLK_S_UNSUPP.
    Unsupported,
    /// VIRTIO_BLK_S_IOERR.
    Error,
}

impl From<io::Error> for Refusal {
    fn from(_: io::Error) -> Self {
        Self::Error
    }
}

/// What is asked for. All segments are guest memory, all ranges lie on the disk.
#[derive(Debug)]
pub(super) enum Kind {
    Read(Vec<Segment>),
    Write(Vec<Segment>),
    Flush,
    Discard(Vec<Range<u64>>),
    Zeroes(Vec<Range<u64>>),
    Identify(Vec<Segment>),
}

#[derive(Debug)]
pub(super) struct Request {
    pub(super) kind: Kind,
    /// First byte on the disk, where there is one.
    pub(super) at: u64,
    /// Length of the data.
    pub(super) bytes: u64,
}

impl Request {
    /// What it takes of a bucket for bytes.
    pub(super) fn charged_bytes(&self) -> u64 {
        match &self.kind {
            Kind::Zeroes(ranges) => ranges.iter().map(|range| range.end - range.start).sum(),
            _ => self.bytes,
        }
    }

    /// The chain is known to have room for the status.
    pub(super) fn parse(
        memory: &GuestMemory,
        chain: &Chain,
        disk_bytes: u64,
    ) -> Result<Self, Refusal> {
        let mut header = [0; HEADER_BYTES as usize];
        let read = chain.read(memory, 0, &mut header);
        if read.map_err(|_| Refusal::Error)? != header.len() {
            return Err(Refusal::Error);
        }
        let [a, b, c, d, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        let to_guest = chain.writable_bytes() - STATUS_BYTES;
        let from_guest = chain.readable_bytes() - HEADER_BYTES;
        let request = |kind, at, bytes| Ok(Self { kind, at, bytes });
        match u32::from_le_bytes([a, b, c, d]) {
            VIRTIO_BLK_T_IN => {
                let range = on_disk(sector, u64::from(to_guest), disk_bytes)?;
                let segments = part(chain.writable(), 0, to_guest);
                request(Kind::Read(segments), range.start, u64::from(to_guest))
            }
            VIRTIO_BLK_T_OUT => {
                let range = on_disk(sector, u64::from(from_guest), disk_bytes)?;
                let segments = part(chain.readable(), HEADER_BYTES, from_guest);
                request(Kind::Write(segments), range.start, u64::from(from_guest))
            }
            VIRTIO_BLK_T_FLUSH => request(Kind::Flush, 0, 0),
            VIRTIO_BLK_T_GET_ID => {
                request(Kind::Identify(part(chain.writable(), 0, to_guest)), 0, 0)
            }
            VIRTIO_BLK_T_DISCARD => {
                let ranges = ranges(memory, chain, disk_bytes, DISCARD_SECTORS, 0)?;
                request(Kind::Discard(ranges), 0, 0)
            }
            VIRTIO_BLK_T_WRITE_ZEROES => {
                let ranges = ranges(memory, chain, disk_bytes, ZEROES_SECTORS, MAY_UNMAP)?;
                request(Kind::Zeroes(ranges), 0, 0)
            }
            _ => Err(Refusal::Unsupported),
        }
    }
}

/// The bytes of the disk that a request names, if they are whole sectors of it.
fn on_disk(sector: u64, bytes: u64, disk_bytes: u64) -> Result<Range<u64>, Refusal> {
    let whole = bytes.is_multiple_of(SECTOR_BYTES);
    let start = sector.checked_mul(SECTOR_BYTES).ok_or(Refusal::Error)?;
    let end = start.checked_add(bytes).ok_or(Refusal::Error)?;
    // The last, incomplete sector of an image is not on the disk.
    let disk_end = disk_bytes / SECTOR_BYTES * SECTOR_BYTES;
    if whole && end <= disk_end {
        Ok(start..end)
    } else {
        Err(Refusal::Error)
    }
}

/// The ranges of a discard, or of a request for zeroes.
fn ranges(
    memory: &GuestMemory,
    chain: &Chain,
    disk_bytes: u64,
    sectors_max: u32,
    flags: u32,
) -> Result<Vec<Range<u64>>, Refusal> {
    let bytes = chain.readable_bytes() - HEADER_BYTES;
    let mut list = vec![0; bytes.min(RANGES_MAX * 16) as usize];
    let read = chain.read(memory, HEADER_BYTES, &mut list);
    let complete = read.map_err(|_| Refusal::Error)? == bytes as usize;
    if !complete || !list.len().is_multiple_of(RANGE_BYTES) {
        return Err(Refusal::Error);
    }
    let mut ranges = Vec::with_capacity(list.len() / RANGE_BYTES);
    let (entries, _) = list.as_chunks::<RANGE_BYTES>();
    for [sector @ .., a, b, c, d, e, f, g, h] in entries {
        let sectors = u32::from_le_bytes([*a, *b, *c, *d]);
        // 5.2.6.2: an unknown flag is unsupported; unmap is not for discards.
        if u32::from_le_bytes([*e, *f, *g, *h]) & !flags != 0 {
            return Err(Refusal::Unsupported);
        }
        if sectors > sectors_max {
            return Err(Refusal::Error);
        }
        let bytes = u64::from(sectors) * SECTOR_BYTES;
        ranges.push(on_disk(u64::from_le_bytes(*sector), bytes, disk_bytes)?);
    }
    Ok(ranges)
}

/// Copies to the guest what there is room for; returns how much.
pub(super) fn put(memory: &GuestMemory, segments: &[Segment], from: &[u8]) -> Result<u32, Refusal> {
    let most = u32::try_from(from.len()).unwrap_or(u32::MAX);
    let mut done = 0;
    for segment in part(segments, 0, most) {
        let bytes = from.get(done..done + segment.bytes as usize);
        let bytes = bytes.ok_or(Refusal::Error)?;
        let written = memory.write_slice(bytes, segment.address);
        written.map_err(|_| Refusal::Error)?;
        done += bytes.len();
    }
    u32::try_from(done).map_err(|_| Refusal::Error)
}
