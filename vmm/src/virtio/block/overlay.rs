//! A disk that reads from a base nobody writes to, and keeps what is written in a file of its own.
//!
//! ```text
//! overlay file:  header, 4 KiB │ bitmap, a bit for each 16 KiB │ data: the whole disk, sparse
//! ```
//!
//! A block whose bit is set is read from the overlay, at the same place that it has on the disk;
//! all others from the base, and as zeroes beyond the base's end. The file system's own sparseness
//! is the allocator: a block that was never written takes no room, and a discarded one gives its
//! room back.
//!
//! *Order.* The bitmap is kept in memory, and goes to the file on flush only: first the data is
//! made durable, then the bits are written and made durable. A monitor or host that dies between
//! leaves bits that are not set, and with them the disk of the last flush, which is what a disk
//! with a volatile cache may do. A bit is never durable before its block.

use std::fmt;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::SECTOR_BYTES;
use super::disk::{Access, Disk, fill_zero, narrow, punch, read, unsupported, write, zero};
use crate::memory::GuestMemory;
use crate::memory::vectors::{Segment, part};

const MAGIC: [u8; 8] = *b"INSULAOV";
const VERSION: u32 = 1;
const HEADER_BYTES: u64 = 4096;
const BLOCK_BYTES: u64 = 16 << 10;
/// The bitmap goes to the file in pieces of this size.
const PIECE_BYTES: usize = 4096;
/// 16 TiB: what ext4 holds in one file; the bitmap is 128 MiB then.
const DISK_MAX_BYTES: u64 = 16 << 40;

/// Names the base, so that an overlay is never put on another: the digest of its image.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct BaseId(pub [u8; 32]);

impl fmt::Debug for BaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0
            .iter()
            .take(6)
            .try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Why there is no such disk.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// Not an overlay, or of a later version.
    #[error("the file is no disk overlay that this version reads")]
    Format,
    /// Made for another disk.
    #[error("the overlay belongs to another base image, or to a disk of another size")]
    OtherBase,
    /// Not whole sectors, smaller than its base, or larger than can be.
    #[error("a disk of {disk} bytes over a base of {base} bytes")]
    Size {
        /// The disk.
        disk: u64,
        /// The base.
        base: u64,
    },
    /// One of the files.
    #[error(transparent)]
    File(#[from] io::Error),
}

/// The disk.
#[derive(Debug)]
pub struct Overlay {
    base: File,
    base_bytes: u64,
    file: File,
    disk_bytes: u64,
    bitmap: Bitmap,
}

impl Overlay {
    /// Opens an overlay, or makes a new one of an empty file. The disk has `disk_bytes`, or the
    /// base's size.
    ///
    /// # Errors
    /// The files do not belong together, or cannot be read.
    pub fn open(
        mut base: File,
        base_id: BaseId,
        mut file: File,
        disk_bytes: Option<u64>,
    ) -> Result<Self, OverlayError> {
        let base_bytes = base.seek(SeekFrom::End(0))?;
        let disk_bytes = disk_bytes.unwrap_or(base_bytes);
        let fits =
            disk_bytes >= base_bytes && (SECTOR_BYTES..=DISK_MAX_BYTES).contains(&disk_bytes);
        if !fits {
            let (disk, base) = (disk_bytes, base_bytes);
            return Err(OverlayError::Size { disk, base });
        }
        let header = header(base_id, disk_bytes);
        let mut bitmap = Bitmap::new(disk_bytes)?;
        let length = file.seek(SeekFrom::End(0))?;
        if length == 0 {
            let whole = bitmap.data_at().checked_add(disk_bytes);
            file.set_len(whole.ok_or(OverlayError::Format)?)?;
            file.write_all_at(&header, 0)?;
            file.sync_all()?;
        } else {
            let mut found = vec![0; header.len()];
            file.read_exact_at(&mut found, 0)
                .map_err(|_| OverlayError::Format)?;
            if found.get(..12) != header.get(..12) {
                return Err(OverlayError::Format);
            }
            if found != header {
                return Err(OverlayError::OtherBase);
            }
            file.read_exact_at(&mut bitmap.bits, HEADER_BYTES)
                .map_err(|_| OverlayError::Format)?;
        }
        Ok(Self {
            base,
            base_bytes,
            file,
            disk_bytes,
            bitmap,
        })
    }

