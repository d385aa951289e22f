//! Packets: the guest's, and those for the guest.

use std::ops::Bound::{Excluded, Unbounded};

use super::connection::{Connection, Fate};
use super::packet::{HEADER_BYTES, Header, Operation, Parsed, Ports};
use super::{
    CONNECTIONS_MAX, ConnectionId, DATA_MAX_BYTES, EVENT, FIRST_CLIENT_PORT, NARROW_HEADER,
    QUEUE_SIZE, RECEIVE, REPLIES_MAX, TRANSMIT, TRANSPORT_RESET, Vsock, add,
};
use crate::memory::GuestMemory;
use crate::virtio::device::DeviceError;
use crate::virtio::queue::{Chain, Queues};

/// From the guest.
impl Vsock {
    pub(super) fn transmit(&mut self, queues: &mut Queues) -> Result<(), DeviceError> {
        queues.want_notifications(TRANSMIT, false)?;
        for _ in 0..QUEUE_SIZE {
            self.transmit_waits = self.replies.len() >= REPLIES_MAX;
            if self.transmit_waits {
                break;
            }
            let Some(chain) = queues.pop(TRANSMIT)? else {
                break;
            };
            self.take_packet(queues.memory(), &chain)?;
            queues.push(TRANSMIT, chain, 0)?;
        }
        queues.notify(TRANSMIT)?;
        if !self.transmit_waits && queues.want_notifications(TRANSMIT, true)? {
            queues.call_back(TRANSMIT);
        }
        Ok(())
    }

    fn take_packet(&mut self, memory: &GuestMemory, chain: &Chain) -> Result<(), DeviceError> {
        let mut bytes = [0; HEADER_BYTES];
        if chain.read(memory, 0, &mut bytes)? != HEADER_BYTES {
            return Err(DeviceError::Protocol("a packet without its header"));
        }
        let header = match Header::parse(&bytes, self.cid) {
            Parsed::Packet(header) => header,
            Parsed::Unknown(ports) => {
                self.refuse(ports);
                return Ok(());
            }
            Parsed::Stray => {
                add(&self.counts.refused, 1);
                return Ok(());
            }
        };
        let there = chain.readable_bytes() - NARROW_HEADER;
        if header.data_bytes > there.min(DATA_MAX_BYTES) {
            return Err(DeviceError::Protocol("a packet longer than its buffer"));
        }
        if header.operation == Operation::Request {
            self.begin(&header);
            return Ok(());
        }
        let found = self.find(header.ports);
        let Some((id, connection)) = found else {
            if header.operation != Operation::Reset {
                self.refuse(header.ports);
            }
            return Ok(());
        };
        let fate = if header.operation == Operation::Data {
            let mut data = std::mem::take(&mut self.data);
            data.resize(header.data_bytes as usize, 0);
            let read = chain.read(memory, NARROW_HEADER, &mut data);
            let fate = read.map(|_| self.with(id, |it| it.receive_data(&header, &data)));
            self.data = data;
            add(&self.counts.from_guest_bytes, header.data_bytes);
            fate?
        } else {
            connection.receive(&header)
        };
        self.settle(id, fate);
        Ok(())
    }

    /// The guest connects to the host.
    fn begin(&mut self, request: &Header) {
        if let Some((id, _)) = self.find(request.ports) {
            // It has forgotten the one before.
            self.settle(id, Fate::Gone);
        }
        let guests = self.connections.values();
        let count = guests
            .filter(|it| it.ports.host < FIRST_CLIENT_PORT)
            .count();
        let allowed = count < CONNECTIONS_MAX && request.ports.host < FIRST_CLIENT_PORT;
        let dialled = allowed.then(|| self.dial.dial(request.ports.host));
        let Some(Ok(socket)) = dialled else {
            self.refuse(request.ports);
            return;
        };
        if socket.set_nonblocking(true).is_err() {
            self.refuse(request.ports);
            return;
        }
        self.add(Connection::accepted(socket, request));
    }

    fn refuse(&mut self, ports: Ports) {
        add(&self.counts.refused, 1);
        self.replies.push_back(Header::new(ports, Operation::Reset));
    }

