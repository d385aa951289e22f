//! From the driver to the wire.

use std::io;

use super::address::HEAD_BYTES;
use super::header::{self, HEADER_BYTES};
use super::{FRAME_BYTES, NARROW_HEADER, Net, QUEUE_SIZE, Sending, TRANSMIT, add};
use crate::memory::GuestMemory;
use crate::virtio::device::DeviceError;
use crate::virtio::queue::{Chain, Queues};

/// What came of one frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Delivery {
    Done,
    /// It has to wait for the tap.
    Waits,
    /// It has to wait for tokens.
    WaitsForTokens,
}

impl Net {
    /// Sends what the driver has, at most once the queue's length; the rest gets another turn.
    pub(super) fn send(&mut self, queues: &mut Queues) -> Result<(), DeviceError> {
        let mut paid = self.sending == Sending::Room;
        self.sending = Sending::Requests;
        queues.want_notifications(TRANSMIT, false)?;
        for _ in 0..QUEUE_SIZE {
            let Some(chain) = queues.pop(TRANSMIT)? else {
                break;
            };
            match self.send_one(queues.memory(), &chain, std::mem::take(&mut paid))? {
                Delivery::Done => queues.push(TRANSMIT, chain, 0)?,
                waits => {
                    queues.unpop(TRANSMIT, chain);
                    self.sending = match waits {
                        Delivery::WaitsForTokens => Sending::Tokens,
                        _ => Sending::Room,
                    };
                    break;
                }
            }
        }
        queues.notify(TRANSMIT)?;
        if self.sending == Sending::Requests && queues.want_notifications(TRANSMIT, true)? {
            queues.call_back(TRANSMIT);
        }
        Ok(())
    }

    /// `paid`: its tokens were taken when it was tried before.
    fn send_one(
        &mut self,
        memory: &GuestMemory,
        chain: &Chain,
        paid: bool,
    ) -> Result<Delivery, DeviceError> {
        let mut head = [0; HEADER_BYTES + HEAD_BYTES];
        let read = chain.read(memory, 0, &mut head)?;
        let head = head.get_mut(..read).unwrap_or_default();
        let bytes = chain.readable_bytes();
        let Some((header, frame)) = head.split_first_chunk_mut::<HEADER_BYTES>() else {
            return Err(DeviceError::Protocol("a packet without its header"));
        };
        let frame_bytes = bytes.saturating_sub(NARROW_HEADER);
        let clean = header::checked(*header, frame_bytes, self.accepted);
        let fits = frame_bytes as usize <= FRAME_BYTES;
        let (Some(clean), true, Ok(())) = (clean, fits, self.identity.check(frame)) else {
            add(&self.counts.refused, 1);
            return Ok(Delivery::Done);
        };
        if let (Some(throttle), false) = (&mut self.send_throttle, paid)
            && !throttle.admit(u64::from(frame_bytes))?
        {
            return Ok(Delivery::WaitsForTokens);
        }
        *header = clean;
        let offset = u32::try_from(read).unwrap_or(u32::MAX);
        let rest = chain.readable_vectors(memory, offset, bytes - offset)?;
        match rest.write_after(head, &self.tap) {
            Ok(_) => {
                add(&self.counts.sent_packets, 1);
                add(&self.counts.sent_bytes, frame_bytes as usize);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Ok(Delivery::Waits);
            }
            Err(source) if source.raw_os_error() == Some(libc::EBADFD) => {
                let what = "writing to the tap";
                return Err(DeviceError::Host { what, source });
            }
            // The interface is down, or does not like the packet.
            Err(_) => add(&self.counts.lost, 1),
        }
        Ok(Delivery::Done)
    }
}
