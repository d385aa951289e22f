//! The content of a volume as a stream of bytes, for backups.
//!
//! ```text
//!  'd' name time              a directory is entered      name: length (2 bytes), bytes
//!  'u'                        and left                    time: seconds (8 bytes), nanoseconds (4)
//!  'f' name time size bytes   a file                      size: 8 bytes
//!  'l' name target            a link                      target: as a name
//!  'e'                        the end                     numbers begin with their lowest byte
//! ```
//!
//! Not tar: the paths of a guest's tree can be longer than the kernel takes, and its names are any
//! bytes. Here every name is that of one step. What reads it believes nothing: a name is no path, no
//! file is written that was there, and all of it happens below one directory.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};

use super::copy::set_times;
use super::walk::{Visitor, open_again, open_below, walk};

/// Longest name, as file systems have it.
const NAME_MAX: usize = 255;
/// Longest target of a link.
const TARGET_MAX: usize = 4_096;
/// Directories in one another.
const DEPTH_MAX: usize = 1 << 16;

/// A tree that nobody changes, to be read as bytes.
#[derive(Debug)]
pub struct Packer {
    /// Where the record that is due is found, the next one last.
    steps: Vec<Step>,
    here: OwnedFd,
    /// A record's head, as far as it is left.
    head: Vec<u8>,
    given: usize,
    body: Option<(File, u64)>,
}

#[derive(Debug)]
enum Step {
    Enter(CString, Stat),
    Leave,
    File(CString, Stat),
    Link(CString),
    End,
}

struct Listing<'a>(&'a mut Vec<Step>);

impl Visitor for Listing<'_> {
    fn enter(&mut self, at: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
        let stat = rustix::fs::statat(at, name, AtFlags::SYMLINK_NOFOLLOW)?;
        self.0.push(Step::Enter(name.to_owned(), stat));
        Ok(())
    }

    fn leave(&mut self, _: BorrowedFd<'_>, _: &CStr) -> io::Result<()> {
        self.0.push(Step::Leave);
        Ok(())
    }

    fn file(&mut self, _: BorrowedFd<'_>, name: &CStr, stat: &Stat) -> io::Result<()> {
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => self.0.push(Step::File(name.to_owned(), *stat)),
            FileType::Symlink => self.0.push(Step::Link(name.to_owned())),
            // Nothing that a guest can make.
            _ => {}
        }
        Ok(())
    }
}

fn put_name(head: &mut Vec<u8>, name: &[u8]) -> io::Result<()> {
    let length = u16::try_from(name.len()).map_err(io::Error::other)?;
    head.extend(length.to_le_bytes());
    head.extend(name);
    Ok(())
}

fn put_time(head: &mut Vec<u8>, stat: &Stat) {
    head.extend(stat.st_mtime.to_le_bytes());
    let nanoseconds = u32::try_from(stat.st_mtime_nsec).unwrap_or(0);
    head.extend(nanoseconds.to_le_bytes());
}

fn size_of(stat: &Stat) -> u64 {
    u64::try_from(stat.st_size).unwrap_or(0)
}

impl Packer {
    /// Everything below a directory; its names are in memory from here on.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn new(root: impl AsFd) -> io::Result<Self> {
        let mut steps = Vec::new();
        let here = open_again(&root)?;
        walk(root, &mut Listing(&mut steps))?;
        steps.push(Step::End);
        steps.reverse();
        Ok(Self {
            steps,
            here,
            head: Vec::new(),
            given: 0,
            body: None,
        })
    }

    /// How many bytes it is.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn size(root: impl AsFd) -> io::Result<u64> {
        let mut packer = Self::new(root)?;
        let mut size = 0;
        while packer.advance()? {
            size += packer.head.len() as u64;
            size += packer.body.take().map_or(0, |(_, left)| left);
        }
        Ok(size)
    }

    /// To the next record; false after the last.
    fn advance(&mut self) -> io::Result<bool> {
        (self.head, self.given) = (Vec::new(), 0);
        let Some(step) = self.steps.pop() else {
            return Ok(false);
        };
        let head = &mut self.head;
        match step {
            Step::Enter(name, stat) => {
                head.push(b'd');
                put_name(head, name.to_bytes())?;
                put_time(head, &stat);
                self.here = open_below(&self.here, &name)?;
            }
            Step::Leave => {
                head.push(b'u');
                self.here = open_below(&self.here, c"..")?;
            }
            Step::File(name, stat) => {
                head.push(b'f');
                put_name(head, name.to_bytes())?;
                put_time(head, &stat);
                head.extend(size_of(&stat).to_le_bytes());
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let file = rustix::fs::openat(&self.here, &name, flags, Mode::empty())?;
                self.body = Some((file.into(), size_of(&stat)));
            }
            Step::Link(name) => {
                head.push(b'l');
                put_name(head, name.to_bytes())?;
                let target = rustix::fs::readlinkat(&self.here, &name, Vec::new())?;
                put_name(head, target.to_bytes())?;
            }
            Step::End => head.push(b'e'),
        }
        Ok(true)
    }
}

