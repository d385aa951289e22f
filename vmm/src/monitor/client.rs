//! The host's end of the control socket.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::launch;
use super::protocol::{self, PacketError, Reply, Request};
use super::wire::{self, Outgoing};

/// Why a request was not done.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The monitor said no; nothing has changed.
    #[error("{0}")]
    Refused(String),
    /// Nobody is there any more.
    #[error("the monitor is gone")]
    Gone,
    /// It did not answer.
    #[error("the monitor did not answer within {} ms", waited.as_millis())]
    Silent {
        /// For how long it was waited.
        waited: Duration,
    },
    /// Request or answer cannot be understood.
    #[error(transparent)]
    Packet(#[from] PacketError),
    /// The answer is to another question.
    #[error("the monitor answered something else")]
    Confused,
    /// The socket.
    #[error("speaking with the monitor: {0}")]
    Socket(#[from] io::Error),
}

/// A connection to one monitor.
#[derive(Debug)]
pub struct Client {
    socket: OwnedFd,
}

impl Client {
    /// Connects to the monitor that listens as `name` in `directory`.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn connect(directory: &Path, name: &str) -> io::Result<Self> {
        let socket = launch::connect_to(directory, name)?;
        Ok(Self { socket })
    }

    /// The monitor's process, as the caller's pid namespace numbers it: the one that made the socket
    /// listen when this connection was made, which is a monitor once it has answered anybody.
    ///
    /// # Errors
    /// The socket's.
    pub fn monitor_pid(&self) -> io::Result<u32> {
        let peer = rustix::net::sockopt::socket_peercred(&self.socket)?;
        u32::try_from(peer.pid.as_raw_nonzero().get()).map_err(io::Error::other)
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn call(
        &self,
        request: &Request,
        with: &Outgoing<'_>,
        patience: Duration,
    ) -> Result<Reply, CallError> {
        let bytes = protocol::encode(request)?;
        wire::send(self.socket.as_fd(), &bytes, with.as_slice()).map_err(gone)?;
        self.wait(patience)?;
        match wire::receive(&self.socket).map_err(gone)? {
            None => Err(CallError::Gone),
            Some((bytes, _)) => match protocol::decode(&bytes)? {
                Reply::Refused { why } => Err(CallError::Refused(why)),
                reply => Ok(reply),
            },
        }
    }

    /// Asks for something that has no answer but that it is done.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn order(
        &self,
        request: &Request,
        with: &Outgoing<'_>,
        patience: Duration,
    ) -> Result<(), CallError> {
        match self.call(request, with, patience)? {
            Reply::Done => Ok(()),
            _ => Err(CallError::Confused),
        }
    }

    fn wait(&self, patience: Duration) -> Result<(), CallError> {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left == Duration::ZERO {
                return Err(CallError::Silent { waited: patience });
            }
            let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
            let mut polled = [PollFd::new(&self.socket, PollFlags::IN)];
            match poll(&mut polled, Some(&timeout)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(error) => return Err(CallError::Socket(error.into())),
            }
        }
    }
}

impl AsFd for Client {
    /// Readable, while nothing is asked, when the monitor is gone.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn gone(error: io::Error) -> CallError {
    match error.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => CallError::Gone,
        _ => CallError::Socket(error),
    }
}
