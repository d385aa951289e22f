//! A disk that forgets: what was written is in its cache until it is told to flush, and when the
//! power goes, each sector of the cache is on the disk by chance, or is not.
//!
//! ```text
//!  write ─▶ cache, in order ─▶ flush ─▶ all of it on the disk, then the answer
//!                 │
//!                 └─ the power is cut: each sector of it by chance
//! ```
//!
//! The power goes at a moment that the test chooses, or before one of the next writes.
//!
//! That is what a disk with a volatile cache may do (ATA, SCSI, NVMe and virtio say no more); one that
//! keeps an order would be kinder. A sector of 512 bytes is written whole or not at all. The emulator
//! is spoken to in the NBD protocol (`doc/proto.md` of the NetworkBlockDevice project), of which here
//! is what QEMU needs: the handshake "fixed newstyle" and the commands READ, WRITE, FLUSH and DISC.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use crate::kills::random::Random;

const SECTOR: usize = 512;
/// Largest piece that is read or written at once, as the protocol has it where nothing was agreed.
const PIECE_MAX: u32 = 32 << 20;

const MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
/// `FIXED_NEWSTYLE` and `NO_ZEROES`.
const HANDSHAKE_FLAGS: u16 = 3;
/// `HAS_FLAGS` and `SEND_FLUSH`: there is a cache, and no way to write past it.
const EXPORT_FLAGS: u16 = 1 | 4;
const OPTION_ABORT: u32 = 2;
const OPTION_INFO: u32 = 6;
const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const REPLY_UNSUPPORTED: u32 = (1 << 31) | 1;
const EINVAL: u32 = 22;

/// What a flush does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flush {
    /// What it says.
    Honest,
    /// Nothing, but say that it did.
    Pretended,
}

/// What it was and is.
pub(crate) struct Disk {
    flush: Flush,
    /// What survives.
    lasting: Vec<u8>,
    /// What is read.
    current: Vec<u8>,
    /// What was written since the last flush, in order.
    cache: Vec<(usize, Vec<u8>)>,
    /// So many more writes, and the power is gone.
    writes_left: Option<u64>,
    pub(crate) counts: Counts,
}

/// What it has been through.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Counts {
    pub(crate) flushes: u64,
    pub(crate) sectors_written: u64,
    pub(crate) sectors_in_cache_at_a_cut: u64,
    pub(crate) sectors_lost: u64,
}

impl Disk {
    pub(crate) fn new(content: Vec<u8>, flush: Flush) -> Self {
        Self {
            flush,
            current: content.clone(),
            lasting: content,
            cache: Vec::new(),
            writes_left: None,
            counts: Counts::default(),
        }
    }

    fn holds(&self, at: u64, length: u32) -> Option<std::ops::Range<usize>> {
        let at = usize::try_from(at).ok()?;
        let end = at.checked_add(usize::try_from(length).ok()?)?;
        (end <= self.current.len()).then_some(at..end)
    }

    fn write(&mut self, at: usize, data: Vec<u8>) {
        self.counts.sectors_written += (data.len() / SECTOR) as u64;
        self.current[at..at + data.len()].copy_from_slice(&data);
        self.cache.push((at, data));
    }

    fn flush(&mut self) {
        self.counts.flushes += 1;
        if self.flush == Flush::Pretended {
            return;
        }
        for (at, data) in self.cache.drain(..) {
            self.lasting[at..at + data.len()].copy_from_slice(&data);
        }
    }

    /// From now on it takes so many writes, and then answers nothing any more.
    pub(crate) fn fail_after(&mut self, writes: u64) {
        self.writes_left = Some(writes);
    }

    /// Whether it has come to that.
    pub(crate) fn has_failed(&self) -> bool {
        self.writes_left == Some(0)
    }

    /// The power goes and comes back.
    pub(crate) fn cut(&mut self, random: &mut Random) {
        self.writes_left = None;
        // From one where all is lost to one where hardly anything is.
        let lost_of_8 = 8 - random.below(8);
        for (at, data) in std::mem::take(&mut self.cache) {
            for (n, sector) in data.chunks(SECTOR).enumerate() {
                self.counts.sectors_in_cache_at_a_cut += 1;
                if random.below(8) < lost_of_8 {
                    self.counts.sectors_lost += 1;
                    continue;
                }
                let at = at + n * SECTOR;
                self.lasting[at..at + sector.len()].copy_from_slice(sector);
            }
        }
        self.current.copy_from_slice(&self.lasting);
    }
}

fn bytes<const N: usize>(stream: &mut UnixStream) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn number(stream: &mut UnixStream) -> io::Result<u32> {
    Ok(u32::from_be_bytes(bytes(stream)?))
}

fn long(stream: &mut UnixStream) -> io::Result<u64> {
    Ok(u64::from_be_bytes(bytes(stream)?))
}

