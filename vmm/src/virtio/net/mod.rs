//! Network device (virtio 1.2, 5.1) over a tap.
//!
//! ```text
//!   driver's transmit queue ──▶ header and source are checked ──▶ tap
//!   driver's receive queue  ◀── one frame at a time is kept   ◀── tap
//! ```
//!
//! *Out.* The first bytes of a frame are copied, judged ([`Identity`]), and sent as they were
//! judged; the rest goes from guest memory straight to the tap. A frame that is not let out is
//! counted and forgotten, as on a wire. A tap that takes no more keeps the queue waiting.
//!
//! *In.* A frame is read only when there was room for the one before. While the driver offers no
//! buffers it waits here, the next ones in the kernel's queue, and what finds no room there is
//! lost, as everywhere. A driver that cannot merge buffers and offers smaller ones than a frame
//! loses that frame.
//!
//! *Limits.* Each direction has its own buckets, which are asked for what goes over the wire: out, a
//! frame that has to wait stays in its queue; in, it stays here, and the ones after it in the
//! kernel's queue.
//!
//! A tap that is gone stops the device; its interface being down does not.

mod address;
mod header;
mod receive;
mod tap;
#[cfg(test)]
mod tests;
mod transmit;

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};

use super::config_space::ConfigSpace;
use super::device::{DeviceError, DeviceKind, Interest, QueueSpec, Readiness, VirtioDevice};
use super::queue::Queues;
use super::throttle::Throttle;
use crate::rate_limiter::RateLimits;

use address::ETHERNET_BYTES;
pub use address::{Identity, MacAddress, MacAddressError};
use header::HEADER_BYTES;
pub use tap::{InterfaceName, InterfaceNameError, Tap};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const QUEUE_SIZE: u16 = 256;

/// The longest that a segmented packet gets: 64 KiB of IP, and an Ethernet header with a tag.
const FRAME_BYTES: usize = (64 << 10) + ETHERNET_BYTES + 4;
const PACKET_BYTES: usize = HEADER_BYTES + FRAME_BYTES;

const QUEUES: [QueueSpec; 2] = {
    let queue = QueueSpec {
        max_size: QUEUE_SIZE,
        // Drivers offer more than a packet needs: whole pages for each of up to 17 fragments.
        max_chain_bytes: 128 << 10,
    };
    [queue; 2]
};

const FEATURES: [u32; 14] = [
    VIRTIO_NET_F_CSUM,
    VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_UFO,
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_UFO,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_STATUS,
];

/// The largest packet on the wire: what the interface on the host has, or the driver's own idea of
/// a wire would not be the host's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mtu(u16);

/// Not an MTU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an MTU of {bytes}: from 1280 to 65535 bytes")]
pub struct MtuError {
    /// What was given.
    pub bytes: u16,
}

impl Mtu {
    /// # Errors
    /// Less than IPv6 needs (RFC 8200, 5).
    pub fn new(bytes: u16) -> Result<Self, MtuError> {
        if bytes < 1280 {
            return Err(MtuError { bytes });
        }
        Ok(Self(bytes))
    }

    /// In bytes.
    #[must_use]
    pub fn get(self) -> u16 {
        self.0
    }
}

impl Default for Mtu {
    fn default() -> Self {
        Self(1500)
    }
}

/// What a network device did so far.
#[derive(Debug, Default)]
pub struct NetCounts {
    received_packets: AtomicU64,
    received_bytes: AtomicU64,
    sent_packets: AtomicU64,
    sent_bytes: AtomicU64,
    refused: AtomicU64,
    lost: AtomicU64,
}

/// A moment of [`NetCounts`]. Bytes are those of frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct NetTotals {
    /// Frames that the driver got.
    pub received_packets: u64,
    /// And their bytes.
    pub received_bytes: u64,
    /// Frames that went out.
    pub sent_packets: u64,
    /// And their bytes.
    pub sent_bytes: u64,
    /// Frames that were not let out: another's address, an impossible header.
    pub refused: u64,
    /// Frames that the driver had too little room for, or the interface did not take.
    pub lost: u64,
}

impl NetCounts {
    /// Now.
    #[must_use]
    pub fn read(&self) -> NetTotals {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        NetTotals {
            received_packets: read(&self.received_packets),
            received_bytes: read(&self.received_bytes),
            sent_packets: read(&self.sent_packets),
            sent_bytes: read(&self.sent_bytes),
            refused: read(&self.refused),
            lost: read(&self.lost),
        }
    }
}

fn add(count: &AtomicU64, more: usize) {
    count.fetch_add(u64::try_from(more).unwrap_or(u64::MAX), Ordering::Relaxed);
}

/// The device.
#[derive(Debug)]
pub struct Net {
    tap: Tap,
    identity: Identity,
    config: Arc<ConfigSpace>,
    counts: Arc<NetCounts>,
    accepted: u64,
    receiving: Receiving,
    receive_throttle: Option<Throttle>,
    sending: Sending,
    send_throttle: Option<Throttle>,
    /// A packet from the tap: header and frame. Its length is in `receiving`.
    packet: Vec<u8>,
}

