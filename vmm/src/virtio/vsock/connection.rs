//! One stream between a socket of the host and a socket of the guest.
//!
//! ```text
//!             CONNECT port           RESPONSE
//!   Greeting ─────────────▶ Asked ─────────────▶ Open ──▶ gone
//!                                                 ▲
//!   a guest's REQUEST that the host answers ──────┘
//! ```
//!
//! *Flow control* (virtio 1.2, 5.10.6.3). Each side says how much it has room for and how much of
//! what it got it has passed on, both modulo 2^32. The guest may have [`ROOM_BYTES`] with us that
//! the host's socket has not taken; one that sends more is reset. We send no more than the guest
//! has room for, and read no more from the socket than we can send, so what piles up piles up in
//! the socket.
//!
//! *Ends.* Each direction ends on its own. When both have, or when either side resets, the
//! connection is gone.

use std::collections::VecDeque;
use std::io::{self, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use super::packet::{Credit, Header, Operation, Ports, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// What the guest may send before the host's socket has taken any of it.
pub(super) const ROOM_BYTES: u32 = 64 << 10;
/// The guest is told of room when this much of it came free since it was told last.
const UPDATE_BYTES: u32 = ROOM_BYTES / 4;
/// "CONNECT 4294967295\n", and some spaces.
const GREETING_BYTES: usize = 32;

/// How far the connection is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Phase {
    /// The host's client says which port it wants; so far it said this.
    Greeting(Vec<u8>),
    /// The guest was asked.
    Asked,
    /// Data flows.
    Open,
}

/// One packet that the guest is to get, beside data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Due {
    request: bool,
    response: bool,
    credit_update: bool,
    credit_request: bool,
    shutdown: bool,
}

/// What becomes of a connection after a packet or an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    Lives,
    /// Gone; the guest is told by a reset.
    Reset,
    /// Gone; the guest knows, or never knew.
    Gone,
}

#[derive(Debug)]
pub(super) struct Connection {
    pub(super) ports: Ports,
    pub(super) phase: Phase,
    socket: UnixStream,
    due: Due,
    /// From the guest, for the socket.
    outgoing: VecDeque<u8>,
    /// All bytes that came from the guest, modulo 2^32.
    received: u32,
    /// What of them the socket took.
    forwarded: u32,
    /// What of that the guest knows.
    told: u32,
    /// What the guest said last.
    credit: Credit,
    /// All bytes that went to the guest, modulo 2^32.
    sent: u32,
    /// The socket had something to read when it was looked at.
    pub(super) readable: bool,
    /// The socket gives no more.
    socket_ended: bool,
    /// The guest sends no more, or takes no more.
    guest_ended: u32,
    /// The guest was asked for room, and has not answered.
    asked_for_room: bool,
}

impl Connection {
    /// A client of the host, which has not yet said what it wants.
    pub(super) fn greeting(socket: UnixStream) -> Self {
        let ports = Ports { host: 0, guest: 0 };
        Self::new(socket, ports, Phase::Greeting(Vec::new()))
    }

    /// A guest's request, which the host's socket has answered.
    pub(super) fn accepted(socket: UnixStream, request: &Header) -> Self {
        let mut connection = Self::new(socket, request.ports, Phase::Open);
        connection.credit = request.credit;
        connection.due.response = true;
        connection
    }

    fn new(socket: UnixStream, ports: Ports, phase: Phase) -> Self {
        Self {
            ports,
            phase,
            socket,
            due: Due::default(),
            outgoing: VecDeque::new(),
            received: 0,
            forwarded: 0,
            told: 0,
            credit: Credit::default(),
            sent: 0,
            readable: false,
            socket_ended: false,
            guest_ended: 0,
            asked_for_room: false,
        }
    }

    /// The guest does not know of it.
    pub(super) fn is_greeting(&self) -> bool {
        matches!(self.phase, Phase::Greeting(_))
    }

    pub(super) fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Whether to wait for the socket to have something.
    pub(super) fn wants_to_read(&self) -> bool {
        match self.phase {
            Phase::Greeting(_) => true,
            Phase::Asked => false,
            Phase::Open => !self.readable && !self.socket_ended && self.guest_takes_data(),
        }
    }

