//! How a guest's connections find a socket of the host.

use std::fmt;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

/// Answers a guest that connects to a port of the host.
pub trait Dial: Send + fmt::Debug {
    /// A connected socket that does not block. Must not wait.
    ///
    /// # Errors
    /// Nobody listens there: the guest's connection is refused.
    fn dial(&self, port: u32) -> io::Result<UnixStream>;
}

/// Nobody listens anywhere.
#[derive(Debug, Clone, Copy, Default)]
pub struct Nobody;

impl Dial for Nobody {
    fn dial(&self, _port: u32) -> io::Result<UnixStream> {
        Err(io::ErrorKind::ConnectionRefused.into())
    }
}

/// For port `P` the Unix socket at `PREFIX_P`, as other monitors have it. The guest chooses the
/// number and nothing else of the path.
#[derive(Debug, Clone)]
pub struct BesidePath {
    prefix: PathBuf,
}

impl BesidePath {
    /// # Errors
    /// A path that leaves no room for a port in a socket's address, or holds a zero.
    pub fn new(prefix: PathBuf) -> io::Result<Self> {
        let dialer = Self { prefix };
        dialer.address(u32::MAX)?;
        Ok(dialer)
    }

    fn address(&self, port: u32) -> io::Result<SocketAddrUnix> {
        let mut path = self.prefix.clone().into_os_string();
        path.push(format!("_{port}"));
        Ok(SocketAddrUnix::new(PathBuf::from(path))?)
    }
}

impl Dial for BesidePath {
    fn dial(&self, port: u32) -> io::Result<UnixStream> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        // A Unix socket connects at once, or says that its listener's queue is full.
        connect(&socket, &self.address(port)?)?;
        Ok(socket.into())
    }
}
