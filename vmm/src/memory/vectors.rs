//! Reading and writing files straight from and to guest memory, in one system call per request.
#![allow(
    unsafe_code,
    reason = "vectors of guest memory for preadv, pwritev, readv and writev"
)]

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd};

use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::GuestMemory;

/// `IOV_MAX` of Linux: a call takes no more vectors.
const VECTORS_MAX: usize = 1024;

/// A piece of guest memory as a guest's descriptor names it. It has been checked to be memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// First address.
    pub address: GuestAddress,
    /// Length.
    pub bytes: u32,
}

/// `bytes` of the segments, from `offset` on.
#[must_use]
pub fn part(segments: &[Segment], offset: u32, bytes: u32) -> Vec<Segment> {
    let (mut skip, mut left) = (offset, bytes);
    let mut taken = Vec::with_capacity(segments.len());
    for segment in segments {
        if skip >= segment.bytes {
            skip -= segment.bytes;
            continue;
        }
        let take = (segment.bytes - skip).min(left);
        if take == 0 {
            break;
        }
        taken.push(Segment {
            // Cannot pass the end of memory: the whole segment was checked to lie in it.
            address: GuestAddress(segment.address.0.saturating_add(u64::from(skip))),
            bytes: take,
        });
        skip = 0;
        left -= take;
    }
    taken
}

/// Pointers to pieces of guest memory, valid as long as the memory is borrowed.
#[derive(Debug)]
pub struct Vectors<'m> {
    list: Vec<libc::iovec>,
    bytes: u64,
    memory: PhantomData<&'m GuestMemory>,
}

impl<'m> Vectors<'m> {
    /// `None` if a segment is not wholly guest memory.
    #[must_use]
    pub fn new(memory: &'m GuestMemory, segments: &[Segment]) -> Option<Self> {
        let mut list = Vec::with_capacity(segments.len());
        let mut bytes = 0_u64;
        for segment in segments {
            let length = usize::try_from(segment.bytes).ok()?;
            for slice in memory.get_slices(segment.address, length) {
                let slice = slice.ok()?;
                bytes = bytes.checked_add(u64::try_from(slice.len()).ok()?)?;
                list.push(libc::iovec {
                    iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                    iov_len: slice.len(),
                });
            }
        }
        Some(Self {
            list,
            bytes,
            memory: PhantomData,
        })
    }

    /// Sum of all lengths.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Fills the vectors from a file, as many bytes as they hold or the file has from `offset`.
    /// Returns how many.
    ///
    /// # Errors
    /// The first that the kernel gives; part of the memory may be filled by then.
    pub fn read_at(&mut self, file: impl AsFd, offset: u64) -> io::Result<u64> {
        let file = file.as_fd().as_raw_fd();
        self.each_call(|list, count, done| {
            let at = position(offset, done)?;
            // SAFETY: `list` points to `count` vectors, each of which lies in guest memory that is
            // mapped writable while `'m` is borrowed. The memory is only read as volatile bytes.
            Ok(unsafe { libc::preadv(file, list, count, at) })
        })
    }

    /// Writes all bytes of the vectors to a file from `offset`. Returns how many: less than all
    /// only where the file takes no more.
    ///
    /// # Errors
    /// The first that the kernel gives; part of the bytes may be written by then.
    pub fn write_at(&mut self, file: impl AsFd, offset: u64) -> io::Result<u64> {
        let file = file.as_fd().as_raw_fd();
        self.each_call(|list, count, done| {
            let at = position(offset, done)?;
            // SAFETY: as in `read_at`; the kernel only reads the memory. What it reads may change
            // while it does, which changes what the guest finds on its disk and nothing else.
            Ok(unsafe { libc::pwritev(file, list, count, at) })
        })
    }

    /// One `readv`: a packet from a tap, or what a stream has. Returns how many bytes.
    ///
    /// # Errors
    /// The kernel's, `WouldBlock` among them; also more vectors than one call takes.
    pub fn read(&mut self, file: impl AsFd) -> io::Result<u64> {
        let count = self.one_call()?;
        // SAFETY: as in `read_at`.
        result(unsafe { libc::readv(file.as_fd().as_raw_fd(), self.list.as_ptr(), count) })
    }

    /// One `writev`: a packet to a tap, or what a stream takes. Returns how many bytes.
    ///
    /// # Errors
    /// The kernel's, `WouldBlock` among them; also more vectors than one call takes.
    pub fn write(&mut self, file: impl AsFd) -> io::Result<u64> {
        let count = self.one_call()?;
        // SAFETY: as in `write_at`.
        result(unsafe { libc::writev(file.as_fd().as_raw_fd(), self.list.as_ptr(), count) })
    }

