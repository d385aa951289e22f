//! Counting, copying and removing of whole trees.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::num::NonZeroU32;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat, Timespec, Timestamps};
use rustix::io::Errno;
use rustix::mount::OpenTreeFlags;
use rustix::process::{Gid, Uid};

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

struct Give {
    owner: (Uid, Gid),
}

impl Visitor for Give {
    fn enter(&mut self, at: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
        self.give(at, name)
    }

    fn leave(&mut self, _: BorrowedFd<'_>, _: &CStr) -> io::Result<()> {
        Ok(())
    }

    fn file(&mut self, at: BorrowedFd<'_>, name: &CStr, _: &Stat) -> io::Result<()> {
        self.give(at, name)
    }
}

impl Give {
    fn give(&self, at: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
        let (user, group) = self.owner;
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        Ok(rustix::fs::chownat(
            at,
            name,
            Some(user),
            Some(group),
            flags,
        )?)
    }
}

/// Makes a volume ready for the process that changes it: everything in it is that user's, where it is
/// another than ours, and it is a file system of its own, from which no path leads up. The directory
/// changes hands last, so that what a crash leaves half done is seen and done again.
///
/// Where this process may make no mounts the directory is as it is ([`can_shut_in`]).
///
/// # Errors
/// Those of the file system.
pub fn hand_over(root: File, owner: Option<NonZeroU32>) -> io::Result<File> {
    if let Some(owner) = owner.map(NonZeroU32::get)
        && rustix::fs::fstat(&root)?.st_uid != owner
    {
        let owner = (Uid::from_raw(owner), Gid::from_raw(owner));
        walk(&root, &mut Give { owner })?;
        rustix::fs::fchown(&root, Some(owner.0), Some(owner.1))?;
    }
    match shut_in(&root) {
        Ok(tree) => Ok(open_again(tree)?.into()),
        Err(_) => Ok(root),
    }
}

/// A mount of a directory that is nowhere: of its root there is nothing above (`open_tree(2)`).
fn shut_in(dir: impl AsFd) -> rustix::io::Result<OwnedFd> {
    // `AT_EMPTY_PATH`: the directory itself.
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    rustix::mount::open_tree(dir, c"", flags)
}

/// Whether [`hand_over`] makes file systems of volumes here.
///
/// # Errors
/// Why it does not.
pub fn can_shut_in(dir: impl AsFd) -> io::Result<()> {
    shut_in(dir)?;
    Ok(())
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
