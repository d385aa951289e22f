//! Walking over all that is in a directory.
//!
//! A tree that a guest made can be deeper than descriptors suffice for, and its paths longer than the
//! kernel takes. So the walk holds one open directory, goes down by name and up by `..`, and checks
//! that what is above is what it came from. No link is followed. Nobody else changes the tree
//! meanwhile: the caller sees to that.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat};

/// What is done with what is found.
pub(super) trait Visitor {
    /// A directory is about to be entered.
    fn enter(&mut self, at: BorrowedFd<'_>, name: &CStr) -> io::Result<()>;
    /// It has been left.
    fn leave(&mut self, at: BorrowedFd<'_>, name: &CStr) -> io::Result<()>;
    /// Anything else.
    fn file(&mut self, at: BorrowedFd<'_>, name: &CStr, stat: &Stat) -> io::Result<()>;
}

/// A directory that has been entered.
struct Level {
    /// What is left to visit in it.
    names: Vec<CString>,
    /// Its own name.
    name: CString,
    identity: (u64, u64),
}

const DOWN: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// A directory's own descriptor for reading, whatever kind of handle there is of it.
pub(super) fn open_again(dir: impl AsFd) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(dir, ".", flags, Mode::empty())?)
}

/// Opens a directory below another one; not through a link.
pub(super) fn open_below(dir: impl AsFd, name: &CStr) -> io::Result<OwnedFd> {
    Ok(rustix::fs::openat(dir, name, DOWN, Mode::empty())?)
}

fn names_of(dir: impl AsFd) -> io::Result<Vec<CString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

fn identity(dir: impl AsFd) -> io::Result<(u64, u64)> {
    let stat = rustix::fs::fstat(dir)?;
    Ok((stat.st_dev, stat.st_ino))
}

/// Visits everything below a directory: a directory's content between its `enter` and its `leave`.
pub(super) fn walk(root: impl AsFd, visitor: &mut impl Visitor) -> io::Result<()> {
    let mut here = open_again(root)?;
    let mut levels = vec![Level {
        names: names_of(&here)?,
        name: CString::default(),
        identity: identity(&here)?,
    }];
    while let Some(level) = levels.last_mut() {
        if let Some(name) = level.names.pop() {
            let stat = rustix::fs::statat(&here, &name, AtFlags::SYMLINK_NOFOLLOW)?;
            if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
                visitor.file(here.as_fd(), &name, &stat)?;
                continue;
            }
            visitor.enter(here.as_fd(), &name)?;
            here = open_below(&here, &name)?;
            levels.push(Level {
                names: names_of(&here)?,
                name,
                identity: identity(&here)?,
            });
            continue;
        }
        let done = levels.pop();
        let (Some(above), Some(done)) = (levels.last(), done) else {
            break;
        };
        here = open_below(&here, c"..")?;
        if identity(&here)? != above.identity {
            return Err(io::Error::other(
                "a directory was moved while it was walked",
            ));
        }
        visitor.leave(here.as_fd(), &done.name)?;
    }
    Ok(())
}
