//! The file below a database: its room is taken before it is written to.
//!
//! ```text
//!  0        16          4096
//!  │ magic, length │ … │ the database, as far as it was ever written to │ (zeros up to its length)
//! ```
//!
//! A database makes itself as long again when it needs one page more, and means to fill that up over
//! time. Here its length is a number in the first block, and the file is as long as what was written:
//! so what a store takes is counted like any other file, by its size, and a store can fill its volume.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use redb::StorageBackend;

use super::super::account::{Account, Full};
use super::super::{Usage, blocks};

/// Before the database.
const HEAD: usize = 4 << 10;
const HEAD_BYTES: u64 = HEAD as u64;
/// What the file begins with; its last byte is the format's version.
const MAGIC: [u8; 8] = *b"insula\0\x01";

/// See the module's documentation. Written to by whoever holds its volume's right to change.
#[derive(Debug)]
pub(super) struct Backing {
    file: File,
    account: Arc<Account>,
    /// Of the database.
    length: AtomicU64,
    /// Of the file.
    written: AtomicU64,
    /// What writing leaves free of the volume.
    keep: AtomicU64,
    refused: Mutex<Option<Full>>,
}

impl Backing {
    /// Over a file whose size is in the books.
    pub(super) fn new(file: File, account: Arc<Account>) -> io::Result<Self> {
        let written = file.metadata()?.len();
        let mut head = [0; 16];
        // A crash left a first block, or a part of one, and nothing behind it: there was nothing yet.
        let fresh = written <= HEAD_BYTES;
        let length = if fresh {
            0
        } else {
            file.read_exact_at(&mut head, 0)?;
            let [magic, length] = [0, 8].map(|at| head[at..at + 8].try_into().unwrap_or([0; 8]));
            if magic != MAGIC {
                return Err(io::Error::new(ErrorKind::InvalidData, "this is no store"));
            }
            if is_begun(&file)? {
                u64::from_le_bytes(length)
            } else {
                0
            }
        };
        Ok(Self {
            file,
            account,
            length: AtomicU64::new(length),
            written: AtomicU64::new(written),
            keep: AtomicU64::new(0),
            refused: Mutex::default(),
        })
    }

    /// From now on, writing leaves so many bytes of the volume free.
    pub(super) fn keep(&self, bytes: u64) {
        self.keep.store(bytes, Ordering::Relaxed);
    }

    /// Why there was no room since this was asked last, if there was none.
    pub(super) fn refused(&self) -> Option<Full> {
        let mut refused = self.refused.lock().unwrap_or_else(PoisonError::into_inner);
        refused.take()
    }

    fn put(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        let end = at.checked_add(bytes.len() as u64);
        let end = end.filter(|end| i64::try_from(*end).is_ok());
        let end = end.ok_or(ErrorKind::FileTooLarge)?;
        let before = self.written.load(Ordering::Relaxed);
        let more = blocks(end).saturating_sub(blocks(before));
        if more > 0 {
            let wanted = Usage {
                bytes: more,
                inodes: 0,
            };
            let keep = self.keep.load(Ordering::Relaxed);
            self.account.take(wanted, keep).map_err(|full| {
                *self.refused.lock().unwrap_or_else(PoisonError::into_inner) = Some(full);
                io::Error::new(ErrorKind::QuotaExceeded, full)
            })?;
        }
        let result = self.file.write_all_at(bytes, at);
        let after = match &result {
            Ok(()) => before.max(end),
            // Without a size to be read, what was taken is what it has at most.
            Err(_) => self.file.metadata().map_or(before.max(end), |is| is.len()),
        };
        self.written.store(after, Ordering::Relaxed);
        self.give((blocks(before) + more).saturating_sub(blocks(after)));
        result
    }

    fn give(&self, bytes: u64) {
        if bytes > 0 {
            let gone = Usage { bytes, inodes: 0 };
            self.account.give(&mut self.account.books(), gone);
        }
    }
}

/// Whether there is a database: its first bytes are written last when it is made, behind a sync. A
/// crash before that left a length, and nothing that anybody was told of.
fn is_begun(file: &File) -> io::Result<bool> {
    let mut first = [0; 9];
    let mut done = 0;
    while done < first.len() {
        match file.read_at(&mut first[done..], HEAD_BYTES + done as u64) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(first != [0; 9])
}

/// What a database gets.
#[derive(Debug)]
pub(super) struct Shared(pub(super) Arc<Backing>);

impl StorageBackend for Shared {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.length.load(Ordering::Relaxed))
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(out.len() as u64);
        let length = self.0.length.load(Ordering::Relaxed);
        if end.is_none_or(|end| end > length) {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        let mut done = 0;
        while done < out.len() {
            let at = HEAD_BYTES + offset + done as u64;
            match self.0.file.read_at(&mut out[done..], at) {
                // Nothing was written from here on.
                Ok(0) => {
                    out[done..].fill(0);
                    break;
                }
                Ok(count) => done += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        let backing = &*self.0;
        if backing.written.load(Ordering::Relaxed) < HEAD_BYTES {
            backing.put(0, &[0; HEAD])?;
        }
        let [magic, number] = [MAGIC, length.to_le_bytes()];
        backing.put(0, &[magic, number].concat())?;
        backing.length.store(length, Ordering::Relaxed);
        let end = HEAD_BYTES.saturating_add(length);
        let before = backing.written.load(Ordering::Relaxed);
        if end < before {
            backing.file.set_len(end)?;
            backing.written.store(end, Ordering::Relaxed);
            backing.give(blocks(before) - blocks(end));
        }
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.file.sync_data()
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.put(HEAD_BYTES.saturating_add(offset), bytes)
    }
}