fn wrong(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

/// Serves one emulator until it is gone, however it goes.
pub(crate) fn serve(mut stream: UnixStream, disk: &std::sync::Mutex<Disk>) -> io::Result<()> {
    let size = disk.lock().expect("a disk").current.len() as u64;
    if !shake_hands(&mut stream, size)? {
        return Ok(());
    }
    loop {
        let mut head = [0; 28];
        match stream.read_exact(&mut head) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            read => read?,
        }
        let [magic, flags_and_command] = [0, 4]
            .map(|at| u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]));
        let handle = &head[8..16];
        let at = u64::from_be_bytes(head[16..24].try_into().expect("eight bytes"));
        let length = u32::from_be_bytes(head[24..28].try_into().expect("four bytes"));
        if magic != REQUEST_MAGIC || length > PIECE_MAX {
            return Err(wrong("no request"));
        }
        let mut reply = REPLY_MAGIC.to_be_bytes().to_vec();
        let mut answer = |error: u32, data: &[u8]| {
            reply.extend(error.to_be_bytes());
            reply.extend(handle);
            reply.extend(data);
        };
        let command = flags_and_command & 0xffff;
        let data = if command == 1 {
            let mut data = vec![0; length as usize];
            stream.read_exact(&mut data)?;
            data
        } else {
            Vec::new()
        };
        let mut disk = disk.lock().expect("a disk");
        if disk.has_failed() {
            drop(disk);
            return until_it_is_gone(&mut stream);
        }
        match (command, disk.holds(at, length)) {
            (0, Some(range)) => answer(0, &disk.current[range]),
            (1, Some(range)) => {
                disk.writes_left = disk.writes_left.map(|left| left - 1);
                disk.write(range.start, data);
                answer(0, &[]);
            }
            (2, _) => return Ok(()),
            (3, _) => {
                disk.flush();
                answer(0, &[]);
            }
            _ => answer(EINVAL, &[]),
        }
        drop(disk);
        stream.write_all(&reply)?;
    }
}

fn until_it_is_gone(stream: &mut UnixStream) -> io::Result<()> {
    io::copy(stream, &mut io::sink())?;
    Ok(())
}

/// Whether it went on to commands.
fn shake_hands(stream: &mut UnixStream, size: u64) -> io::Result<bool> {
    let mut hello = MAGIC.to_be_bytes().to_vec();
    hello.extend(OPTION_MAGIC.to_be_bytes());
    hello.extend(HANDSHAKE_FLAGS.to_be_bytes());
    stream.write_all(&hello)?;
    let _flags = number(stream)?;
    loop {
        if long(stream)? != OPTION_MAGIC {
            return Err(wrong("no option"));
        }
        let (option, length) = (number(stream)?, number(stream)?);
        let mut data = vec![0; length.min(PIECE_MAX) as usize];
        stream.read_exact(&mut data)?;
        let mut reply = |kind: u32, data: &[u8]| {
            let mut reply = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
            reply.extend(option.to_be_bytes());
            reply.extend(kind.to_be_bytes());
            let length = u32::try_from(data.len()).expect("short");
            reply.extend(length.to_be_bytes());
            reply.extend(data);
            stream.write_all(&reply)
        };
        match option {
            OPTION_GO | OPTION_INFO => {
                // `NBD_INFO_EXPORT`.
                let mut export = 0_u16.to_be_bytes().to_vec();
                export.extend(size.to_be_bytes());
                export.extend(EXPORT_FLAGS.to_be_bytes());
                reply(REPLY_INFO, &export)?;
                reply(REPLY_ACK, &[])?;
                if option == OPTION_GO {
                    return Ok(true);
                }
            }
            OPTION_ABORT => {
                reply(REPLY_ACK, &[])?;
                return Ok(false);
            }
            _ => reply(REPLY_UNSUPPORTED, &[])?,
        }
    }
}

#[test]
fn what_was_flushed_stays_and_of_the_rest_any_part() {
    let mut random = Random(7);
    let mut disk = Disk::new(vec![0; 64 * SECTOR], Flush::Honest);
    disk.write(0, vec![1; 8 * SECTOR]);
    disk.flush();
    disk.write(8 * SECTOR, vec![2; 56 * SECTOR]);
    assert_eq!(disk.current[63 * SECTOR], 2, "it is read before it lasts");
    disk.cut(&mut random);
    assert!(disk.current[..8 * SECTOR].iter().all(|byte| *byte == 1));
    let sectors: Vec<&[u8]> = disk.current[8 * SECTOR..].chunks(SECTOR).collect();
    let whole = |sector: &&&[u8]| sector.iter().all(|byte| *byte == sector[0]);
    assert!(sectors.iter().filter(whole).count() == 56, "none is half");
    let lost = sectors.iter().filter(|sector| sector[0] == 0).count() as u64;
    assert_eq!(lost, disk.counts.sectors_lost);
    assert!(lost > 0);
}