    /// Where a byte of the disk is in the overlay file.
    fn place(&self, at: u64) -> u64 {
        self.bitmap.data_at() + at
    }

    /// Copies a block that is only in part written from the base, so that the rest of it is there
    /// when its bit is set.
    fn fill_block(&mut self, block: u64) -> io::Result<()> {
        let start = block * BLOCK_BYTES;
        let in_base = self.base_bytes.saturating_sub(start).min(BLOCK_BYTES);
        let mut bytes = vec![0; usize::try_from(in_base).map_err(io::Error::other)?];
        self.base.read_exact_at(&mut bytes, start)?;
        // The rest of the block is a hole, or what a write left there that was never flushed.
        zero(
            &self.file,
            self.place(start)..self.place(start + BLOCK_BYTES),
        )?;
        self.file.write_all_at(&bytes, self.place(start))
    }

    /// Makes the blocks at both ends of a range complete, as far as the range does not cover them.
    fn fill_ends(&mut self, range: &Range<u64>) -> io::Result<()> {
        let (first, last) = (range.start / BLOCK_BYTES, (range.end - 1) / BLOCK_BYTES);
        for block in if first == last {
            vec![first]
        } else {
            vec![first, last]
        } {
            let (start, end) = (block * BLOCK_BYTES, (block + 1) * BLOCK_BYTES);
            let covered = range.start <= start && range.end >= end.min(self.disk_bytes);
            if !covered && !self.bitmap.has(block) {
                self.fill_block(block)?;
                self.bitmap.set(block..block + 1);
            }
        }
        Ok(())
    }
}

impl Disk for Overlay {
    fn bytes(&self) -> u64 {
        self.disk_bytes
    }

    fn access(&self) -> Access {
        Access::ReadWrite
    }

    fn read(&mut self, memory: &GuestMemory, segments: &[Segment], at: u64) -> io::Result<()> {
        let end = at + bytes_of(segments);
        let mut from = at;
        while from < end {
            let (to, present) = self.bitmap.run(from, end);
            let piece = part(segments, narrow(from - at)?, narrow(to - from)?);
            if present {
                read(&self.file, memory, &piece, self.place(from))?;
            } else if from >= self.base_bytes {
                fill_zero(memory, &piece)?;
            } else {
                read(&self.base, memory, &piece, from)?;
            }
            from = to;
        }
        Ok(())
    }

    fn write(&mut self, memory: &GuestMemory, segments: &[Segment], at: u64) -> io::Result<()> {
        let range = at..at + bytes_of(segments);
        if range.is_empty() {
            return Ok(());
        }
        self.fill_ends(&range)?;
        write(&self.file, memory, segments, self.place(at))?;
        self.bitmap.set(blocks(&range));
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.sync_data()?;
        if self.bitmap.write(&self.file)? {
            self.file.sync_data()?;
        }
        Ok(())
    }