/// What the receive side waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Receiving {
    /// The tap to have a packet.
    Packet,
    /// Tokens for the packet of this length, which is here.
    Tokens(usize),
    /// The driver to offer buffers for the packet of this length, which is here and paid for.
    Buffers(usize),
    /// Nothing: the driver did not set the queue up.
    Never,
}

/// What the transmit side waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sending {
    /// The driver.
    Requests,
    /// The tap, for a frame that is paid for.
    Room,
    /// Tokens.
    Tokens,
}

const TOKEN_READ: u64 = 0;
const TOKEN_WRITE: u64 = 1;
const TOKEN_RECEIVE_TIMER: u64 = 2;
const TOKEN_SEND_TIMER: u64 = 3;

impl Net {
    /// A device on this wire, for this machine.
    #[must_use]
    pub fn new(tap: Tap, identity: Identity, mtu: Mtu) -> Self {
        let config = ConfigSpace::new(config_space(identity.mac, mtu), 0..0);
        Self {
            tap,
            identity,
            config: Arc::new(config),
            counts: Arc::default(),
            accepted: 0,
            receiving: Receiving::Packet,
            receive_throttle: None,
            sending: Sending::Requests,
            send_throttle: None,
            packet: vec![0; PACKET_BYTES],
        }
    }

    /// The same device with limits of what it receives, and of what it sends.
    ///
    /// # Errors
    /// No descriptors are to be had.
    pub fn with_limits(mut self, receive: RateLimits, send: RateLimits) -> io::Result<Self> {
        self.receive_throttle = Throttle::of(receive)?;
        self.send_throttle = Throttle::of(send)?;
        Ok(self)
    }

    /// What it does, for whoever meters it.
    #[must_use]
    pub fn counts(&self) -> Arc<NetCounts> {
        Arc::clone(&self.counts)
    }
}

/// `HEADER_BYTES` as lengths in chains are counted.
const NARROW_HEADER: u32 = 12;

impl VirtioDevice for Net {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Network
    }

    fn features(&self) -> u64 {
        FEATURES.iter().fold(0, |features, bit| features | 1 << bit)
    }

    fn queues(&self) -> &[QueueSpec] {
        &QUEUES
    }

    fn config(&self) -> &Arc<ConfigSpace> {
        &self.config
    }

    fn activate(&mut self, accepted: u64) -> Result<(), DeviceError> {
        self.accepted = accepted;
        let set = self.tap.set_offloads(accepted);
        set.map_err(|source| DeviceError::Host {
            what: "setting the tap's offloads",
            source,
        })
    }

    fn queue_notified(&mut self, index: usize, queues: &mut Queues) -> Result<(), DeviceError> {
        match index {
            RECEIVE => self.receive(queues),
            // A notification is no reason to look sooner than the buckets said.
            _ if self.sending == Sending::Tokens => Ok(()),
            _ => self.send(queues),
        }
    }

    fn interests<'d>(&'d self, into: &mut Vec<Interest<'d>>) {
        let descriptor = self.tap.as_fd();
        if self.receiving == Receiving::Packet {
            into.push(Interest {
                descriptor,
                readiness: Readiness::Readable,
                token: TOKEN_READ,
            });
        }
        if self.sending == Sending::Room {
            into.push(Interest {
                descriptor,
                readiness: Readiness::Writable,
                token: TOKEN_WRITE,
            });
        }
        let receive = self.receive_throttle.as_ref();
        into.extend(receive.and_then(|it| it.interest(TOKEN_RECEIVE_TIMER)));
        let send = self.send_throttle.as_ref();
        into.extend(send.and_then(|it| it.interest(TOKEN_SEND_TIMER)));
    }

    fn host_ready(&mut self, token: u64, queues: &mut Queues) -> Result<(), DeviceError> {
        match token {
            TOKEN_READ => self.receive(queues),
            TOKEN_RECEIVE_TIMER => {
                self.receive_throttle.iter_mut().for_each(Throttle::go_on);
                self.receive(queues)
            }
            TOKEN_SEND_TIMER => {
                self.send_throttle.iter_mut().for_each(Throttle::go_on);
                self.send(queues)
            }
            _ => self.send(queues),
        }
    }

    /// The packet that waited is lost; a network may do that.
    fn reset(&mut self) {
        self.receiving = Receiving::Packet;
        self.sending = Sending::Requests;
        self.accepted = 0;
        self.receive_throttle.iter_mut().for_each(Throttle::go_on);
        self.send_throttle.iter_mut().for_each(Throttle::go_on);
    }
}

/// `struct virtio_net_config` (5.1.4) up to the MTU.
fn config_space(mac: MacAddress, mtu: Mtu) -> Vec<u8> {
    let mut space = mac.octets().to_vec();
    let link_up = u16::try_from(VIRTIO_NET_S_LINK_UP).unwrap_or(1);
    // One pair of queues.
    for field in [link_up, 1, mtu.get()] {
        space.extend(field.to_le_bytes());
    }
    space
}
