//! A client's connection that never blocks: opening it, writing a request, reading what comes.
//!
//! ```text
//!  Down ──open──▶ Connecting ──writable──▶ Open ──error, end──▶ Down (for a while)
//! ```
//!
//! A server that accepts nothing must not hold up a client that has a pace to keep; so connecting
//! is an event like all others.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::epoll;
use socket2::{Domain, Protocol, Socket, Type};

/// Longest answer that is kept.
pub(crate) const BUFFER_BYTES: usize = 16 << 10;
/// Between two attempts to open one connection.
const RETRY: Duration = Duration::from_millis(10);
/// An attempt that brought nothing for so long is given up, and begun again.
const CONNECT_PATIENCE: Duration = Duration::from_secs(2);

#[derive(Debug)]
enum State {
    Down { until: Instant },
    Connecting { stream: TcpStream, since: Instant },
    Open(TcpStream),
}

/// One connection, and the bytes of the answer that has come so far.
#[derive(Debug)]
pub(crate) struct Wire {
    state: State,
    buffer: Box<[u8]>,
    filled: usize,
}

/// What reading brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Received {
    /// Nothing more for now.
    Nothing,
    /// Something was added to the buffer.
    Some,
}

impl Wire {
    /// A connection that is to be opened at once.
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            state: State::Down { until: now },
            buffer: vec![0; BUFFER_BYTES].into(),
            filled: 0,
        }
    }

    pub(crate) const fn is_open(&self) -> bool {
        matches!(self.state, State::Open(_))
    }

    pub(crate) const fn is_connecting(&self) -> bool {
        matches!(self.state, State::Connecting { .. })
    }

    /// Whether it is time to open it, again or for the first time.
    pub(crate) fn is_due(&self, now: Instant) -> bool {
        match self.state {
            State::Down { until } => until <= now,
            State::Connecting { since, .. } => since + CONNECT_PATIENCE <= now,
            State::Open(_) => false,
        }
    }

    /// Begins to open it; the event that says how it went has `data`.
    pub(crate) fn open(
        &mut self,
        set: &OwnedFd,
        data: u64,
        to: SocketAddr,
        now: Instant,
    ) -> Result<()> {
        self.filled = 0;
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))
            .context("a socket for a client")?;
        socket.set_nonblocking(true)?;
        socket.set_tcp_nodelay(true)?;
        // Closed by a reset: thousands of closed connections must not use up the client's ports.
        socket.set_linger(Some(Duration::ZERO))?;
        match socket.connect(&to.into()) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(IN_PROGRESS) => {}
            Err(_) => {
                self.down(now);
                return Ok(());
            }
        }
        let stream = TcpStream::from(socket);
        let flags = epoll::EventFlags::IN | epoll::EventFlags::OUT;
        epoll::add(set, &stream, epoll::EventData::new_u64(data), flags)?;
        self.state = State::Connecting { stream, since: now };
        Ok(())
    }

    /// The kernel has something to say about an attempt to connect. Whether it is open now.
    pub(crate) fn connected(&mut self, set: &OwnedFd, data: u64, now: Instant) -> Result<bool> {
        let before = std::mem::replace(&mut self.state, State::Down { until: now });
        let State::Connecting { stream, .. } = before else {
            self.state = before;
            return Ok(self.is_open());
        };
        if stream.take_error()?.is_some() || stream.peer_addr().is_err() {
            self.down(now);
            return Ok(false);
        }
        epoll::modify(
            set,
            &stream,
            epoll::EventData::new_u64(data),
            epoll::EventFlags::IN,
        )?;
        self.state = State::Open(stream);
        Ok(true)
    }

    /// Closes it, to be opened again after a while.
    pub(crate) fn down(&mut self, now: Instant) {
        self.filled = 0;
        // Closing takes it out of the set.
        self.state = State::Down { until: now + RETRY };
    }

    /// Writes a request whole.
    ///
    /// # Errors
    /// It could not be: requests are far smaller than a socket's buffer, so the connection is of
    /// no use any more.
    pub(crate) fn send(&mut self, request: &[u8]) -> Result<()> {
        let State::Open(stream) = &mut self.state else {
            bail!("not connected");
        };
        match stream.write(request) {
            Ok(count) if count == request.len() => Ok(()),
            Ok(count) => bail!("{count} of {} bytes were taken", request.len()),
            Err(error) => Err(error.into()),
        }
    }

    /// Reads what is there, behind what is there already.
    ///
    /// # Errors
    /// The other side closed it, or the answer is too long.
    pub(crate) fn receive(&mut self) -> Result<Received> {
        let State::Open(stream) = &mut self.state else {
            return Ok(Received::Nothing);
        };
        if self.filled == BUFFER_BYTES {
            bail!("an answer longer than {BUFFER_BYTES} bytes");
        }
        match stream.read(&mut self.buffer[self.filled..]) {
            Ok(0) => bail!("closed by the other side"),
            Ok(count) => {
                self.filled += count;
                Ok(Received::Some)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(Received::Nothing),
            Err(error) => Err(error.into()),
        }
    }

    /// What has come.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.buffer[..self.filled]
    }

    /// Forgets what has come.
    pub(crate) const fn clear(&mut self) {
        self.filled = 0;
    }
}

/// What the kernel says of a connection that is being opened.
const IN_PROGRESS: i32 = rustix::io::Errno::INPROGRESS.raw_os_error();