    fn discard(&mut self, range: Range<u64>) -> io::Result<()> {
        // Only whole blocks: what the rest reads as is not promised.
        let start = range.start.next_multiple_of(BLOCK_BYTES);
        let end = range.end / BLOCK_BYTES * BLOCK_BYTES;
        if start >= end {
            return Ok(());
        }
        match punch(&self.file, &(self.place(start)..self.place(end))) {
            Ok(()) => {
                self.bitmap.set(blocks(&(start..end)));
                Ok(())
            }
            Err(error) if unsupported(&error) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn zero(&mut self, range: Range<u64>) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        self.fill_ends(&range)?;
        zero(&self.file, self.place(range.start)..self.place(range.end))?;
        self.bitmap.set(blocks(&range));
        Ok(())
    }
}

impl Drop for Overlay {
    /// A machine that ends orderly keeps what it wrote, flushed by its guest or not.
    fn drop(&mut self) {
        let _ = self.flush();
    }
}

fn header(base: BaseId, disk_bytes: u64) -> Vec<u8> {
    let mut header = MAGIC.to_vec();
    header.extend(VERSION.to_le_bytes());
    header.extend(u32::try_from(BLOCK_BYTES).unwrap_or_default().to_le_bytes());
    header.extend(disk_bytes.to_le_bytes());
    header.extend(base.0);
    header
}

fn bytes_of(segments: &[Segment]) -> u64 {
    segments
        .iter()
        .map(|segment| u64::from(segment.bytes))
        .sum()
}

/// The blocks that a range touches.
fn blocks(range: &Range<u64>) -> Range<u64> {
    range.start / BLOCK_BYTES..range.end.div_ceil(BLOCK_BYTES)
}

/// Which blocks are in the overlay.
struct Bitmap {
    bits: Vec<u8>,
    /// For each piece, whether it is to be written.
    changed: Vec<bool>,
}

impl fmt::Debug for Bitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Bitmap({} blocks)", self.bits.len() * 8)
    }
}

impl Bitmap {
    fn new(disk_bytes: u64) -> Result<Self, OverlayError> {
        let blocks = disk_bytes.div_ceil(BLOCK_BYTES);
        let bytes = usize::try_from(blocks.div_ceil(8)).map_err(|_| OverlayError::Format)?;
        let bytes = bytes.next_multiple_of(PIECE_BYTES);
        Ok(Self {
            bits: vec![0; bytes],
            changed: vec![false; bytes / PIECE_BYTES],
        })
    }

    /// Where the data starts in the file.
    fn data_at(&self) -> u64 {
        let bytes = u64::try_from(self.bits.len()).unwrap_or(u64::MAX);
        HEADER_BYTES
            .saturating_add(bytes)
            .next_multiple_of(BLOCK_BYTES)
    }

    fn has(&self, block: u64) -> bool {
        let byte = usize::try_from(block / 8).ok();
        let byte = byte.and_then(|byte| self.bits.get(byte));
        byte.is_some_and(|byte| byte >> (block % 8) & 1 == 1)
    }

    fn set(&mut self, blocks: Range<u64>) {
        for block in blocks {
            let Ok(at) = usize::try_from(block / 8) else {
                return;
            };
            let Some(byte) = self.bits.get_mut(at) else {
                return;
            };
            let bit = 1 << (block % 8);
            if *byte & bit == 0 {
                *byte |= bit;
                if let Some(changed) = self.changed.get_mut(at / PIECE_BYTES) {
                    *changed = true;
                }
            }
        }
    }

    /// How far the bytes from `from` are all in the overlay, or all not, up to `end`.
    fn run(&self, from: u64, end: u64) -> (u64, bool) {
        let present = self.has(from / BLOCK_BYTES);
        let mut to = (from / BLOCK_BYTES + 1) * BLOCK_BYTES;
        while to < end && self.has(to / BLOCK_BYTES) == present {
            to += BLOCK_BYTES;
        }
        (to.min(end), present)
    }

    /// Writes what changed; `false` if nothing did.
    fn write(&mut self, file: &File) -> io::Result<bool> {
        let mut any = false;
        let pieces = self.bits.chunks(PIECE_BYTES).zip(&mut self.changed);
        for (number, (piece, changed)) in (0_u64..).zip(pieces) {
            if *changed {
                let at = HEADER_BYTES + number * u64::try_from(PIECE_BYTES).unwrap_or_default();
                file.write_all_at(piece, at)?;
                *changed = false;
                any = true;
            }
        }
        Ok(any)
    }
}
