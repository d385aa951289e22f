//! A tap: one end of a wire whose other end is an interface of the host's kernel (kernel,
//! `Documentation/networking/tuntap.rst`).
#![allow(
    unsafe_code,
    reason = "the ioctls of a tap, which no crate that we use wraps"
)]

use std::ffi::{c_int, c_short, c_uint};
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::str::FromStr;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO,
};

use super::header::HEADER_BYTES;

/// What features of the driver let the kernel leave to it.
const OFFLOADS: [(u32, c_uint); 5] = [
    (VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
    (VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN),
    (VIRTIO_NET_F_GUEST_UFO, libc::TUN_F_UFO),
];

/// The name of an interface: up to 15 bytes of letters, digits, `-`, `_` and `.`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct InterfaceName([u8; libc::IFNAMSIZ]);

/// Not a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{given:?} is no interface name: 1 to 15 letters, digits, '-', '_' or '.'")]
pub struct InterfaceNameError {
    /// What was given.
    pub given: String,
}

impl FromStr for InterfaceName {
    type Err = InterfaceNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut name = [0; libc::IFNAMSIZ];
        let good = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        let fits = !text.is_empty() && text.len() < name.len();
        // The kernel takes neither for a device (`dev_valid_name`).
        let special = matches!(text, "." | "..");
        if !fits || special || !text.bytes().all(good) {
            let given = text.chars().take(40).collect();
            return Err(InterfaceNameError { given });
        }
        for (to, from) in name.iter_mut().zip(text.bytes()) {
            *to = from;
        }
        Ok(Self(name))
    }
}

impl fmt::Display for InterfaceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = self.0.split(|byte| *byte == 0).next().unwrap_or_default();
        f.write_str(&String::from_utf8_lossy(text))
    }
}

impl fmt::Debug for InterfaceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// The descriptor, and what it takes.
#[derive(Debug)]
pub struct Tap {
    descriptor: OwnedFd,
    wire: Wire,
}

/// What is at the other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wire {
    /// The kernel.
    Interface,
    /// A test, which takes everything.
    #[cfg(test)]
    Socket,
}

impl Tap {
    /// Makes an interface, or takes over a persistent one, with an open `/dev/net/tun`. For the
    /// host, which then brings the interface up and hands the [descriptor](Self::into_descriptor)
    /// to the monitor.
    ///
    /// # Errors
    /// The kernel's: without `CAP_NET_ADMIN` there is no new interface.
    pub fn attach(tun: File, name: InterfaceName) -> io::Result<Self> {
        // `TUNSETIFF` takes an ifreq: a name, and flags in the first two of 24 bytes.
        #[repr(C)]
        struct Request {
            name: [u8; libc::IFNAMSIZ],
            flags: c_short,
            rest: [u8; 22],
        }
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        let request = Request {
            name: name.0,
            flags: c_short::try_from(flags).map_err(io::Error::other)?,
            rest: [0; 22],
        };
        // SAFETY: the ioctl reads and writes an ifreq, which `Request` has size and form of, and
        // which lives until the call returns.
        let done = unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETIFF, &raw const request) };
        check(done)?;
        Self::adopt(tun.into())
    }

    /// Takes a descriptor that is attached to a tap interface already.
    ///
    /// # Errors
    /// It is no tap with offload headers.
    pub fn adopt(descriptor: OwnedFd) -> io::Result<Self> {
        let flags = fcntl_getfl(&descriptor)?;
        fcntl_setfl(&descriptor, flags | OFlags::NONBLOCK)?;
        let bytes = c_int::try_from(HEADER_BYTES).map_err(io::Error::other)?;
        let tap = descriptor.as_raw_fd();
        // SAFETY: the ioctl reads an int through the pointer, which lives until the call returns.
        let done = unsafe { libc::ioctl(tap, libc::TUNSETVNETHDRSZ, &raw const bytes) };
        check(done)?;
        let wire = Wire::Interface;
        Ok(Self { descriptor, wire })
    }

    /// One end of a pair of datagram sockets, in place of an interface.
    #[cfg(test)]
    pub(super) fn from_socket(socket: std::os::unix::net::UnixDatagram) -> Self {
        socket.set_nonblocking(true).expect("a socket");
        Self {
            descriptor: socket.into(),
            wire: Wire::Socket,
        }
    }

    /// What the monitor is handed.
    #[must_use]
    pub fn into_descriptor(self) -> OwnedFd {
        self.descriptor
    }

    /// Tells the kernel what it may leave to the driver, after what the driver accepted.
    pub(super) fn set_offloads(&self, accepted: u64) -> io::Result<()> {
        match self.wire {
            Wire::Interface => {}
            #[cfg(test)]
            Wire::Socket => return Ok(()),
        }
        let wanted = OFFLOADS
            .iter()
            .filter(|(feature, _)| accepted & 1 << feature != 0);
        let flags = wanted.fold(0, |flags, (_, offload)| flags | offload);
        let tap = self.descriptor.as_raw_fd();
        // SAFETY: the ioctl takes its argument by value.
        let done = unsafe { libc::ioctl(tap, libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) };
        check(done)
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

fn check(returned: c_int) -> io::Result<()> {
    if returned < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_what_the_kernel_takes() {
        for good in ["t", "ins-0123456789a", "a.b_c"] {
            let name: InterfaceName = good.parse().expect(good);
            assert_eq!(name.to_string(), good);
        }
        for bad in ["", ".", "..", "a/b", "a b", "a:b", "0123456789abcdef", "ü"] {
            bad.parse::<InterfaceName>().expect_err(bad);
        }
    }

    #[test]
    fn what_is_no_tap_is_refused() {
        let file = tempfile::tempfile().expect("a file");
        Tap::adopt(file.into()).expect_err("a file");
    }
}
