//! The system calls of the jail that no crate wraps safely.
//!
//! Each is called by [`super::enter`], which has checked that the calling thread is the only one
//! of its process.
#![expect(unsafe_code, reason = "close_range and unshare have no safe wrapper")]

use std::io;
use std::os::fd::RawFd;

use rustix::thread::UnshareFlags;

/// Proof that the process has one thread, and that the holder may dispose of all descriptors that
/// it does not name. Made in [`super::enter`] only.
#[derive(Debug)]
pub(super) struct Alone(pub(super) ());

/// Closes the descriptors from `first` to `last`, both included.
pub(super) fn close_range(_alone: &Alone, first: RawFd, last: RawFd) -> io::Result<()> {
    // SAFETY: the call takes three numbers and touches no memory of ours. What it closes belongs
    // to nobody: there is no other thread (`Alone`), and the contract of `enter` is that the
    // process owns no descriptor besides those that it lists, which the caller here leaves out.
    let outcome = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    if outcome == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Leaves the namespaces in `flags` for new ones.
pub(super) fn unshare(_alone: &Alone, flags: UnshareFlags) -> io::Result<()> {
    debug_assert!(!flags.contains(UnshareFlags::FILES), "see below");
    // SAFETY: only a table of descriptors that is no longer shared between threads makes this
    // call unsafe; there is one thread (`Alone`), and `FILES` is not asked for.
    unsafe { rustix::thread::unshare_unsafe(flags) }.map_err(Into::into)
}

/// Lets the children of the calling thread, and only those, be born into a new pid namespace.
pub(super) fn unshare_pid_for_children() -> io::Result<()> {
    // SAFETY: `FILES` is not asked for; what changes is where this thread's children are born.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWPID) }.map_err(Into::into)
}

/// Moves the calling thread, and only that, into a new network namespace.
pub(super) fn unshare_network() -> io::Result<()> {
    // SAFETY: `FILES` is not asked for; what changes is which network this thread sees.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }.map_err(Into::into)
}