impl Read for Packer {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        loop {
            if self.given < self.head.len() {
                let count = (&self.head[self.given..]).read(out)?;
                self.given += count;
                return Ok(count);
            }
            if let Some((file, left)) = &mut self.body
                && *left > 0
            {
                let count = file.take(*left).read(out)?;
                if count == 0 && !out.is_empty() {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                *left -= count as u64;
                return Ok(count);
            }
            self.body = None;
            if !self.advance()? {
                return Ok(0);
            }
        }
    }
}

/// Not what [`Packer`] writes.
fn wrong(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn array<const N: usize>(from: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn take_text(from: &mut impl Read, max: usize) -> io::Result<CString> {
    let length = usize::from(u16::from_le_bytes(array(from)?));
    if length == 0 || length > max {
        return Err(wrong("a name or target is too long"));
    }
    let mut bytes = vec![0; length];
    from.read_exact(&mut bytes)?;
    CString::new(bytes).map_err(|_| wrong("a name or target has a NUL"))
}

fn take_name(from: &mut impl Read) -> io::Result<CString> {
    let name = take_text(from, NAME_MAX)?;
    let bytes = name.to_bytes();
    if bytes == b"." || bytes == b".." || bytes.contains(&b'/') {
        return Err(wrong("a name is a path"));
    }
    Ok(name)
}

fn take_time(from: &mut impl Read) -> io::Result<(i64, u32)> {
    Ok((
        i64::from_le_bytes(array(from)?),
        u32::from_le_bytes(array(from)?).min(999_999_999),
    ))
}

/// Makes what was packed, in an empty directory, durably.
///
/// # Errors
/// `InvalidData` for what nobody packed; those of the file system. A part of it may be there then.
pub fn unpack(from: &mut impl Read, root: impl AsFd) -> io::Result<()> {
    let mut here = open_again(&root)?;
    let mut depth = 0;
    loop {
        match array::<1>(from)? {
            [b'd'] => {
                let (name, _) = (take_name(from)?, take_time(from)?);
                depth += 1;
                if depth > DEPTH_MAX {
                    return Err(wrong("it is too deep"));
                }
                rustix::fs::mkdirat(&here, &name, Mode::RWXU)?;
                here = open_below(&here, &name)?;
            }
            [b'u'] if depth > 0 => {
                depth -= 1;
                here = open_below(&here, c"..")?;
            }
            [b'f'] => {
                let (name, time) = (take_name(from)?, take_time(from)?);
                let size = u64::from_le_bytes(array(from)?);
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                let mode = Mode::RUSR | Mode::WUSR;
                let mut file = File::from(rustix::fs::openat(&here, &name, flags, mode)?);
                if io::copy(&mut from.take(size), &mut file)? != size {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                set_times(&file, time, time)?;
            }
            [b'l'] => {
                let (name, target) = (take_name(from)?, take_text(from, TARGET_MAX)?);
                rustix::fs::symlinkat(&target, &here, &name)?;
            }
            [b'e'] if depth == 0 => break,
            _ => return Err(wrong("there is no such record")),
        }
    }
    Ok(rustix::fs::syncfs(&here)?)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    fn packed(root: &File) -> Vec<u8> {
        let mut bytes = Vec::new();
        Packer::new(root).unwrap().read_to_end(&mut bytes).unwrap();
        assert_eq!(Packer::size(root).unwrap(), bytes.len() as u64);
        bytes
    }

    fn unpacked(mut bytes: &[u8]) -> (tempfile::TempDir, io::Result<()>) {
        let to = tempfile::tempdir().unwrap();
        let result = unpack(&mut bytes, File::open(to.path()).unwrap());
        (to, result)
    }

    #[test]
    fn a_tree_comes_back() {
        let from = tempfile::tempdir().unwrap();
        let at = |name: &str| from.path().join(name);
        fs::create_dir_all(at("a/b/c")).unwrap();
        fs::write(at("a/b/file"), vec![9; 100_000]).unwrap();
        fs::write(at("a/\u{e4} \n"), "").unwrap();
        fs::write(at("z"), "last").unwrap();
        symlink("../../etc/passwd", at("a/link")).unwrap();
        let bytes = packed(&File::open(from.path()).unwrap());
        let (to, result) = unpacked(&bytes);
        result.unwrap();
        let there = |name: &str| to.path().join(name);
        assert_eq!(fs::read(there("a/b/file")).unwrap(), vec![9; 100_000]);
        assert_eq!(fs::read(there("a/\u{e4} \n")).unwrap(), b"");
        assert_eq!(fs::read(there("z")).unwrap(), b"last");
        assert!(there("a/b/c").is_dir());
        let target = fs::read_link(there("a/link")).unwrap();
        assert_eq!(target.to_str(), Some("../../etc/passwd"));
        let time = |path| fs::metadata(path).unwrap().modified().unwrap();
        assert_eq!(time(there("a/b/file")), time(at("a/b/file")));
        let again = packed(&File::open(to.path()).unwrap());
        assert_eq!(again.len(), bytes.len());
    }

    #[test]
    fn a_tree_that_is_deeper_than_a_path_comes_back() {
        let from = tempfile::tempdir().unwrap();
        let mut here = open_again(File::open(from.path()).unwrap()).unwrap();
        let name = CString::new("d".repeat(200)).unwrap();
        for _ in 0..100 {
            rustix::fs::mkdirat(&here, &name, Mode::RWXU).unwrap();
            here = open_below(&here, &name).unwrap();
        }
        let bytes = packed(&File::open(from.path()).unwrap());
        let (to, result) = unpacked(&bytes);
        result.unwrap();
        assert_eq!(packed(&File::open(to.path()).unwrap()).len(), bytes.len());
        for dir in [from, to] {
            super::super::clear(File::open(dir.path()).unwrap()).unwrap();
        }
    }

    #[test]
    fn what_nobody_packed_is_refused() {
        let name = |kind: u8, name: &[u8]| {
            let mut bytes = vec![kind];
            put_name(&mut bytes, name).unwrap();
            bytes.extend([0; 12]);
            bytes
        };
        let file = |text: &[u8], size: u64| [name(b'f', text), size.to_le_bytes().into()].concat();
        let twice = [file(b"a", 0), file(b"a", 0), vec![b'e']].concat();
        for (what, bytes) in [
            ("nothing", vec![]),
            ("no end", file(b"a", 0)),
            ("cut off", file(b"a", 10)),
            ("above", vec![b'u', b'e']),
            ("not left", [name(b'd', b"d"), vec![b'e']].concat()),
            ("up", [name(b'd', b".."), vec![b'u', b'e']].concat()),
            ("a path", [file(b"../x", 0), vec![b'e']].concat()),
            ("absolute", [file(b"/tmp/x", 0), vec![b'e']].concat()),
            ("no name", [file(b"", 0), vec![b'e']].concat()),
            ("a NUL", [file(b"a\0b", 0), vec![b'e']].concat()),
            ("long", [file(&[b'x'; 256], 0), vec![b'e']].concat()),
            ("twice", twice),
            ("no kind", vec![b'x']),
        ] {
            assert!(unpacked(&bytes).1.is_err(), "{what}");
        }
        // Not through a link, and not to where it leads.
        let elsewhere = tempfile::tempdir().unwrap();
        let target = elsewhere.path().to_str().unwrap().as_bytes();
        let mut link = vec![b'l'];
        put_name(&mut link, b"l").unwrap();
        put_name(&mut link, target).unwrap();
        for inside in [
            [name(b'd', b"l"), file(b"x", 0), vec![b'u', b'e']].concat(),
            [file(b"l", 0), vec![b'e']].concat(),
        ] {
            assert!(unpacked(&[link.clone(), inside].concat()).1.is_err());
        }
        assert_eq!(fs::read_dir(elsewhere.path()).unwrap().count(), 0);
    }
}
