//! What a disk's bytes are kept in.

use std::fmt;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, fallocate};
use vm_memory::Bytes as _;

use super::SECTOR_BYTES;
use crate::memory::GuestMemory;
use crate::memory::vectors::{Segment, Vectors, part};

/// Whether a guest may write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// It may only read.
    ReadOnly,
    /// It may write as well.
    ReadWrite,
}

/// Why an image is no disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// Less than a sector.
    #[error("a disk image of {bytes} bytes: a disk has at least {SECTOR_BYTES}")]
    Small {
        /// Its size.
        bytes: u64,
    },
    /// Its size cannot be found out.
    #[error("looking at the disk image: {0}")]
    Look(#[from] io::Error),
}

/// Where a disk's bytes are. Ranges were checked to lie on the disk; segments to be guest memory.
pub trait Disk: Send + fmt::Debug {
    /// Size; what is beyond the last whole sector is not on the disk.
    fn bytes(&self) -> u64;

    /// Whether the guest may write.
    fn access(&self) -> Access;

    /// Fills the segments from `at` on.
    ///
    /// # Errors
    /// The image's; the segments may be filled in part.
    fn read(&mut self, memory: &GuestMemory, segments: &[Segment], at: u64) -> io::Result<()>;

    /// Writes the segments from `at` on.
    ///
    /// # Errors
    /// The image's; they may be written in part.
    fn write(&mut self, memory: &GuestMemory, segments: &[Segment], at: u64) -> io::Result<()>;

    /// Makes all that was written durable.
    ///
    /// # Errors
    /// The image's; what was written since the last flush may be lost.
    fn flush(&mut self) -> io::Result<()>;

    /// The guest no longer needs these bytes: what they read as is not promised.
    ///
    /// # Errors
    /// The image's.
    fn discard(&mut self, range: Range<u64>) -> io::Result<()>;

    /// These bytes read as zeroes from now on.
    ///
    /// # Errors
    /// The image's.
    fn zero(&mut self, range: Range<u64>) -> io::Result<()>;
}

/// An image file, or a block device of the host, byte for byte.
#[derive(Debug)]
pub struct RawDisk {
    file: File,
    bytes: u64,
    access: Access,
}

impl RawDisk {
    /// Takes the file as it is open; its size is the disk's.
    ///
    /// # Errors
    /// It is too small, or its size cannot be found out.
    pub fn new(mut file: File, access: Access) -> Result<Self, DiskError> {
        let bytes = file.seek(SeekFrom::End(0))?;
        if bytes < SECTOR_BYTES {
            return Err(DiskError::Small { bytes });
        }
        Ok(Self {
            file,
            bytes,
            access,
        })
    }
}

impl Disk for RawDisk {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn access(&self) -> Access {
        self.access
    }

    fn read(&mut self, memory: &GuestMemory, segments: &[Segment], at: u64) -> io::Result<()> {
        read(&self.file, memory, segments, at)
    }

    fn write(&mut self, memory: &GuestMemory, segments: &[Segment], at: u64) -> io::Result<()> {
        write(&self.file, memory, segments, at)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn discard(&mut self, range: Range<u64>) -> io::Result<()> {
        match punch(&self.file, &range) {
            // Then the bytes stay what they are, which keeps every promise.
            Err(error) if unsupported(&error) => Ok(()),
            other => other,
        }
    }

    fn zero(&mut self, range: Range<u64>) -> io::Result<()> {
        zero(&self.file, range)
    }
}

/// Fills segments from a file; beyond its end there are zeroes.
pub(super) fn read(
    file: &File,
    memory: &GuestMemory,
    segments: &[Segment],
    at: u64,
) -> io::Result<()> {
    let mut vectors = vectors(memory, segments)?;
    let wanted = vectors.bytes();
    let done = vectors.read_at(file, at)?;
    if done < wanted {
        let (done, left) = (narrow(done)?, narrow(wanted - done)?);
        fill_zero(memory, &part(segments, done, left))?;
    }
    Ok(())
}

/// Fills segments with zeroes.
pub(super) fn fill_zero(memory: &GuestMemory, segments: &[Segment]) -> io::Result<()> {
    let zeroes = [0; 4096];
    for segment in segments {
        let mut address = segment.address;
        let mut left = segment.bytes as usize;
        while left > 0 {
            let some = left.min(zeroes.len());
            let written = memory.write_slice(&zeroes[..some], address);
            written.map_err(io::Error::other)?;
            address.0 += u64::try_from(some).map_err(io::Error::other)?;
            left -= some;
        }
    }
    Ok(())
}

/// Writes segments to a file; a file that takes no more is an error.
pub(super) fn write(
    file: &File,
    memory: &GuestMemory,
    segments: &[Segment],
    at: u64,
) -> io::Result<()> {
    let mut vectors = vectors(memory, segments)?;
    let wanted = vectors.bytes();
    if vectors.write_at(file, at)? == wanted {
        Ok(())
    } else {
        Err(io::ErrorKind::WriteZero.into())
    }
}

fn vectors<'m>(memory: &'m GuestMemory, segments: &[Segment]) -> io::Result<Vectors<'m>> {
    Vectors::new(memory, segments).ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

pub(super) fn narrow(bytes: u64) -> io::Result<u32> {
    u32::try_from(bytes).map_err(io::Error::other)
}

/// Makes a hole, which reads as zeroes.
pub(super) fn punch(file: &File, range: &Range<u64>) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let bytes = range.end.saturating_sub(range.start);
    if bytes == 0 {
        return Ok(());
    }
    fallocate(file, flags, range.start, bytes).map_err(io::Error::from)
}

pub(super) fn unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EPERM)
    )
}

/// Makes a hole, or writes zeroes where the file system knows no holes.
pub(super) fn zero(file: &File, range: Range<u64>) -> io::Result<()> {
    match punch(file, &range) {
        Err(error) if unsupported(&error) => {}
        other => return other,
    }
    let zeroes = vec![0; 64 << 10];
    let mut at = range.start;
    while at < range.end {
        let some = usize::try_from(range.end - at).unwrap_or(usize::MAX);
        let some = some.min(zeroes.len());
        file.write_all_at(&zeroes[..some], at)?;
        at += u64::try_from(some).map_err(io::Error::other)?;
    }
    Ok(())
}
