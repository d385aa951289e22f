//! Random bytes from the kernel, by the system call and nothing else: what looks for another source
//! opens files, which the jail does not let it.

use std::io;

use rustix::rand::{GetRandomFlags, getrandom};

/// Fills all of it.
///
/// # Errors
/// The kernel's.
pub(crate) fn fill(mut bytes: &mut [u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match getrandom(&mut *bytes, GetRandomFlags::empty()) {
            Ok(filled) => bytes = bytes.get_mut(filled..).unwrap_or_default(),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
