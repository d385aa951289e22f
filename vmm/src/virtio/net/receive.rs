//! From the wire to the driver.

use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;

use super::header::{BUFFERS_AT, HEADER_BYTES};
use super::{NARROW_HEADER, Net, QUEUE_SIZE, RECEIVE, Receiving, add};
use crate::virtio::device::DeviceError;
use crate::virtio::queue::{Chain, Queues};

/// What came of one packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Delivery {
    /// It is delivered, or lost.
    Done,
    /// There are too few buffers.
    Waits,
}

impl Net {
    /// Hands packets to the driver, at most once the queue's length.
    pub(super) fn receive(&mut self, queues: &mut Queues) -> Result<(), DeviceError> {
        if !queues.is_ready(RECEIVE) {
            self.receiving = Receiving::Never;
            return Ok(());
        }
        queues.want_notifications(RECEIVE, false)?;
        for _ in 0..QUEUE_SIZE {
            let Some(length) = self.next_packet()? else {
                break;
            };
            if self.deliver(queues, length)? == Delivery::Waits {
                // From now on the driver has to tell. What it did before that was seen is not lost.
                if queues.want_notifications(RECEIVE, true)? {
                    queues.call_back(RECEIVE);
                }
                break;
            }
            self.receiving = Receiving::Packet;
        }
        Ok(queues.notify(RECEIVE)?)
    }

    /// The length of a packet that is here and paid for; none if there is no such.
    fn next_packet(&mut self) -> Result<Option<usize>, DeviceError> {
        let length = match self.receiving {
            Receiving::Never => return Ok(None),
            Receiving::Buffers(length) => return Ok(Some(length)),
            Receiving::Tokens(length) => length,
            Receiving::Packet => match self.read_packet()? {
                Some(length) => length,
                None => return Ok(None),
            },
        };
        self.receiving = Receiving::Tokens(length);
        if let Some(throttle) = &mut self.receive_throttle {
            let frame = u64::try_from(length - HEADER_BYTES).unwrap_or(u64::MAX);
            if throttle.waits() || !throttle.admit(frame)? {
                return Ok(None);
            }
        }
        self.receiving = Receiving::Buffers(length);
        Ok(Some(length))
    }

    fn read_packet(&mut self) -> Result<Option<usize>, DeviceError> {
        match rustix::io::read(&self.tap, &mut *self.packet) {
            Ok(length) if length > HEADER_BYTES => Ok(Some(length)),
            // Less than a header cannot be, and a frame of nothing is none.
            Ok(_) | Err(rustix::io::Errno::AGAIN) => Ok(None),
            // Reading fails only where the interface is gone.
            Err(error) => Err(DeviceError::Host {
                what: "reading from the tap",
                source: error.into(),
            }),
        }
    }

    /// Puts the packet into as many buffers as it needs, or into none.
    fn deliver(&mut self, queues: &mut Queues, length: usize) -> Result<Delivery, DeviceError> {
        let merges = self.accepted & 1 << VIRTIO_NET_F_MRG_RXBUF != 0;
        let mut chains: Vec<Chain> = Vec::new();
        let mut room = 0_usize;
        while room < length && (chains.is_empty() || merges) {
            let Some(chain) = queues.pop(RECEIVE)? else {
                for chain in chains.into_iter().rev() {
                    queues.unpop(RECEIVE, chain);
                }
                return Ok(Delivery::Waits);
            };
            // 5.1.6.3.2: a buffer holds at least the header.
            if chain.writable_bytes() < NARROW_HEADER {
                return Err(DeviceError::Protocol("a receive buffer without room"));
            }
            room += chain.writable_bytes() as usize;
            chains.push(chain);
        }
        if room < length {
            add(&self.counts.lost, 1);
            for chain in chains {
                queues.unpop(RECEIVE, chain);
            }
            return Ok(Delivery::Done);
        }
        let buffers = u16::try_from(chains.len()).unwrap_or(u16::MAX);
        let packet = self.packet.get_mut(..length).unwrap_or_default();
        if let Some(field) = packet.get_mut(BUFFERS_AT..HEADER_BYTES) {
            field.copy_from_slice(&buffers.to_le_bytes());
        }
        let mut left = &*packet;
        for chain in chains {
            let written = chain.write(queues.memory(), 0, left)?;
            left = left.get(written..).unwrap_or_default();
            queues.push(RECEIVE, chain, u32::try_from(written).unwrap_or(u32::MAX))?;
        }
        add(&self.counts.received_packets, 1);
        add(&self.counts.received_bytes, length - HEADER_BYTES);
        Ok(Delivery::Done)
    }
}