    /// One `writev` of bytes of our own and then the vectors: a packet whose head was looked at,
    /// and must go out as it was seen. Returns how many bytes.
    ///
    /// # Errors
    /// As for [`Vectors::write`].
    pub fn write_after(&self, head: &[u8], file: impl AsFd) -> io::Result<u64> {
        let mut list = Vec::with_capacity(self.list.len() + 1);
        list.push(libc::iovec {
            iov_base: head.as_ptr().cast_mut().cast(),
            iov_len: head.len(),
        });
        list.extend(&self.list);
        if list.len() > VECTORS_MAX {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let count = count(list.len())?;
        // SAFETY: as in `write_at`; `head` is borrowed until the call returns, and only read.
        result(unsafe { libc::writev(file.as_fd().as_raw_fd(), list.as_ptr(), count) })
    }

    fn one_call(&self) -> io::Result<libc::c_int> {
        if self.list.len() > VECTORS_MAX {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        count(self.list.len())
    }

    /// Calls until all vectors are done, or the file is at its end.
    fn each_call(
        &mut self,
        mut call: impl FnMut(*const libc::iovec, libc::c_int, u64) -> io::Result<libc::ssize_t>,
    ) -> io::Result<u64> {
        let mut done = 0_u64;
        let mut next = 0;
        while next < self.list.len() {
            let some = (self.list.len() - next).min(VECTORS_MAX);
            let moved = match call(self.list[next..].as_ptr(), count(some)?, done).map(result)? {
                Ok(0) => break,
                Ok(moved) => moved,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            done += moved;
            next = self.advance(next, moved);
        }
        Ok(done)
    }

    /// Takes `moved` bytes off the vectors from `next` on; returns the first that is not done.
    fn advance(&mut self, mut next: usize, moved: u64) -> usize {
        let mut left = usize::try_from(moved).unwrap_or(usize::MAX);
        while let Some(vector) = self.list.get_mut(next) {
            if left < vector.iov_len {
                vector.iov_base = vector.iov_base.cast::<u8>().wrapping_add(left).cast();
                vector.iov_len -= left;
                break;
            }
            left -= vector.iov_len;
            next += 1;
        }
        next
    }
}

fn count(vectors: usize) -> io::Result<libc::c_int> {
    libc::c_int::try_from(vectors).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn position(offset: u64, done: u64) -> io::Result<libc::off_t> {
    let at = offset.checked_add(done);
    at.and_then(|at| libc::off_t::try_from(at).ok())
        .ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

fn result(returned: libc::ssize_t) -> io::Result<u64> {
    u64::try_from(returned).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use vm_memory::Bytes as _;

    fn segment(address: u64, bytes: u32) -> Segment {
        Segment {
            address: GuestAddress(address),
            bytes,
        }
    }

    #[test]
    fn scattered_reads_and_gathered_writes_keep_their_order() {
        let ranges = [(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000)];
        let memory = GuestMemory::from_ranges(&ranges).expect("memory");
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(b"..abcdefghij").expect("written");
        // The second segment crosses from one region into the next.
        let segments = [segment(0x10, 3), segment(0xffe, 4), segment(0x1f00, 100)];
        let mut vectors = Vectors::new(&memory, &segments).expect("memory");
        assert_eq!(vectors.bytes(), 107);
        assert_eq!(vectors.read_at(&file, 2).expect("read"), 10);
        let mut seen = [0; 4];
        memory
            .read_slice(&mut seen, GuestAddress(0xffe))
            .expect("in range");
        assert_eq!(&seen, b"defg");

        let out = tempfile::tempfile().expect("a file");
        let segments = [segment(0xffe, 4), segment(0x10, 3)];
        let mut vectors = Vectors::new(&memory, &segments).expect("memory");
        assert_eq!(vectors.write_at(&out, 0).expect("written"), 7);
        let mut written = String::new();
        (&out).read_to_string(&mut written).expect("text");
        assert_eq!(written, "defgabc");
    }

    #[test]
    fn more_vectors_than_one_call_takes() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x1000)]).expect("memory");
        memory
            .write_slice(&[9; 0x1000], GuestAddress(0))
            .expect("in range");
        let segments = vec![segment(0, 3); VECTORS_MAX + 7];
        let file = tempfile::tempfile().expect("a file");
        let mut vectors = Vectors::new(&memory, &segments).expect("memory");
        let written = vectors.write_at(&file, 5).expect("written");
        assert_eq!(written, 3 * (VECTORS_MAX as u64 + 7));
        assert_eq!(file.metadata().expect("metadata").len(), written + 5);
        Vectors::new(&memory, &segments)
            .expect("memory")
            .write(&file)
            .expect_err("too many");
    }

    #[test]
    fn what_is_not_memory_is_refused() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x1000)]).expect("memory");
        for lie in [
            segment(0x1000, 1),
            segment(0xfff, 2),
            segment(u64::MAX, 2),
            segment(0, u32::MAX),
        ] {
            assert!(Vectors::new(&memory, &[lie]).is_none(), "{lie:?}");
        }
    }
}