    fn find(&mut self, ports: Ports) -> Option<(ConnectionId, &mut Connection)> {
        let mut all = self.connections.iter_mut();
        let found = all.find(|(_, it)| it.ports == ports && !it.is_greeting());
        found.map(|(id, connection)| (*id, connection))
    }
}

/// To the guest.
impl Vsock {
    pub(super) fn receive(&mut self, queues: &mut Queues) -> Result<(), DeviceError> {
        if !queues.is_ready(RECEIVE) {
            return Ok(());
        }
        queues.want_notifications(RECEIVE, false)?;
        let mut turns = QUEUE_SIZE;
        while self.has_packet() {
            if turns == 0 {
                queues.call_back(RECEIVE);
                break;
            }
            turns -= 1;
            let Some(chain) = queues.pop(RECEIVE)? else {
                if queues.want_notifications(RECEIVE, true)? {
                    queues.call_back(RECEIVE);
                }
                break;
            };
            match self.put_packet(queues.memory(), &chain)? {
                0 => queues.unpop(RECEIVE, chain),
                bytes => queues.push(RECEIVE, chain, bytes)?,
            }
        }
        queues.notify(RECEIVE)?;
        if self.transmit_waits && self.replies.len() < REPLIES_MAX {
            queues.call_back(TRANSMIT);
        }
        Ok(())
    }

    fn has_packet(&self) -> bool {
        !self.replies.is_empty() || self.connections.values().any(Connection::has_packet)
    }

    /// Fills a buffer with the next packet; returns its length, or zero if it turned out that there
    /// was none.
    fn put_packet(&mut self, memory: &GuestMemory, chain: &Chain) -> Result<u32, DeviceError> {
        let room = chain.writable_bytes().saturating_sub(NARROW_HEADER);
        if room == 0 {
            return Err(DeviceError::Protocol("a receive buffer without room"));
        }
        if let Some(reply) = self.replies.pop_front() {
            chain.write(memory, 0, &reply.encode(self.cid))?;
            return Ok(NARROW_HEADER);
        }
        let after = self.connections.range_mut((Excluded(self.turn), Unbounded));
        let next = after
            .filter(|(_, it)| it.has_packet())
            .map(|(id, _)| *id)
            .next();
        let first = || {
            let mut all = self.connections.iter();
            all.find(|(_, it)| it.has_packet()).map(|(id, _)| *id)
        };
        let Some(id) = next.or_else(first) else {
            return Ok(0);
        };
        self.turn = id;
        let Some(connection) = self.connections.get_mut(&id) else {
            return Ok(0);
        };
        if let Some(header) = connection.take_due() {
            chain.write(memory, 0, &header.encode(self.cid))?;
            return Ok(NARROW_HEADER);
        }
        let most = room.min(connection.may_send()).min(DATA_MAX_BYTES);
        let mut vectors = chain.writable_vectors(memory, NARROW_HEADER, most)?;
        let outcome = vectors.read(connection.socket());
        match connection.was_read(outcome) {
            Ok(Some(bytes)) => {
                let mut header = connection.header(Operation::Data);
                header.data_bytes = bytes;
                chain.write(memory, 0, &header.encode(self.cid))?;
                add(&self.counts.to_guest_bytes, bytes);
                Ok(NARROW_HEADER + bytes)
            }
            Ok(None) => Ok(0),
            Err(fate) => {
                self.settle(id, fate);
                Ok(0)
            }
        }
    }

    /// Tells a restored guest, once, that its connections are gone.
    pub(super) fn announce_reset(&mut self, queues: &mut Queues) -> Result<(), DeviceError> {
        if !self.reset_due {
            return Ok(());
        }
        if let Some(chain) = queues.pop(EVENT)? {
            let written = chain.write(queues.memory(), 0, &TRANSPORT_RESET)?;
            queues.push(EVENT, chain, u32::try_from(written).unwrap_or(0))?;
            queues.notify(EVENT)?;
            self.reset_due = false;
        } else if queues.want_notifications(EVENT, true)? {
            queues.call_back(EVENT);
        }
        Ok(())
    }
}
