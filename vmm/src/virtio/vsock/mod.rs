//! Sockets between guest and host (virtio 1.2, 5.10), without a network.
//!
//! ```text
//!   client ──▶ Unix socket of the machine ── "CONNECT 52\n" ──▶ guest's port 52
//!          ◀── "OK 1073741824\n", then what the guest sends
//!   guest ──▶ host's port 80 ──▶ whoever listens there (Dial): the Unix socket PATH_80
//! ```
//!
//! *Bounds.* [`CONNECTIONS_MAX`] connections that the guest began, and as many that clients began,
//! so that neither locks the other out; clients that have not got through yet give way, the oldest
//! first, to newer ones. A connection keeps at most 64 KiB. Resets for packets that belong to no
//! connection wait in a queue of their own; while it is full the guest's packets wait, too.
//!
//! *Turns.* Buffers that the driver offers go round the connections that have something.
//!
//! *Snapshots.* A connection does not outlive one: the restored guest is told that its transport
//! was reset (5.10.6.7), closes all sockets, and reads its address again.

mod clients;
mod connection;
mod host;
mod packet;
mod packets;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::config_space::ConfigSpace;
use super::device::{
    DeviceError, DeviceKind, DeviceState, Interest, QueueSpec, Readiness, VirtioDevice,
};
use super::queue::Queues;

use connection::Connection;
pub use host::{BesidePath, Dial, Nobody};
use packet::Header;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const EVENT: usize = 2;
const QUEUE_SIZE: u16 = 128;
const EVENT_QUEUE_SIZE: u16 = 16;

