//! Counting, copying and removing of whole trees.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat, Timespec, Timestamps};
use rustix::io::Errno;

use super::walk::{Visitor, open_again, open_below, walk};
use super::{BLOCK_BYTES, INODE_BYTES, Usage, blocks};

struct Count(Usage);

impl Visitor for Count {
    fn enter(&mut self, _: BorrowedFd<'_>, _: &CStr) -> io::Result<()> {
        self.0 += Usage::inode(BLOCK_BYTES);
        Ok(())
    }

    fn leave(&mut self, _: BorrowedFd<'_>, _: &CStr) -> io::Result<()> {
        Ok(())
    }

    fn file(&mut self, _: BorrowedFd<'_>, _: &CStr, stat: &Stat) -> io::Result<()> {
        self.0 += Usage::inode(size_of(stat));
        Ok(())
    }
}

/// What something takes beside its inode: a link's target may need a block of its own.
fn size_of(stat: &Stat) -> u64 {
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => blocks(u64::try_from(stat.st_size).unwrap_or(0)),
        _ => BLOCK_BYTES,
    }
}

/// What everything below a directory takes.
pub(super) fn usage(root: impl AsFd) -> io::Result<Usage> {
    let mut count = Count(Usage::default());
    walk(root, &mut count)?;
    Ok(count.0)
}

struct Remove;

impl Visitor for Remove {
    fn enter(&mut self, _: BorrowedFd<'_>, _: &CStr) -> io::Result<()> {
        Ok(())
    }

    fn leave(&mut self, at: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(at, name, AtFlags::REMOVEDIR)?)
    }

    fn file(&mut self, at: BorrowedFd<'_>, name: &CStr, _: &Stat) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(at, name, AtFlags::empty())?)
    }
}

/// Removes everything below a directory, and not the directory.
///
/// # Errors
/// Those of the file system; what was removed before is gone.
pub fn clear(root: impl AsFd) -> io::Result<()> {
    walk(root, &mut Remove)
}

struct Copy {
    to: OwnedFd,
}

impl Visitor for Copy {
    fn enter(&mut self, _: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
        rustix::fs::mkdirat(&self.to, name, Mode::RWXU)?;
        self.to = open_below(&self.to, name)?;
        Ok(())
    }

    fn leave(&mut self, _: BorrowedFd<'_>, _: &CStr) -> io::Result<()> {
        // Nobody else knows of this tree.
        self.to = open_below(&self.to, c"..")?;
        Ok(())
    }

    fn file(&mut self, at: BorrowedFd<'_>, name: &CStr, stat: &Stat) -> io::Result<()> {
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => self.regular(at, name, stat),
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(at, name, Vec::new())?;
                Ok(rustix::fs::symlinkat(&target, &self.to, name)?)
            }
            // Nothing that a guest can make.
            _ => Ok(()),
        }
    }
}

impl Copy {
    fn regular(&self, at: BorrowedFd<'_>, name: &CStr, stat: &Stat) -> io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let from = rustix::fs::openat(at, name, flags, Mode::empty())?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let to = rustix::fs::openat(&self.to, name, flags, Mode::RUSR | Mode::WUSR)?;
        // Where the file system shares blocks, this is all of it.
        if rustix::fs::ioctl_ficlone(&to, &from).is_err() {
            let mut left = usize::try_from(stat.st_size).unwrap_or(0);
            while left > 0 {
                match rustix::fs::copy_file_range(&from, None, &to, None, left) {
                    Ok(0) => break,
                    Ok(copied) => left = left.saturating_sub(copied),
                    Err(Errno::INTR) => {}
                    // Not on this file system; both are where they were.
                    Err(Errno::INVAL | Errno::XDEV | Errno::OPNOTSUPP | Errno::NOSYS) => {
                        std::io::copy(&mut File::from(from), &mut File::from(to.try_clone()?))?;
                        break;
                    }
                    Err(errno) => return Err(errno.into()),
                }
            }
        }
        let nanoseconds = |nanos| u32::try_from(nanos).unwrap_or(0);
        let accessed = (stat.st_atime, nanoseconds(stat.st_atime_nsec));
        set_times(
            &to,
            accessed,
            (stat.st_mtime, nanoseconds(stat.st_mtime_nsec)),
        )
    }
}

/// Sets when a file was read and when it was changed, in seconds and nanoseconds.
pub(super) fn set_times(
    file: impl AsFd,
    accessed: (i64, u32),
    changed: (i64, u32),
) -> io::Result<()> {
    let time = |(tv_sec, nanos)| Timespec {
        tv_sec,
        tv_nsec: i64::from(nanos),
    };
    let times = Timestamps {
        last_access: time(accessed),
        last_modification: time(changed),
    };
    Ok(rustix::fs::futimens(file, &times)?)
}

/// Copies everything below one directory into another one, which is empty, and makes it durable.
pub(super) fn copy(from: impl AsFd, to: impl AsFd) -> io::Result<()> {
    let to = open_again(to)?;
    let mut copy = Copy {
        to: open_again(&to)?,
    };
    walk(from, &mut copy)?;
    // One call for a tree of any size; it may wait for others' writes as well.
    Ok(rustix::fs::syncfs(&to)?)
}

/// Whether the kernel resolves paths below a directory and nowhere else, in one step.
#[must_use]
pub fn has_openat2(dir: impl AsFd) -> bool {
    use rustix::fs::ResolveFlags;
    let how = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat2(&dir, ".", flags, Mode::empty(), how).is_ok()
}

/// The whole price of things; see [`Usage::inode`].
impl Usage {
    /// An inode, and so many bytes in blocks.
    #[must_use]
    pub const fn inode(block_bytes: u64) -> Self {
        Self {
            bytes: block_bytes.saturating_add(INODE_BYTES),
            inodes: 1,
        }
    }
}
