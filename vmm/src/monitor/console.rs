//! The console's other side: what the guest printed last, and the terminals that look at it.
//!
//! ```text
//!  vCPU threads ─▶ Printed ─▶ ring ──(event)──▶ API thread ─▶ each terminal, as fast as it reads
//!  console thread ◀─ socket pair ◀────────────── API thread ◀─ each terminal
//! ```
//!
//! A vCPU never waits for a terminal: it writes into the ring, and wakes the API thread once for
//! all that comes until that has looked. A terminal that falls behind by more than the ring loses
//! the oldest part. A new terminal gets what is in the ring first. What is typed goes on when the
//! port takes it; until then no terminal is read.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use crate::event::Event;

/// What is kept for those who come later: some screens of text.
const RING_BYTES: usize = 64 << 10;
/// What is moved at once.
const CHUNK_BYTES: usize = 4 << 10;
/// Terminals at once.
const TERMINALS_MAX: usize = 8;

struct Ring {
    bytes: VecDeque<u8>,
    /// Of the guest's output, how much came before the first byte here.
    start: u64,
    /// The API thread has been woken, and has not looked yet.
    woken: bool,
}

struct Shared {
    ring: Mutex<Ring>,
    printed: Event,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The guest's end.
pub(super) struct Printed(Arc<Shared>);

impl Write for Printed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut ring = self.0.lock();
        ring.bytes.extend(bytes);
        let surplus = ring.bytes.len().saturating_sub(RING_BYTES);
        ring.bytes.drain(..surplus);
        ring.start = ring.start.wrapping_add(surplus as u64);
        if !ring.woken {
            ring.woken = true;
            self.0.printed.raise();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Terminal {
    socket: OwnedFd,
    /// Up to where in the guest's output it has read.
    read: u64,
}

/// The API thread's end.
pub(super) struct Hub {
    shared: Arc<Shared>,
    terminals: Vec<Terminal>,
    /// Towards the console thread.
    keyboard: OwnedFd,
    /// Typed, and not taken by the port yet.
    typed: Vec<u8>,
}

/// No terminal more.
#[derive(Debug, thiserror::Error)]
pub(super) enum AttachError {
    #[error("the console has {TERMINALS_MAX} terminals already")]
    Full,
    #[error("the descriptor cannot be a terminal: {0}")]
    Socket(#[from] io::Error),
}

impl Hub {
    /// The hub, where the guest prints, and where its input comes from.
    pub(super) fn new() -> io::Result<(Self, Printed, OwnedFd)> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (keyboard, input) = socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        let shared = Arc::new(Shared {
            ring: Mutex::new(Ring {
                bytes: VecDeque::with_capacity(RING_BYTES),
                start: 0,
                woken: false,
            }),
            printed: Event::new()?,
        });
        let printed = Printed(Arc::clone(&shared));
        let hub = Self {
            shared,
            terminals: Vec::new(),
            keyboard,
            typed: Vec::new(),
        };
        Ok((hub, printed, input))
    }

    /// One more terminal; the ring's content comes first.
    pub(super) fn attach(&mut self, socket: OwnedFd) -> Result<(), AttachError> {
        if self.terminals.len() >= TERMINALS_MAX {
            return Err(AttachError::Full);
        }
        rustix::io::ioctl_fionbio(&socket, true).map_err(io::Error::from)?;
        let read = self.shared.lock().start;
        self.terminals.push(Terminal { socket, read });
        self.print();
        Ok(())
    }

    /// What to wait for.
    pub(super) fn interests(&self) -> Vec<(BorrowedFd<'_>, PollFlags)> {
        let mut all = vec![(self.shared.printed.as_fd(), PollFlags::IN)];
        if !self.typed.is_empty() {
            all.push((self.keyboard.as_fd(), PollFlags::OUT));
        }
        let end = self.end();
        for terminal in &self.terminals {
            let mut wanted = PollFlags::empty();
            if self.typed.is_empty() {
                wanted |= PollFlags::IN;
            }
            if terminal.read != end {
                wanted |= PollFlags::OUT;
            }
            // With nothing wanted, a terminal that is gone is still noticed.
            all.push((terminal.socket.as_fd(), wanted));
        }
        all
    }

    /// Moves what can be moved.
    pub(super) fn turn(&mut self) {
        self.shared.printed.clear();
        self.print();
        self.pass_on();
        self.listen();
        self.pass_on();
    }

    fn end(&self) -> u64 {
        let ring = self.shared.lock();
        ring.start.wrapping_add(ring.bytes.len() as u64)
    }

    /// Ring to terminals.
    fn print(&mut self) {
        self.shared.lock().woken = false;
        let shared = &self.shared;
        self.terminals.retain_mut(|terminal| {
            loop {
                let mut chunk = [0; CHUNK_BYTES];
                let length = copy(&shared.lock(), &mut terminal.read, &mut chunk);
                if length == 0 {
                    return true;
                }
                match rustix::io::write(&terminal.socket, &chunk[..length]) {
                    Ok(written) => terminal.read = terminal.read.wrapping_add(written as u64),
                    Err(Errno::AGAIN) => return true,
                    Err(Errno::INTR) => {}
                    Err(_) => return false,
                }
            }
        });
    }

    /// Terminals to `typed`, as long as nothing waits there.
    fn listen(&mut self) {
        let typed = &mut self.typed;
        self.terminals.retain(|terminal| {
            if !typed.is_empty() {
                return true;
            }
            let mut chunk = [0; CHUNK_BYTES];
            match rustix::io::read(&terminal.socket, &mut chunk) {
                Ok(0) => false,
                Ok(length) => {
                    typed.extend_from_slice(&chunk[..length]);
                    true
                }
                Err(Errno::AGAIN | Errno::INTR) => true,
                Err(_) => false,
            }
        });
    }

    /// `typed` to the console thread.
    fn pass_on(&mut self) {
        if self.typed.is_empty() {
            return;
        }
        match rustix::io::write(&self.keyboard, &self.typed) {
            Ok(written) => drop(self.typed.drain(..written)),
            Err(Errno::AGAIN | Errno::INTR) => {}
            // The console thread is gone, and with it whoever would read this.
            Err(_) => self.typed.clear(),
        }
    }
}

/// Copies from `read` on, which is moved forward to what is still there.
fn copy(ring: &Ring, read: &mut u64, chunk: &mut [u8]) -> usize {
    let Some(skip) = read.checked_sub(ring.start) else {
        *read = ring.start;
        return copy(ring, read, chunk);
    };
    let skip = usize::try_from(skip).unwrap_or(usize::MAX);
    let mut length = 0;
    for (to, from) in chunk.iter_mut().zip(ring.bytes.iter().skip(skip)) {
        *to = *from;
        length += 1;
    }
    length
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn terminal(hub: &mut Hub) -> UnixStream {
        let (here, there) = UnixStream::pair().expect("a pair");
        hub.attach(there.into()).expect("room");
        here.set_nonblocking(true).expect("a socket");
        here
    }

    /// Reads until it would wait.
    fn all(terminal: &mut UnixStream) -> Vec<u8> {
        let mut bytes = Vec::new();
        let _ = terminal.read_to_end(&mut bytes);
        bytes
    }

    #[test]
    fn a_terminal_that_comes_later_sees_what_was_printed() {
        let (mut hub, mut printed, _input) = Hub::new().expect("a hub");
        printed.write_all(b"early ").expect("taken");
        let mut first = terminal(&mut hub);
        printed.write_all(b"late").expect("taken");
        hub.turn();
        let mut second = terminal(&mut hub);
        assert_eq!(all(&mut first), b"early late");
        assert_eq!(all(&mut second), b"early late");
    }

    #[test]
    fn one_that_does_not_read_loses_the_oldest_and_holds_up_nobody() {
        let (mut hub, mut printed, _input) = Hub::new().expect("a hub");
        let mut slow = terminal(&mut hub);
        for round in 0..100_u32 {
            let line = [b'a' + u8::try_from(round % 26).expect("a letter"); 16 << 10];
            printed.write_all(&line).expect("taken");
            hub.turn();
        }
        let mut quick = terminal(&mut hub);
        assert_eq!(all(&mut quick).len(), RING_BYTES);
        let (mut seen, mut more) = (Vec::new(), all(&mut slow));
        while !more.is_empty() {
            seen.extend(more);
            hub.turn();
            more = all(&mut slow);
        }
        assert!(seen.len() < 100 * (16 << 10));
        assert!(seen.ends_with(&[b'a' + 99 % 26; 16 << 10]));
    }

    #[test]
    fn what_is_typed_arrives_once_and_in_order() {
        let (mut hub, _printed, input) = Hub::new().expect("a hub");
        let mut input = UnixStream::from(input);
        let mut typist = terminal(&mut hub);
        let text: Vec<u8> = (0..=255).cycle().take(1 << 20).collect();
        let (mut sent, mut seen) = (0, Vec::new());
        while seen.len() < text.len() {
            if let Ok(length) = typist.write(&text[sent..]) {
                sent += length;
            }
            hub.turn();
            seen.extend(all(&mut input));
        }
        assert!(seen == text);
    }

    #[test]
    fn terminals_are_bounded_and_go_away() {
        let (mut hub, mut printed, _input) = Hub::new().expect("a hub");
        let terminals: Vec<_> = (0..TERMINALS_MAX).map(|_| terminal(&mut hub)).collect();
        let (_here, there) = UnixStream::pair().expect("a pair");
        let refused = hub.attach(there.into()).expect_err("full");
        assert!(matches!(refused, AttachError::Full));
        drop(terminals);
        printed.write_all(b"x").expect("taken");
        hub.turn();
        assert!(hub.terminals.is_empty());
    }
}