/// Connections of each side's beginning.
pub const CONNECTIONS_MAX: usize = 64;
/// Clients that have not got through to the guest.
const PENDING_MAX: usize = 32;
/// Resets that wait for the driver.
const REPLIES_MAX: usize = 256;
/// Clients that are let in in one turn.
const ACCEPTED_AT_ONCE: usize = 16;
/// Data of one packet (`VIRTIO_VSOCK_MAX_PKT_BUF_SIZE` of Linux).
const DATA_MAX_BYTES: u32 = 64 << 10;
/// `HEADER_BYTES` as lengths in chains are counted.
const NARROW_HEADER: u32 = 44;
/// Host's ports of connections that clients begin; lower ones are for listeners.
const FIRST_CLIENT_PORT: u32 = 1 << 30;

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`
const TRANSPORT_RESET: [u8; 4] = [0; 4];

const QUEUES: [QueueSpec; 3] = [
    QueueSpec {
        max_size: QUEUE_SIZE,
        max_chain_bytes: 128 << 10,
    },
    QueueSpec {
        max_size: QUEUE_SIZE,
        max_chain_bytes: 128 << 10,
    },
    QueueSpec {
        max_size: EVENT_QUEUE_SIZE,
        max_chain_bytes: 4096,
    },
];

/// The guest's address: neither the host's nor one with a meaning of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestCid(u32);

/// Not a guest's address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{cid} is no guest's vsock address: from 3 to 4294967294")]
pub struct GuestCidError {
    /// What was given.
    pub cid: u32,
}

impl GuestCid {
    /// # Errors
    /// One that is reserved (`vm_sockets.h`).
    pub fn new(cid: u32) -> Result<Self, GuestCidError> {
        if (3..u32::MAX).contains(&cid) {
            Ok(Self(cid))
        } else {
            Err(GuestCidError { cid })
        }
    }
}

/// What a socket device did so far.
#[derive(Debug, Default)]
pub struct SocketCounts {
    connections: AtomicU64,
    refused: AtomicU64,
    to_guest_bytes: AtomicU64,
    from_guest_bytes: AtomicU64,
}

impl SocketCounts {
    /// Connections begun, connections and packets refused, bytes to the guest, bytes from it.
    #[must_use]
    pub fn read(&self) -> [u64; 4] {
        [
            &self.connections,
            &self.refused,
            &self.to_guest_bytes,
            &self.from_guest_bytes,
        ]
        .map(|count| count.load(Ordering::Relaxed))
    }
}

fn add(count: &AtomicU64, more: u32) {
    count.fetch_add(u64::from(more), Ordering::Relaxed);
}

/// Names a connection for as long as it lives, and is not used again.
type ConnectionId = u64;

/// The listener's token; connections' are their ids, from one on.
const LISTENER: u64 = 0;

/// The device.
#[derive(Debug)]
pub struct Vsock {
    cid: u64,
    config: Arc<ConfigSpace>,
    counts: Arc<SocketCounts>,
    listener: Option<UnixListener>,
    dial: Box<dyn Dial>,
    /// Whether the system has descriptors for more clients.
    accepts: bool,
    connections: BTreeMap<ConnectionId, Connection>,
    last_id: ConnectionId,
    next_port: u32,
    /// Who got the last buffer.
    turn: ConnectionId,
    replies: VecDeque<Header>,
    /// The guest's packets wait until there is room for replies.
    transmit_waits: bool,
    /// The guest has to be told that its connections are gone.
    reset_due: bool,
    /// A packet's data, on its way to a socket.
    data: Vec<u8>,
}

impl Vsock {
    /// A device for the guest with this address. Clients come in through `listener`.
    ///
    /// # Errors
    /// The listener cannot be set not to block.
    pub fn new(
        cid: GuestCid,
        listener: Option<UnixListener>,
        dial: Box<dyn Dial>,
    ) -> io::Result<Self> {
        if let Some(listener) = &listener {
            listener.set_nonblocking(true)?;
        }
        let cid = u64::from(cid.0);
        Ok(Self {
            cid,
            config: Arc::new(ConfigSpace::new(cid.to_le_bytes().to_vec(), 0..0)),
            counts: Arc::default(),
            listener,
            dial,
            accepts: true,
            connections: BTreeMap::new(),
            last_id: LISTENER,
            next_port: FIRST_CLIENT_PORT,
            turn: LISTENER,
            replies: VecDeque::new(),
            transmit_waits: false,
            reset_due: false,
            data: Vec::new(),
        })
    }

    /// What it does, for whoever meters it.
    #[must_use]
    pub fn counts(&self) -> Arc<SocketCounts> {
        Arc::clone(&self.counts)
    }
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Socket
    }

    fn features(&self) -> u64 {
        0
    }

    fn queues(&self) -> &[QueueSpec] {
        &QUEUES
    }

    fn config(&self) -> &Arc<ConfigSpace> {
        &self.config
    }

    fn activate(&mut self, _accepted: u64) -> Result<(), DeviceError> {
        Ok(())
    }

    fn queue_notified(&mut self, index: usize, queues: &mut Queues) -> Result<(), DeviceError> {
        match index {
            RECEIVE => {}
            TRANSMIT => self.transmit(queues)?,
            _ => self.announce_reset(queues)?,
        }
        self.receive(queues)
    }

    fn interests<'d>(&'d self, into: &mut Vec<Interest<'d>>) {
        if let (Some(listener), true) = (&self.listener, self.accepts) {
            into.push(Interest {
                descriptor: listener.as_fd(),
                readiness: Readiness::Readable,
                token: LISTENER,
            });
        }
        for (id, connection) in &self.connections {
            let readiness = match (connection.wants_to_read(), connection.wants_to_write()) {
                (true, true) => Readiness::Both,
                (true, false) => Readiness::Readable,
                (false, true) => Readiness::Writable,
                (false, false) => continue,
            };
            into.push(Interest {
                descriptor: connection.socket().as_fd(),
                readiness,
                token: *id,
            });
        }
    }

    fn host_ready(&mut self, token: u64, queues: &mut Queues) -> Result<(), DeviceError> {
        if token == LISTENER {
            self.accept();
        } else {
            self.socket_ready(token);
        }
        self.receive(queues)
    }

    /// All connections end; clients see their sockets closed.
    fn reset(&mut self) {
        self.connections.clear();
        self.accepts = true;
        self.replies.clear();
        self.transmit_waits = false;
        self.reset_due = false;
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceError> {
        if !state.0.is_empty() {
            return Err(DeviceError::Protocol("state of another kind of device"));
        }
        self.reset_due = true;
        Ok(())
    }
}