    /// Whether to wait for the socket to take something.
    pub(super) fn wants_to_write(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Whether there is a packet for the guest, as far as is known without reading the socket.
    pub(super) fn has_packet(&self) -> bool {
        let open = self.phase == Phase::Open;
        self.due != Due::default() || open && self.readable && self.guest_takes_data()
    }

    fn guest_takes_data(&self) -> bool {
        self.guest_ended & SHUTDOWN_RECEIVE == 0 && self.may_send() > 0
    }

    /// Bytes that the guest has room for.
    pub(super) fn may_send(&self) -> u32 {
        let under_way = self.sent.wrapping_sub(self.credit.forwarded);
        // A guest that claims to have passed on more than it got has room for nothing.
        self.credit.room_bytes.saturating_sub(under_way)
    }

    /// Reads what the client says. `Ok(Some)` is the port that it wants.
    pub(super) fn greet(&mut self) -> Result<Option<u32>, Fate> {
        let Phase::Greeting(said) = &mut self.phase else {
            return Ok(None);
        };
        // Byte by byte, since what comes after the line is the guest's.
        let mut byte = [0];
        while said.len() < GREETING_BYTES {
            match self.socket.read(&mut byte) {
                Ok(1) if byte != *b"\n" => said.extend(byte),
                Ok(1) => return port_of(said).map(Some).ok_or(Fate::Gone),
                Err(error) if is_later(&error) => return Ok(None),
                _ => return Err(Fate::Gone),
            }
        }
        Err(Fate::Gone)
    }

    /// The client's wish goes to the guest.
    pub(super) fn ask(&mut self, ports: Ports) {
        self.ports = ports;
        self.phase = Phase::Asked;
        self.due.request = true;
    }

    /// A packet of the guest without data.
    pub(super) fn receive(&mut self, header: &Header) -> Fate {
        self.credit = header.credit;
        match (header.operation, &self.phase) {
            (Operation::Response, Phase::Asked) => {
                self.phase = Phase::Open;
                let answer = format!("OK {}\n", self.ports.host);
                // The first that the client gets: where it does not fit, the client is gone.
                match self.socket.write(answer.as_bytes()) {
                    Ok(written) if written == answer.len() => Fate::Lives,
                    _ => Fate::Reset,
                }
            }
            (Operation::CreditUpdate, Phase::Open) => {
                self.asked_for_room = false;
                Fate::Lives
            }
            (Operation::CreditRequest, Phase::Open) => {
                self.due.credit_update = true;
                Fate::Lives
            }
            (Operation::Shutdown, Phase::Open) => {
                self.guest_ended |= header.flags & (SHUTDOWN_RECEIVE | SHUTDOWN_SEND);
                self.flush()
            }
            (Operation::Reset, _) => Fate::Gone,
            _ => Fate::Reset,
        }
    }

    /// Data of the guest.
    pub(super) fn receive_data(&mut self, header: &Header, data: &[u8]) -> Fate {
        self.credit = header.credit;
        let bytes = length(data.len());
        let held = self.received.wrapping_sub(self.forwarded);
        let fits = bytes <= ROOM_BYTES.saturating_sub(held);
        if self.phase != Phase::Open || self.guest_ended & SHUTDOWN_SEND != 0 || !fits {
            return Fate::Reset;
        }
        self.received = self.received.wrapping_add(bytes);
        let mut data = data;
        if self.outgoing.is_empty() {
            match self.socket.write(data) {
                Ok(taken) => {
                    self.forwarded = self.forwarded.wrapping_add(length(taken));
                    data = data.get(taken..).unwrap_or_default();
                }
                Err(error) if is_later(&error) => {}
                Err(_) => return Fate::Reset,
            }
        }
        self.outgoing.extend(data);
        self.tell_of_room();
        Fate::Lives
    }

    /// The socket takes more: gives it what waits.
    pub(super) fn flush(&mut self) -> Fate {
        while !self.outgoing.is_empty() {
            let (first, _) = self.outgoing.as_slices();
            match self.socket.write(first) {
                Ok(taken) => {
                    self.outgoing.drain(..taken);
                    self.forwarded = self.forwarded.wrapping_add(length(taken));
                }
                Err(error) if is_later(&error) => break,
                Err(_) => return Fate::Reset,
            }
        }
        if self.outgoing.is_empty() {
            // What a burst took does not stay taken.
            self.outgoing.shrink_to(4096);
            if self.guest_ended & SHUTDOWN_SEND != 0 {
                // Fails only where the other side is gone.
                let _ = self.socket.shutdown(Shutdown::Write);
            }
        }
        self.tell_of_room();
        let both = self.guest_ended == SHUTDOWN_RECEIVE | SHUTDOWN_SEND;
        // 5.10.6.5: a reset says that the shutdown is complete.
        if both && self.outgoing.is_empty() {
            Fate::Reset
        } else {
            Fate::Lives
        }
    }

    fn tell_of_room(&mut self) {
        if self.phase == Phase::Open && self.forwarded.wrapping_sub(self.told) >= UPDATE_BYTES {
            self.due.credit_update = true;
        }
    }

    /// The next packet without data, if one is due.
    pub(super) fn take_due(&mut self) -> Option<Header> {
        let due = &mut self.due;
        let (flag, operation) = if due.request {
            (&mut due.request, Operation::Request)
        } else if due.response {
            (&mut due.response, Operation::Response)
        } else if due.credit_update {
            (&mut due.credit_update, Operation::CreditUpdate)
        } else if due.credit_request {
            (&mut due.credit_request, Operation::CreditRequest)
        } else if due.shutdown {
            (&mut due.shutdown, Operation::Shutdown)
        } else {
            return None;
        };
        *flag = false;
        let mut header = self.header(operation);
        if operation == Operation::Shutdown {
            header.flags = SHUTDOWN_SEND;
        }
        Some(header)
    }

    /// Any packet tells the guest of our room.
    pub(super) fn header(&mut self, operation: Operation) -> Header {
        self.told = self.forwarded;
        self.due.credit_update &= operation == Operation::CreditUpdate;
        Header {
            credit: Credit {
                room_bytes: ROOM_BYTES,
                forwarded: self.forwarded,
            },
            ..Header::new(self.ports, operation)
        }
    }

    /// What reading the socket into a packet gave.
    pub(super) fn was_read(&mut self, outcome: io::Result<u64>) -> Result<Option<u32>, Fate> {
        match outcome {
            Ok(0) => {
                self.readable = false;
                self.socket_ended = true;
                self.due.shutdown = true;
                Ok(None)
            }
            Ok(bytes) => {
                let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
                self.sent = self.sent.wrapping_add(bytes);
                if self.may_send() == 0 && !self.asked_for_room {
                    self.asked_for_room = true;
                    self.due.credit_request = true;
                }
                Ok(Some(bytes))
            }
            Err(error) if is_later(&error) => {
                self.readable = false;
                Ok(None)
            }
            Err(_) => Err(Fate::Reset),
        }
    }
}

/// "CONNECT 1234".
fn port_of(line: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(line).ok()?;
    let port = text.strip_prefix("CONNECT ")?;
    port.trim_ascii().parse().ok()
}

fn is_later(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

/// Lengths here are at most those of a packet.
fn length(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}
